"""A whole `ScoreSpec`, in one process and in shares."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from actors.artifacts import publish
from actors.contracts import ArtifactRef, ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.errors import RequestError
from actors.models import load_model, remove_layers
from actors.scoring import Scorer, score_layers, score_locally
from tests.tiny_models import save_tiny, tiny_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog .",
    "Ancient deities are the gods .",
    "Stability of the higher layer leads to greater stability of the lower layer .",
    "dog",
    "There is a way .",
    "The gods and goddesses worshipped in the ancient land .",
    "The fox .",
]
DROPPED = (1, 3)
KEPT = (0, 2, 4, 5)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    """Seven sequences and an unpruned model of six layers."""
    directory = tmp_path_factory.mktemp("score")
    (directory / "calibration.txt").write_text("\n".join(LINES))
    path = save_tiny(directory / "model", num_layers=6)
    return ScoreSpec(ModelRef(ModelSpec(path)), TextSpec(path=str(directory / "calibration.txt")))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """Rank 1 on the attention output of source layers 2 and 4: W + B·A."""
    directory = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=["o_proj"], layers_to_transform=[2, 4], layers_pattern="layers"
    )
    config.save_pretrained(str(directory))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{factor}.weight": torch.ones(shape)
        for layer in (2, 4)
        for factor, shape in {"A": (1, 32), "B": (32, 1)}.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return publish(directory, str(directory / "published"))


def _in_shares(spec: ScoreSpec, count: int) -> ScoreResult:
    """As a pool of actors does it: every share by a scorer of its own, the last share first."""
    shares = Scorer(spec).shares(count)
    rows: dict[int, list[float]] = {}
    for share in reversed(shares):
        rows.update(zip(share, Scorer(spec).score(share), strict=True))
    return Scorer(spec).result(rows)


def test_an_unpruned_model(spec: ScoreSpec) -> None:
    heard: list[tuple[int, int, str]] = []
    result = score_locally(spec, lambda done, total, note: heard.append((done, total, note)))
    tokenizer = tiny_tokenizer()
    sequences = [torch.tensor(tokenizer(line).input_ids) for line in LINES]
    want = score_layers(load_model(spec.model.source.path)[0], sequences)
    assert result.scores == pytest.approx(want, abs=1e-6)
    assert result.source_layers == (0, 1, 2, 3, 4, 5)
    assert result.removal_order == tuple(sorted(range(6), key=lambda i: -want[i]))
    assert result.num_sequences == 7
    assert result.num_tokens == sum(len(sequence) for sequence in sequences)
    assert result.layer_forwards == 7 * 6 * 7 // 2
    assert heard == [(done, 7, "sequences") for done in range(1, 8)]


@pytest.mark.parametrize("criterion", ["hidden_cosine", "block_influence", "random", "deepest"])
def test_shares_do_not_matter(spec: ScoreSpec, criterion: str) -> None:
    spec = replace(spec, criterion=criterion, model=spec.model.without(DROPPED))
    whole = score_locally(spec)
    for count in (1, 2, 3, 7):
        shared = _in_shares(spec, count)
        assert shared.scores == pytest.approx(whole.scores, abs=1e-6)
        assert replace(shared, scores=()) == replace(whole, scores=())


def test_shares_are_of_like_size_and_hold_every_sequence_once(spec: ScoreSpec) -> None:
    for count, sizes in {1: [7], 2: [4, 3], 3: [3, 2, 2], 7: [1] * 7, 50: [1] * 7}.items():
        shares = Scorer(spec).shares(count)
        assert [len(share) for share in shares] == sizes
        assert sorted(position for share in shares for position in share) == list(range(7))


@pytest.mark.parametrize("reference", ["source", "current"])
def test_a_pruned_and_recovered_model(spec: ScoreSpec, adapter: ArtifactRef, reference: str) -> None:
    model = spec.model.recovered(adapter).without(DROPPED)
    result = score_locally(replace(spec, model=model, reference=reference))

    source, _ = load_model(spec.model.source.path)
    current, _ = load_model(spec.model.source.path)
    with torch.no_grad():
        for layer in (2, 4):
            current.model.layers[layer].self_attn.o_proj.weight += torch.ones(32, 32)
    remove_layers(current, DROPPED)
    sequences = Scorer(spec).sequences
    want = score_layers(current, sequences, reference=source if reference == "source" else None)
    assert result.scores == pytest.approx(want, abs=1e-6)
    assert result.source_layers == KEPT
    assert result.removal_order == tuple(sorted(KEPT, key=lambda i: -want[KEPT.index(i)]))


def test_source_and_current_are_two_references(spec: ScoreSpec) -> None:
    pruned = replace(spec, model=spec.model.without(DROPPED))
    by_source = score_locally(pruned).scores
    assert by_source != pytest.approx(score_locally(replace(pruned, reference="current")).scores, abs=1e-3)


def test_limits_on_sequences(spec: ScoreSpec) -> None:
    result = score_locally(replace(spec, max_sequences=2, sequence_length=5))
    assert (result.num_sequences, result.num_tokens) == (2, 10)


def test_a_criterion_without_text_reads_none(spec: ScoreSpec) -> None:
    result = score_locally(replace(spec, criterion="deepest", model=spec.model.without(DROPPED)))
    assert result.removal_order == (4, 2, 0, 5)
    assert (result.num_sequences, result.num_tokens, result.layer_forwards) == (0, 0, 0)


def test_an_unknown_criterion_is_refused_before_a_model_is_loaded(spec: ScoreSpec) -> None:
    missing = ModelRef(ModelSpec("/no/such/model"))
    with pytest.raises(RequestError, match="unknown criterion"):
        Scorer(replace(spec, model=missing, criterion="hidden"))
