"""All candidate removals in one pass through the layers (docs/architecture.md, Scoring).

At layer j the batch holds the unpruned stream and one stream for every candidate
i < j, which left it when its layer was skipped. Candidate j joins after layer j
with the unpruned *input* of layer j. A candidate's shared prefix is therefore
never computed again: N(N+1)/2 layer-forwards instead of N².

Sequences of one length share a batch and nothing is padded. All of them pass a
layer before the next layer begins, so that its weights are read once.

The unpruned stream of sequences that come again, for other candidates, may be kept
(`KeptStreams`): candidates then join with what is kept, and layers before the
first of them are not passed.

Shape letters: G sequences of one length, C candidates, B rows, T tokens, D hidden.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.models import LayerwisePass, depth, resident
from actors.models.offloading.dispatch import input_device
from actors.scoring.measures.kept_streams import KeptStreams, name_of
from actors.scoring.measures.memory_budget import Group, Wave, costs_of, default_budget, plan_waves

UNPRUNED = -1
"""Stands for the unpruned stream where others are named by the layer they are without."""


@dataclass
class ForwardCounter:
    """Counts how many times a sequence passed a block."""

    layer_forwards: int = 0


@dataclass(frozen=True)
class FinalStates:
    """Rows that have left the last block.

    Attributes:
        layerwise: applies the family's final norm and head.
        streams: what the rows are without: a layer's index, or `UNPRUNED`.
        positions: sequences of each stream, by position.
        hidden_BTD: output of the last block; B = streams × positions, stream by stream.
    """

    layerwise: LayerwisePass
    streams: tuple[int, ...]
    positions: tuple[int, ...]
    hidden_BTD: Tensor

    def last_hidden(self) -> Tensor:
        """Return the last hidden states after the final norm: [streams, positions, T, D]."""
        hidden = self.layerwise.finish(self.hidden_BTD)
        return hidden.unflatten(0, (len(self.streams), len(self.positions)))


class _Streams:
    """The streams of one group of sequences; they are stored in one buffer and advance in place."""

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Tensor],
        group: Group,
        candidates: Sequence[int],
        keep_unpruned: bool,
        kept: KeptStreams,
    ):
        self._model, self._group = model, group
        ids_GT = torch.stack([sequences[i] for i in group.positions]).to(input_device(model))
        self._ids_GT, self._names = ids_GT, [name_of(sequences[i]) for i in group.positions]
        self._candidates, self._kept = candidates, kept
        self._unpruned_until = depth(model.config) if keep_unpruned else max(candidates, default=0)
        self._at_once = max(1, group.rows // len(group.positions))
        self._passes: dict[int, LayerwisePass] = {}
        entering_GTD = LayerwisePass(model, ids_GT).hidden_BTD
        self._hidden_SGTD = entering_GTD.new_empty(1 + len(candidates), *entering_GTD.shape)
        kept.keep(self._names, 0, entering_GTD)
        # What enters blocks up to this one need not be computed.
        self._known_until = min(max(0, kept.known(self._names) - 1), self._unpruned_until)
        if self._known_until:
            entering_GTD = kept.entering(self._names, self._known_until)
        self._hidden_SGTD[0] = entering_GTD

    def passes(self, index: int) -> bool:
        """Return whether any stream has something to do with block `index`."""
        return self._known_until <= index < self._unpruned_until or any(
            candidate <= index for candidate in self._candidates[:1]
        )

    def advance(self, index: int, counter: ForwardCounter) -> None:
        """Take every active stream through block `index`."""
        active = 1 + bisect_left(self._candidates, index)
        if index in self._candidates:
            # Candidate `index` leaves its layer with what entered it.
            known = index < self._known_until
            entering_GTD = self._kept.entering(self._names, index) if known else self._hidden_SGTD[0]
            self._hidden_SGTD[active] = entering_GTD
        first = 0 if self._known_until <= index < self._unpruned_until else 1
        for start, stop in self._chunks(first, active):
            rows_BTD = self._hidden_SGTD[start:stop].flatten(0, 1)
            rows_BTD.copy_(self._pass_over(stop - start).block(index, rows_BTD))
            counter.layer_forwards += len(rows_BTD)
        if first == 0:
            self._kept.keep(self._names, index + 1, self._hidden_SGTD[0])

    def final_states(self) -> Iterator[FinalStates]:
        """Yield the streams after the last block, the unpruned one first if it was kept."""
        names = (UNPRUNED, *self._candidates)
        first = 0 if self._unpruned_until == depth(self._model.config) else 1
        for start, stop in self._chunks(first, len(names)):
            rows_BTD = self._hidden_SGTD[start:stop].flatten(0, 1)
            layerwise = self._pass_over(stop - start)
            yield FinalStates(layerwise, names[start:stop], self._group.positions, rows_BTD)

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return ((at, min(at + self._at_once, stop)) for at in range(start, stop, self._at_once))

    def _pass_over(self, num_streams: int) -> LayerwisePass:
        """Return the pass that calls blocks with so many streams; it is kept for one and for a full chunk."""
        if num_streams in self._passes:
            return self._passes[num_streams]
        layerwise = LayerwisePass(self._model, self._ids_GT.repeat(num_streams, 1))
        # What enters the first block is not needed again, and would be kept for every group.
        layerwise.hidden_BTD = layerwise.hidden_BTD.new_empty(0)
        if num_streams in (1, self._at_once):
            self._passes[num_streams] = layerwise
        return layerwise


@torch.no_grad()
def wavefront(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    wave: Wave,
    *,
    keep_unpruned: bool,
    counter: ForwardCounter,
    kept: KeptStreams | None = None,
) -> Iterator[FinalStates]:
    """Yield the unpruned model's and its candidates' final states for the sequences of one wave.

    Args:
        model: a decoder language model of N blocks; its weights may be streamed.
        sequences: token ids [T] of every sequence that the wave's positions refer to.
        wave: which sequences and which candidates (ascending).
        keep_unpruned: take the unpruned stream to the end and yield it, before the group's candidates.
        kept: the unpruned streams of earlier waves, and where this one's are kept.
    """
    active: list[_Streams] = []
    kept = kept or KeptStreams(0, 0)
    for index in range(depth(model.config)):
        if index and not any(streams.passes(index) for streams in active):
            continue
        with resident(model, index):
            if index == 0:
                # The first pass over a family looks into its first block, so the block must be there.
                active = [
                    _Streams(model, sequences, group, wave.candidates, keep_unpruned, kept)
                    for group in wave.groups
                ]
            for streams in active:
                streams.advance(index, counter)
    while active:
        yield from active.pop(0).final_states()


def waves(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    candidates: Sequence[int] | None = None,
    budget: int | None = None,
) -> list[Wave]:
    """Divide the sequences and candidates (all layers, if None) to keep a memory budget in bytes."""
    if candidates is None:
        candidates = range(depth(model.config))
    if budget is None:
        budget = default_budget(input_device(model))
    return plan_waves([len(sequence) for sequence in sequences], candidates, costs_of(model), budget)


@torch.no_grad()
def last_hiddens(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    budget: int | None = None,
    counter: ForwardCounter | None = None,
    kept: KeptStreams | None = None,
) -> list[Tensor]:
    """Return each sequence's last hidden state [T, D] after the final norm; the LM head is not run."""
    counter = counter or ForwardCounter()
    found: dict[int, Tensor] = {}
    for wave in waves(model, sequences, (), budget):
        for states in wavefront(model, sequences, wave, keep_unpruned=True, counter=counter, kept=kept):
            found.update(zip(states.positions, states.last_hidden()[0], strict=True))
    return [found[position] for position in range(len(sequences))]


def layer_forwards(num_layers: int, num_sequences: int) -> int:
    """Return how many times a sequence passes a block over all sequences and candidates, undivided."""
    return num_sequences * num_layers * (num_layers + 1) // 2
