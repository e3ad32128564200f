"""Layer collapse against Algorithm 1 written out with whole copies of the model."""

import copy
from statistics import mean

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models.merge import MERGES, merge_layers
from actors.scoring.merge import laco_compress
from tests.tiny_models import blocks_of, tiny_ids, tiny_model
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
    merges = laco_compress(
        model,
        SEQUENCES,
        threshold=threshold,
        group=group,
        interval=interval,
        lowest=lowest,
        highest=highest,
        variant=variant,
    )
    assert [merge.cosine for merge in merges] == pytest.approx(similarities, abs=1e-6)
    assert len(blocks_of(model)) == len(blocks_of(want)) == 6 - sum(len(merge.merged) for merge in merges)
    for value, wanted in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)


def test_indices_are_those_of_the_unmerged_model() -> None:
    """With every merge accepted, pairs collapse downwards, the base of one going into the next."""
    merges = laco_compress(tiny_model("llama"), SEQUENCES, threshold=-1, group=2, interval=1)
    assert [(merge.base, merge.merged) for merge in merges] == [
        (4, (5,)),
        (3, (4,)),
        (2, (3,)),
        (1, (2,)),
        (0, (1,)),
    ]


def test_no_merge_leaves_fewer_than_wanted() -> None:
    model = tiny_model("llama")
    merges = laco_compress(model, SEQUENCES, threshold=-1, group=3, interval=1, min_layers=3)
    assert [merge.merged for merge in merges] == [(4, 5), (2,)]
    assert len(blocks_of(model)) == 3


def test_a_refused_merge_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    assert laco_compress(model, SEQUENCES, threshold=1, group=3) == []
    for value, wanted in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(value, wanted)


def test_the_unmerged_model_runs_once() -> None:
    model, entered = tiny_model("llama"), []

    def count(_mlp: nn.Module, _inputs: object, _output: object) -> None:
        entered.append(1)

    model.model.layers[0].mlp.register_forward_hook(count)
    laco_compress(model, SEQUENCES, threshold=1, group=2, lowest=1)
    assert len(entered) in (len(SEQUENCES), len(SEQUENCES) + 1)  # one token more at a family's first sight


@pytest.mark.parametrize("wrong", [{"group": 1}, {"interval": 0}, {"lowest": 6}, {"highest": 7}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=r"needed"):
        laco_compress(tiny_model("llama"), SEQUENCES, threshold=0.5, **wrong)
