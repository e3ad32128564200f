"""Layer collapse against Algorithm 1 written out with whole copies of the model."""

import copy
from dataclasses import replace
from statistics import mean

import pytest
import torch
from transformers import PreTrainedModel

from actors.contracts import MergeSpec, ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.data import calibration_sequences, load_texts
from actors.errors import RequestError, WorkError
from actors.models import LayerwisePass, build_model
from actors.models.pruning.merging import MERGES, merge_layers
from actors.scoring import score_locally
from actors.scoring.laco import laco_compress
from tests.support.tiny_models import blocks_of, tiny_ids, tiny_model, tiny_tokenizer
from tests.unit.scoring.plain import cosine, last_hidden

SEQUENCES = [tiny_ids(1, length, seed=length)[0] for length in (12, 7, 3)]


def _smooth(family: str) -> PreTrainedModel:
    """Blocks that do little and are alike, as in trained models, so that some merges hold and some do not."""
    model = tiny_model(family)
    blocks = blocks_of(model)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for name, value in block.named_parameters():
                value.lerp_(dict(blocks[0].named_parameters())[name], 0.7)
                if value.dim() > 1:
                    value *= 0.4 + 0.15 * index
    return model


def _similarity(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    return mean(
        cosine(*(last_hidden(m, ids_T).flatten().tolist() for m in (model, reference))) for ids_T in SEQUENCES
    )


def _plain(
    model: PreTrainedModel,
    threshold: float,
    group: int,
    interval: int,
    lowest: int,
    highest: int,
    variant: str,
) -> tuple[PreTrainedModel, list[float]]:
    """Algorithm 1 of LaCo: every try on a copy of the model, run as a whole beside the unmerged one."""
    merged, accepted, layer = copy.deepcopy(model), [], highest - group
    while layer >= lowest:
        count = min(group - 1, len(blocks_of(merged)) - layer - 1)
        if count < 1:
            layer -= 1
            continue
        trial = merge_layers(copy.deepcopy(merged), layer, count, variant)
        similarity = _similarity(trial, model)
        if similarity > threshold:
            merged = trial
            accepted.append(similarity)
            layer = min(layer - interval, len(blocks_of(merged)) - group)
        else:
            layer -= 1
    return merged, accepted


@pytest.mark.parametrize("variant", MERGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("threshold", "group", "interval", "lowest", "highest"),
    [
        (0.8, 2, 1, 0, 6),
        (0.9, 2, 2, 0, 6),
        (0.95, 3, 1, 0, 6),
        (0.6, 3, 1, 1, 5),
        (-1, 2, 1, 0, 6),
        (1, 2, 1, 0, 6),
    ],
)
def test_algorithm(
    family: str, variant: str, threshold: float, group: int, interval: int, lowest: int, highest: int
) -> None:
    model = _smooth(family)
    want, similarities = _plain(model, threshold, group, interval, lowest, highest, variant)
    settings = MergeSpec(variant, threshold, group, interval, lowest, highest)
    accepted = laco_compress(model, SEQUENCES, settings).accepted
    assert [found.cosine for found in accepted] == pytest.approx(similarities, abs=1e-6)
    assert (
        len(blocks_of(model))
        == len(blocks_of(want))
        == 6 - sum(len(found.merge.merged) for found in accepted)
    )
    for value, wanted in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)


def test_indices_are_those_of_the_unmerged_model() -> None:
    """With every merge accepted, pairs collapse downwards, the base of one going into the next."""
    accepted = laco_compress(
        tiny_model("llama"), SEQUENCES, MergeSpec(threshold=-1, group=2, interval=1)
    ).accepted
    assert [(found.merge.base, found.merge.merged) for found in accepted] == [
        (4, (5,)),
        (3, (4,)),
        (2, (3,)),
        (1, (2,)),
        (0, (1,)),
    ]


def test_no_merge_leaves_fewer_than_wanted() -> None:
    model = tiny_model("llama")
    settings = MergeSpec(threshold=-1, group=3, interval=1)
    accepted = laco_compress(model, SEQUENCES, settings, min_layers=3).accepted
    assert [found.merge.merged for found in accepted] == [(4, 5), (2,)]
    assert len(blocks_of(model)) == 3


def test_a_refused_merge_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    assert laco_compress(model, SEQUENCES, MergeSpec(threshold=1, group=3)).accepted == ()
    for value, wanted in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(value, wanted)


def test_a_try_runs_only_the_merged_block_and_those_above() -> None:
    """The unmerged model once, and bases 4 to 1 with 0 to 3 blocks above the two merged ones."""
    model, sequences = tiny_model("llama"), SEQUENCES[:2]
    LayerwisePass(model, sequences[0][None])  # which block returns what is seen from one token, once
    entered: list[int] = []
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda *_: entered.append(1))
    collapse = laco_compress(model, sequences, MergeSpec(threshold=1, group=2, lowest=1))
    assert len(entered) == collapse.layer_forwards == 2 * (6 + 1 + 2 + 3 + 4)


@pytest.mark.parametrize("wrong", [{"group": 1}, {"interval": 0}, {"lowest": 6}, {"highest": 7}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=r"needed"):
        laco_compress(tiny_model("llama"), SEQUENCES, MergeSpec(threshold=0.5, **wrong))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    directory = tmp_path_factory.mktemp("laco")
    _smooth("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory / "text.txt").write_text("The quick brown fox .\nThere is a way .")
    text = TextSpec(path=str(directory / "text.txt"))
    return ScoreSpec(
        model=ModelRef(ModelSpec(str(directory))), calibration=text, criterion="laco", num_remove=3
    )


@pytest.mark.parametrize("variant", MERGES)
@pytest.mark.parametrize("dropped", [(), (1,)])
def test_the_model_that_a_spec_leads_to(spec: ScoreSpec, variant: str, dropped: tuple[int, ...]) -> None:
    """Made again from its reference alone, it is the model that was merged in memory."""
    settings = MergeSpec(variant, threshold=-1, group=3, interval=1)
    spec = replace(spec, model=spec.model.without(dropped), merge=settings)
    result = score_locally(spec)
    removed = result.removal_order[:3]
    again, tokenizer = build_model(spec.model.without(removed).merged(result.merges))

    model, _ = build_model(spec.model)
    sequences = calibration_sequences(load_texts(spec.calibration), tokenizer, 512)
    accepted = laco_compress(model, sequences, settings, min_layers=3 - len(dropped)).accepted
    for value, wanted in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)
    assert result.source_layers == spec.model.kept(6)
    assert sorted(result.removal_order) == list(result.source_layers)
    assert {layer for merge in result.merges for layer in merge.merged} == set(removed)
    assert set(result.scores) == {-1.0, *(found.cosine for found in accepted)}


def test_too_high_a_threshold(spec: ScoreSpec) -> None:
    with pytest.raises(WorkError, match=r"cosine above 1 take away 0 of the 3 layers; lower scoring\.merge"):
        score_locally(replace(spec, merge=MergeSpec(threshold=1)))
