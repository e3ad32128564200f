"""What a teacher says of training data, in files: written a shard of sequences at a time, read by batches.

A shard is a safetensors file over the N tokens of some sequences, end to end:

    tokens [N]                      token ids, so that states are never read for other text
    hidden [N, D]                   the teacher's last hidden state after the final norm
    entering.BLOCK [N, D]           the hidden state that enters a block of the teacher, if it was wanted
    topk_ids [N, K]                 in place of `hidden`: the most likely next tokens, likeliest first
    topk_log_probabilities [N, K]   theirs

Files are mapped, not read: a batch costs what its own tokens take, whatever the size of all.
Shape letters: S sequences of a data set, B sequences of a batch, T tokens, D hidden, K most likely tokens.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import LongTensor, Tensor

from actors.artifacts import fetch
from actors.contracts import ArtifactRef, RowCounts
from actors.data.batches import TokenBatch, TopK, TrainingData
from actors.errors import WorkError

INDEX = "index.json"
TOKENS, HIDDEN, TOP_IDS, TOP_LOG_PROBABILITIES = "tokens", "hidden", "topk_ids", "topk_log_probabilities"


def entering(block: int) -> str:
    """Return the name of the hidden states that enter a block of the teacher."""
    return f"entering.{block}"


def shard_file(number: int) -> str:
    """Return the name of a shard's file."""
    return f"states-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard's tensors, each over its tokens end to end."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_index(path: Path, num_sequences: int, num_tokens: int, firsts: Sequence[int]) -> None:
    """Write which sequences lie where; shard i begins with sequence `firsts[i]`."""
    index = {"sequences": num_sequences, "tokens": num_tokens, "firsts": list(firsts)}
    path.write_text(json.dumps(index), encoding="utf-8")


class TeacherStates:
    """The stored states of all sequences of some training data.

    Args:
        directory: holds the shards and their index.
        lengths_S: tokens of each sequence, as the training data has them.

    Raises:
        WorkError: the states are of other data.
    """

    def __init__(self, directory: Path, lengths_S: Tensor):
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        found = len(lengths_S), int(lengths_S.sum())
        if (index["sequences"], index["tokens"]) != found:
            raise _of_other_data(
                f"they hold {index['sequences']} sequences of {index['tokens']} tokens, the data "
                f"{found[0]} of {found[1]}"
            )
        self._directory, self._firsts = directory, index["firsts"]
        self._lengths = lengths_S.tolist()
        self._starts = [0, *lengths_S.cumsum(0).tolist()]
        self._shards: dict[int, Any] = {}
        self.names = frozenset(self._shard(0).keys())

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def gather(self, name: str, chosen_B: LongTensor, num_tokens: int) -> Tensor:
        """Return one tensor of those sequences [B, T, ...], zero where a sequence has no token."""
        parts = [self._of_sequence(name, sequence) for sequence in chosen_B.tolist()]
        gathered = parts[0].new_zeros(len(parts), num_tokens, *parts[0].shape[1:])
        for row, part in zip(gathered, parts, strict=True):
            row[: len(part)] = part
        return gathered

    def check_tokens(self, batch: TokenBatch, chosen_B: LongTensor) -> None:
        """Compare the token ids of a batch with those that the states are of.

        Raises:
            WorkError: they differ.
        """
        tokens_BT = self.gather(TOKENS, chosen_B, batch.input_ids_BT.shape[1])
        ids_BT = batch.input_ids_BT if batch.mask_BT is None else batch.input_ids_BT * batch.mask_BT
        if not torch.equal(tokens_BT.long(), ids_BT.long()):
            raise _of_other_data(f"the tokens of sequences {chosen_B.tolist()} differ")

    def _of_sequence(self, name: str, sequence: int) -> Tensor:
        number = bisect_right(self._firsts, sequence) - 1
        start = self._starts[sequence] - self._starts[self._firsts[number]]
        part: Tensor = self._shard(number).get_slice(name)[start : start + self._lengths[sequence]]
        return part

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(self._directory / shard_file(number), framework="pt")
        return self._shards[number]


@dataclass(frozen=True)
class TaughtData:
    """Training data, each batch of which has what the teacher said of it.

    Attributes:
        block: the block of the teacher whose stored input is `entering_BTD`; None where none is.
    """

    data: TrainingData
    states: TeacherStates
    block: int | None = None

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths_S(self) -> Tensor:
        return self.data.lengths_S

    @property
    def largest_id(self) -> int:
        return self.data.largest_id

    @property
    def rows(self) -> RowCounts:
        return self.data.rows

    def num_tokens(self, chosen_B: LongTensor) -> int:
        return self.data.num_tokens(chosen_B)

    def batch(self, chosen_B: LongTensor) -> TokenBatch:
        """Return those sequences as one batch, with the teacher's states.

        Raises:
            WorkError: the states are of other tokens.
        """
        batch, states = self.data.batch(chosen_B), self.states
        states.check_tokens(batch, chosen_B)
        gather = partial(states.gather, chosen_B=chosen_B, num_tokens=batch.input_ids_BT.shape[1])
        more: dict[str, Any] = {}
        if HIDDEN in states:
            more["teacher_BTD"] = gather(HIDDEN)
        if TOP_IDS in states:
            more["teacher_topk"] = TopK(gather(TOP_IDS).long(), gather(TOP_LOG_PROBABILITIES).float())
        if self.block is not None:
            more["entering_BTD"] = gather(entering(self.block))
        return replace(batch, **more)


def with_teacher_states(data: TrainingData, states: ArtifactRef, block: int | None = None) -> TaughtData:
    """Return training data with the states that a stage `teach` stored of them, on this node's disk.

    Args:
        block: the block of the teacher whose input is wanted, if it was stored.

    Raises:
        WorkError: the states cannot be had, or are of other data.
    """
    stored = TeacherStates(fetch(states, remember=True), data.lengths_S)
    return TaughtData(data, stored, block if block is not None and entering(block) in stored else None)


def _of_other_data(how: str) -> WorkError:
    return WorkError(
        f"the stored states of the teacher are of other data: {how}; set recovery.teacher_cache: off, or "
        "delete the stage `teach`, so that it is computed again"
    )
