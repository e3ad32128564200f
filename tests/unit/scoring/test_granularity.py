"""Attention or MLP as candidates, against a plain loop that runs whole models with one branch off."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.errors import RequestError
from actors.models import load_model, zero_sub_blocks
from actors.scoring import Scorer, score_layers, score_locally
from tests.support.decoder_zoo import tiny_decoder
from tests.support.surgery_truth import branch_off
from tests.support.tiny_models import blocks_of, save_tiny, tiny_ids, tiny_model
from tests.unit.scoring.plain import cosine, last_hidden

SEQUENCES = [tiny_ids(1, length, seed=length)[0] for length in (12, 7, 3)]
KINDS = pytest.mark.parametrize("kind", ["attention", "mlp"])
FAMILY = pytest.mark.parametrize("family", ["llama", "bloom"])
LINES = [
    "The quick brown fox jumps over the lazy dog .",
    "There is a way .",
    "Ancient deities are the gods .",
]
MATRICES = {
    ("llama", "attention"): ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("llama", "mlp"): ("gate_proj", "up_proj", "down_proj"),
    ("bloom", "attention"): ("query_key_value", "self_attention.dense"),
    ("bloom", "mlp"): ("dense_h_to_4h", "dense_4h_to_h"),
}


def _matrices(model: PreTrainedModel, family: str, kind: str, layer: int) -> list[Tensor]:
    named = blocks_of(model)[layer].named_parameters()
    ends = tuple(f"{part}.weight" for part in MATRICES[family, kind])
    return [weight for name, weight in named if name.endswith(ends)]


@torch.no_grad()
def _hidden_cosine(
    model: PreTrainedModel, family: str, kind: str, sequences: Sequence[Tensor]
) -> list[float]:
    scores = []
    for block in blocks_of(model):
        similarities = []
        for ids_T in sequences:
            want = last_hidden(model, ids_T).flatten().tolist()
            with branch_off(block, kind, family):
                similarities.append(cosine(want, last_hidden(model, ids_T).flatten().tolist()))
        scores.append(mean(similarities))
    return scores


@KINDS
@FAMILY
def test_hidden_cosine(family: str, kind: str) -> None:
    model = tiny_model(family)
    want = _hidden_cosine(model, family, kind, SEQUENCES)
    assert score_layers(model, SEQUENCES, granularity=kind) == pytest.approx(want, abs=1e-6)


@torch.no_grad()
@KINDS
@FAMILY
def test_perplexity(family: str, kind: str) -> None:
    model, want = tiny_model(family), []
    for block in blocks_of(model):
        nats, count = 0.0, 0
        for ids_T in SEQUENCES:
            with branch_off(block, kind, family):
                log_p = model(ids_T[None], use_cache=False).logits[0].double().log_softmax(-1)
            nats -= math.fsum(log_p[t, ids_T[t + 1]].item() for t in range(len(ids_T) - 1))
            count += len(ids_T) - 1
        want.append(math.exp(nats / count))
    assert score_layers(model, SEQUENCES, "perplexity", granularity=kind) == pytest.approx(want, rel=1e-5)


@torch.no_grad()
@KINDS
@FAMILY
def test_block_influence(family: str, kind: str) -> None:
    """The stream before attention, between it and the MLP, and after, seen by hooks on the block."""
    model, want = tiny_model(family), []
    for block in blocks_of(model):
        similarities: list[float] = []
        for ids_T in SEQUENCES:
            seen: list[Tensor] = []
            hooks = [
                block.register_forward_pre_hook(lambda _b, inputs, seen=seen: seen.append(inputs[0])),
                block.register_forward_hook(
                    lambda _b, _i, output, seen=seen: seen.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                ),
            ]
            model(ids_T[None], use_cache=False)
            with branch_off(block, "mlp", family):
                model(ids_T[None], use_cache=False)
            for hook in hooks:
                hook.remove()
            entering, leaving, _, between = (points[0].tolist() for points in seen)
            before, after = (entering, between) if kind == "attention" else (between, leaving)
            similarities.append(mean(map(cosine, before, after)))
        want.append(1 - mean(similarities))
    assert score_layers(model, SEQUENCES, "block_influence", granularity=kind) == pytest.approx(
        want, abs=1e-6
    )


@KINDS
@FAMILY
def test_weights(family: str, kind: str) -> None:
    model = tiny_model(family).requires_grad_(True)
    losses = [model(ids_T[None], labels=ids_T[None], use_cache=False).loss for ids_T in SEQUENCES]
    torch.stack(losses).mean().backward()
    own = [_matrices(model, family, kind, layer) for layer in range(6)]
    want = {
        "magnitude_l1": [sum(w.abs().sum().item() for w in weights) for weights in own],
        "magnitude_l2": [sum(w.square().sum().sqrt().item() for w in weights) for weights in own],
        "taylor": [sum((w * w.grad).abs().sum().item() for w in weights) for weights in own],
    }
    assert all(len(weights) == len(MATRICES[family, kind]) for weights in own)
    for criterion, scores in want.items():
        got = score_layers(model, SEQUENCES, criterion, granularity=kind)
        assert got == pytest.approx(scores, rel=2e-5)


@pytest.mark.parametrize("criterion", ["angular_block", "bridge_residual", "laco"])
def test_criteria_of_whole_blocks_are_refused(criterion: str) -> None:
    with pytest.raises(RequestError, match=f"criterion '{criterion}' chooses whole blocks"):
        score_layers(tiny_model("llama"), SEQUENCES, criterion, granularity="mlp")


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown granularity 'atention'; did you mean attention"):
        score_layers(tiny_model("llama"), SEQUENCES, granularity="atention")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    """A model of six layers: the third dropped, the attention of the first and of the last empty."""
    directory = tmp_path_factory.mktemp("granularity")
    (directory / "text.txt").write_text("\n".join(LINES))
    source = ModelRef(ModelSpec(save_tiny(directory / "model", num_layers=6)))
    model = source.pruned("block", (2,)).pruned("attention", (0, 5))
    return ScoreSpec(
        model=model, calibration=TextSpec(path=str(directory / "text.txt")), granularity="attention"
    )


def test_zeroed_sub_blocks_are_no_candidates(spec: ScoreSpec) -> None:
    result = score_locally(replace(spec, reference="current"))
    model, _ = load_model(spec.model.source.path)
    zero_sub_blocks(model, "attention", [0, 5])
    del model.model.layers[2]
    want = _hidden_cosine(model, "llama", "attention", Scorer(spec).sequences)
    assert result.source_layers == (1, 3, 4)
    assert result.scores == pytest.approx([want[i] for i in (1, 2, 3)], abs=1e-6)
    assert sorted(result.removal_order) == [1, 3, 4]


def test_a_candidate_passes_its_own_block_too(spec: ScoreSpec) -> None:
    """Five blocks: 5 for the unpruned stream, and 4, 3, 2 from the candidates 1, 2, 3 on; the source's 6."""
    assert score_locally(replace(spec, reference="current")).layer_forwards == 3 * (5 + 4 + 3 + 2)
    assert score_locally(spec).layer_forwards == 3 * (6 + 3 + 4 + 3 + 2)
    whole = replace(spec, model=ModelRef(spec.model.source))
    assert score_locally(whole).layer_forwards == 3 * (6 * 7 // 2 + 6)


@pytest.mark.parametrize("criterion", ["hidden_cosine", "perplexity", "kl"])
def test_a_streamed_model_has_the_same_scores(spec: ScoreSpec, criterion: str) -> None:
    spec = replace(spec, criterion=criterion)
    streamed = score_locally(replace(spec, stream_weights=True))
    assert streamed.scores == pytest.approx(score_locally(spec).scores, rel=1e-6)


def test_a_block_without_such_a_sub_block_is_reported() -> None:
    with pytest.raises(RequestError, match="has no mlp of its own"):
        score_layers(tiny_decoder("mamba"), SEQUENCES, granularity="mlp")
