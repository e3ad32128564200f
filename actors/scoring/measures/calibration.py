"""The input of a measure, and its signature."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import depth
from actors.models.offloading.dispatch import input_device
from actors.scoring.measures.kept_streams import KeptStreams
from actors.scoring.measures.memory_budget import costs_of, default_budget, plan_waves
from actors.scoring.measures.passed_blocks import PassedBlock, passed_blocks
from actors.scoring.measures.reference import Reference
from actors.scoring.measures.wavefront import FinalStates, ForwardCounter, Wave, wavefront, waves


@dataclass(frozen=True)
class Calibration:
    """The input of a measure.

    Attributes:
        sequences: token ids [T] of each calibration sequence; lengths differ.
        reference: the model whose output is to be kept, and its last hidden states.
        pooling: how a sequence's tokens become one similarity, see `POOLING`.
        seed: for criteria that draw.
        num_remove: layers that will go together, for criteria that choose a run of them.
        candidates: the layers to score, ascending (None: all); for criteria that score `by_candidate`.
        memory_budget: bytes that hidden states may take (None: as is usual on the device).
        counter: counts the passes of blocks, also of measures that pass them in ways of their own.
        kept: the scored model's own stream of earlier calls, for those that come (None: nothing is kept).
    """

    sequences: Sequence[Tensor]
    reference: Reference = field(default_factory=Reference)
    pooling: str = "flatten"
    seed: int = 0
    num_remove: int = 1
    candidates: Sequence[int] | None = None
    memory_budget: int | None = None
    counter: ForwardCounter = field(default_factory=ForwardCounter)
    kept: KeptStreams | None = None

    def waves(self, model: PreTrainedModel) -> list[Wave]:
        """Divide the sequences and candidates into portions that keep the memory budget."""
        return waves(model, self.sequences, self.candidates, self.memory_budget)

    def final_states(
        self, model: PreTrainedModel, wave: Wave, *, keep_unpruned: bool
    ) -> Iterator[FinalStates]:
        """Yield the candidates of `wave` after the last block; see `wavefront`."""
        return wavefront(
            model,
            self.sequences,
            wave,
            keep_unpruned=keep_unpruned,
            counter=self.counter,
            kept=self.kept,
        )

    def budget(self, model: PreTrainedModel) -> int:
        """Return the bytes that hidden states may take."""
        return self.memory_budget or default_budget(input_device(model))

    def passed_blocks(
        self,
        model: PreTrainedModel,
        *,
        budget: int | None = None,
        streams: int = 1,
        num_blocks: int | None = None,
    ) -> Iterator[PassedBlock]:
        """Yield the sequences after each of the first `num_blocks` blocks; see `passed_blocks`.

        Args:
            model: the scored one.
            budget: bytes, if not all that hidden states may take.
            streams: how many points of the stream of a sequence are kept at one time.
            num_blocks: all, if None.
        """
        costs, lengths = costs_of(model).of_streams(streams), [len(ids_T) for ids_T in self.sequences]
        planned = plan_waves(lengths, (), costs, budget or self.budget(model))
        return passed_blocks(model, self.sequences, planned, self.counter, num_blocks)

    def num_runs(self, model: PreTrainedModel) -> int:
        """Return how many runs of `num_remove` blocks there are, and so at how many layers one begins.

        Raises:
            RequestError: there is none.
        """
        num_layers = depth(model.config)
        if not 1 <= self.num_remove <= num_layers:
            raise RequestError(f"no run of {self.num_remove} blocks in a model of {num_layers}")
        return num_layers - self.num_remove + 1

    def no_rows(self, model: PreTrainedModel) -> Tensor:
        """Return rows for every sequence and layer, nothing scored yet: [S, N] of NaN, float64."""
        return torch.full((len(self.sequences), depth(model.config)), torch.nan, dtype=torch.float64)


Measure = Callable[[PreTrainedModel, Calibration], Tensor]
"""Returns one row of scores for each calibration sequence, [S, N]; or [1, N] where sequences do not matter.

A layer's score is the mean over sequences, so any division of the sequences over
processes gives the same scores.
"""
