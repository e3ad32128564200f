"""Requests and results of teaching: what the unpruned model says of the recovery's data, stored once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSpec
from actors.contracts.models import DTYPE_BYTES, Dtype, ModelRef, ModelSpec
from actors.contracts.recovery import RecoverySpec
from actors.contracts.settings import NotInKey

LOG_PROBABILITIES_DTYPE: Dtype = "float16"
"""Type of stored log-probabilities: relative rounding of 2^-11, and none of them is near its limits."""

TOKEN_ID_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TeachSpec:
    """Run `model`, the teacher, over the training data of recoveries, and store what they learn from.

    Nothing in it depends on what was pruned or on how a recovery trains, so iterations, methods, targets,
    seeds and campaigns share one.

    Attributes:
        packing, sequence_length, special_tokens: those of the recoveries: they decide what a token sees.
        precision: type of the computation.
        states: type of the stored hidden states.
        top_k: store log-probabilities of so many tokens instead of the last hidden state.
        entering: source indices of blocks; the hidden states that enter them are stored, too.
        max_tokens, seed: the part of a stream that is read, and its order; None and 0 for data that
            are read whole.
        batch_size: sequences that are computed at a time.
        max_gb: what the states may take; more is refused.
    """

    model: ModelSpec
    data: TextSpec
    packing: Literal["concatenated", "documents"] = "concatenated"
    sequence_length: int = 512
    special_tokens: bool = False
    precision: Dtype = "float32"
    states: Dtype = "bfloat16"
    top_k: int | None = None
    entering: tuple[int, ...] = ()
    max_tokens: int | None = None
    seed: int = 0
    batch_size: Annotated[int, NotInKey()] = 4
    max_gb: Annotated[float | None, NotInKey()] = None

    def reading(self) -> RecoverySpec:
        """Return a recovery that reads the same training data."""
        return RecoverySpec(
            model=ModelRef(self.model),
            data=self.data,
            packing=self.packing,
            sequence_length=self.sequence_length,
            special_tokens=self.special_tokens,
            batch_size=1,
            max_tokens=self.max_tokens or 1,
            seed=self.seed,
        )

    def bytes_per_token(self, hidden_size: int) -> int:
        """Return what is stored of each token, its id included."""
        each = DTYPE_BYTES[self.states] * hidden_size
        if self.top_k is None:
            last = each
        else:
            last = self.top_k * (TOKEN_ID_BYTES + DTYPE_BYTES[LOG_PROBABILITIES_DTYPE])
        return TOKEN_ID_BYTES + last + len(self.entering) * each


@dataclass(frozen=True)
class TeachResult:
    """What the teacher said of every token, as an artifact of safetensors files (`actors.data`)."""

    artifact: ArtifactRef
    num_sequences: int
    num_tokens: int
    num_bytes: int
