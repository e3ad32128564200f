"""Layer collapse (LaCo, arXiv 2402.11187, Algorithm 1): merge from the top down while the output holds.

The model runs as a whole once, before anything is merged. A merge that is tried runs
only the merged block and those above it: the block's input does not change,
as merging goes downwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import Merge, MergeSpec, ScoreResult, ScoreSpec
from actors.data import calibration_sequences, load_texts
from actors.errors import RequestError, WorkError
from actors.models import LayerwisePass, build_model, depth, find_layers, places, remove_layers
from actors.models.pruning.merging import merge_blocks
from actors.scoring.measures.pooling import POOLING


@dataclass(frozen=True)
class Accepted:
    """A merge that was kept, in layer indices of the model as it was before any.

    `cosine` is the similarity of the last hidden states after this merge to the unmerged ones.
    """

    merge: Merge
    cosine: float


@dataclass(frozen=True)
class Collapse:
    """The merges that were accepted, in order, and how often a sequence passed a block to find them."""

    accepted: tuple[Accepted, ...]
    layer_forwards: int


@torch.no_grad()
def laco_compress(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    settings: MergeSpec,
    *,
    min_layers: int = 1,
    pooling: str = "flatten",
) -> Collapse:
    """Collapse the layers of `model` in place; return the merges that were accepted.

    From `highest` − `group` downwards, each layer tries to take in the `group` − 1 layers
    after it. The merge stays if the mean cosine to the unmerged model's last hidden states
    is above `threshold`; the next try is then `interval` layers lower, else one.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids [T] each, without padding.
        settings: T `threshold`, C `group`, I `interval`, L `lowest` and H `highest` (N if None)
            of Algorithm 1, and how blocks are merged.
        min_layers: no merge leaves fewer.
        pooling: how tokens become one similarity; `flatten` in the published code.

    Raises:
        RequestError: a setting out of range, or blocks that cannot be merged.
    """
    num_layers, group = depth(model.config), settings.group
    highest = num_layers if settings.highest is None else settings.highest
    if group < 2 or settings.interval < 1:
        raise RequestError(
            f"merge: group is {group} and interval {settings.interval}; at least 2 and 1 are needed"
        )
    if not 0 <= settings.lowest < highest <= num_layers:
        raise RequestError(
            f"merge: lowest is {settings.lowest} and highest {highest}; "
            f"0 ≤ lowest < highest ≤ {num_layers} is needed"
        )
    calibration = [_CalibrationSequence(model, sequence) for sequence in sequences]
    source = list(range(num_layers))
    accepted: list[Accepted] = []
    base = highest - group
    while base >= settings.lowest:
        count = min(group - 1, len(source) - base - 1, len(source) - min_layers)
        if count < 1:
            base -= 1
            continue
        merge = Merge(base, tuple(range(base + 1, base + count + 1)), settings.variant)
        with _trial_merge(model, merge) as trial:
            cosine = mean(sequence.similarity(model, merge, pooling) for sequence in calibration)
            trial.keep = cosine > settings.threshold
        if not trial.keep:
            base -= 1
            continue
        remove_layers(model, merge.merged)
        in_source = Merge(source[base], tuple(source[i] for i in merge.merged), settings.variant)
        accepted.append(Accepted(in_source, cosine))
        source = [layer for layer in source if layer not in in_source.merged]
        base = min(base - settings.interval, len(source) - group)
    return Collapse(tuple(accepted), sum(sequence.layer_forwards for sequence in calibration))


def merge_result(spec: ScoreSpec) -> ScoreResult:
    """Return the merges that remove `spec.num_remove` layers, all at once.

    A merged layer's score is the cosine at which its merge was accepted; the others have -1, the least.

    Raises:
        WorkError: merges above the threshold do not take away so many.
    """
    settings = spec.merge or MergeSpec()
    model, tokenizer = build_model(spec.model, places())
    sequences = calibration_sequences(
        load_texts(spec.calibration),
        tokenizer,
        spec.sequence_length,
        spec.max_sequences,
        repr(spec.calibration.name),
    )
    kept = spec.model.kept(depth(model.config) + len(spec.model.dropped))
    here = [sequence.to(model.device) for sequence in sequences]
    collapse = laco_compress(
        model, here, settings, min_layers=len(kept) - spec.num_remove, pooling=spec.pooling
    )
    cosine_of = {kept[i]: found.cosine for found in collapse.accepted for i in found.merge.merged}
    if len(cosine_of) < spec.num_remove:
        raise WorkError(
            f"laco: merges with a cosine above {settings.threshold:g} take away {len(cosine_of)} of the "
            f"{spec.num_remove} layers; lower scoring.merge.threshold or interval"
        )
    merges = [found.merge for found in collapse.accepted]
    return ScoreResult(
        source_layers=kept,
        scores=tuple(cosine_of.get(layer, -1.0) for layer in kept),
        removal_order=(*cosine_of, *(layer for layer in reversed(kept) if layer not in cosine_of)),
        num_sequences=len(sequences),
        num_tokens=sum(map(len, sequences)),
        layer_forwards=collapse.layer_forwards,
        merges=tuple(Merge(kept[m.base], tuple(kept[i] for i in m.merged), m.variant) for m in merges),
    )


@dataclass
class _Trial:
    keep: bool = False


@contextmanager
def _trial_merge(model: PreTrainedModel, merge: Merge) -> Iterator[_Trial]:
    """Merge the base block meanwhile; restore its weights afterwards unless the trial is kept."""
    trial, block = _Trial(), find_layers(model).modules[merge.base]
    before = [parameter.clone() for parameter in block.parameters()]
    merge_blocks(model, [merge])
    try:
        yield trial
    finally:
        if not trial.keep:
            for parameter, value in zip(block.parameters(), before, strict=True):
                parameter.copy_(value)


class _CalibrationSequence:
    """A sequence, the input of each block of the unmerged model for it, and that model's output."""

    def __init__(self, model: PreTrainedModel, sequence_T: Tensor):
        layerwise = LayerwisePass(model, sequence_T[None])
        self._sequence_T, self._received = sequence_T, [layerwise.hidden_BTD]
        for index in range(depth(model.config)):
            self._received.append(layerwise.block(index, self._received[-1]))
        self.layer_forwards = len(self._received) - 1
        self._unmerged_TD = layerwise.finish(self._received.pop())[0].float()

    def similarity(self, model: PreTrainedModel, merge: Merge, pooling: str) -> float:
        """Return the cosine of the last hidden states without the blocks of `merge`, the lowest so far."""
        layerwise = LayerwisePass(model, self._sequence_T[None])
        hidden = layerwise.block(merge.base, self._received[merge.base])
        for index in range(merge.merged[-1] + 1, depth(model.config)):
            hidden = layerwise.block(index, hidden)
        self.layer_forwards += depth(model.config) - merge.merged[-1]
        return POOLING[pooling](self._unmerged_TD, layerwise.finish(hidden).float()).item()
