"""Waves of sequences and candidates that go through the layers together within a memory budget.

Shape letters: S sequences, G sequences of one length, C candidates, T tokens, D hidden.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from actors.errors import RequestError
from actors.models import find_layers, text_config
from actors.models.families import experts_of
from actors.models.offloading.dispatch import input_device

GIB = 2**30

CPU_BUDGET = 4 * GIB
"""Bytes for hidden states on a CPU where nothing else is said."""

CHUNK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens that enter a block at one time: enough for matrix products at full rate, and few
enough that a CPU keeps what the block makes of them in its cache."""


@dataclass(frozen=True)
class Costs:
    """Bytes that hidden states take on their way through a model.

    Attributes:
        stream: of one token between two blocks.
        working: of one token inside a block.
        pair: of one pair of tokens inside a block; 0 where attention is never a matrix.
        chunk_tokens: tokens that enter a block at one time, at most.
    """

    stream: int
    working: int
    pair: int
    chunk_tokens: int

    def least(self, num_tokens: int) -> int:
        """Return the budget that one candidate needs on a sequence of so many tokens."""
        return 2 * max(2 * num_tokens * self.stream, self.row(num_tokens))

    def row(self, num_tokens: int) -> int:
        """Return the bytes of one sequence inside a block."""
        return num_tokens * (self.working + num_tokens * self.pair)

    def of_streams(self, count: int) -> "Costs":
        """Return the costs where of every sequence so many states are kept between two blocks."""
        return replace(self, stream=count * self.stream)

    def with_gradients(self) -> "Costs":
        """Return the costs where a block is passed back, too: what it makes is kept, and gets a gradient."""
        return replace(self, working=2 * self.working, pair=2 * self.pair)


@dataclass(frozen=True)
class Group:
    """Sequences of one length that advance together, `rows` at a time: sequences × streams."""

    positions: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Wave:
    """Groups that pass through the layers side by side, carrying the same candidates."""

    groups: tuple[Group, ...]
    candidates: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of all its sequences."""
        return tuple(position for group in self.groups for position in group.positions)


def costs_of(model: PreTrainedModel) -> Costs:
    """Return the cost of a token in `model`, from the shapes of its largest block's weights.

    Inside a block, the results of the matrix products exist at the same time as those of
    the norms, rotations and activations: twice their width is more than families of
    blocks were seen to need. Of experts, those that a token passes count.
    """
    blocks = find_layers(model).modules
    config = text_config(model.config)
    widths = [_width(block, config) for block in blocks]
    itemsize = model.dtype.itemsize
    is_matrix = getattr(config, "_attn_implementation", "eager") == "eager"
    # Scores, mask added, and their softmax in float32.
    pair = config.num_attention_heads * (itemsize + 8) if is_matrix else 0
    chunk_tokens = CHUNK_TOKENS.get(input_device(model).type, CHUNK_TOKENS["cuda"])
    return Costs(config.hidden_size * itemsize, 2 * max(widths) * itemsize, pair, chunk_tokens)


def _width(block: nn.Module, config: PretrainedConfig) -> int:
    """Return how many numbers the matrix products of a block make of a token, and its norms."""
    num_experts, num_passed = experts_of(config) or (1, 1)
    dense, routed = 4 * config.hidden_size, 0
    for name, weight in block.named_parameters():
        if weight.ndim < 2:
            continue
        joined = weight.ndim == 3 and weight.shape[0] == num_experts > 1
        if joined:
            # One matrix an expert, which some families multiply from the left.
            routed += num_experts * max(weight.shape[1:])
        elif "experts" in name.split("."):
            routed += weight.numel() // weight.shape[-1]
        else:
            dense += weight.numel() // weight.shape[-1]
    if not routed:
        return dense
    # The token is copied for each expert, and chosen from a mask of 8 bytes for each choice and expert.
    copies = num_passed * (config.hidden_size + 4 * num_experts)
    return dense + -(-routed * num_passed // num_experts) + copies


def plan_waves(lengths: Sequence[int], candidates: Sequence[int], costs: Costs, budget: int) -> list[Wave]:
    """Divide [S] sequences × [C] candidates into waves whose hidden states fit into `budget` bytes.

    Half of the budget holds the streams, half what a block makes of the rows it
    is given. There is one wave if all fits; more sequences make more waves; only
    if a single sequence with all candidates does not fit are the candidates
    divided too, and the unpruned stream then passes once for each portion.

    Raises:
        RequestError: the budget cannot hold the longest sequence and one candidate.
    """
    available, longest = budget // 2, max(lengths)
    fits = available // (longest * costs.stream) - 1
    if fits < min(1, len(candidates)) or costs.row(longest) > available:
        needed = costs.least(longest) / GIB
        raise RequestError(
            f"a memory budget of {budget / GIB:.3g} GiB is too small for {longest} tokens; "
            f"it needs {needed:.3g}. Raise scoring.memory_budget_gb or lower scoring.sequence_length"
        )
    by_length: dict[int, list[int]] = defaultdict(list)
    for position, length in enumerate(lengths):
        by_length[length].append(position)
    groups = []
    for length in sorted(by_length, reverse=True):
        # As many sequences as enter a block at one time.
        rows = max(1, min(costs.chunk_tokens // length, available // costs.row(length)))
        alike = by_length[length]
        groups += [Group(tuple(alike[at : at + rows]), rows) for at in range(0, len(alike), rows)]
    # One portion also where there are no candidates: the unpruned stream alone.
    portions = [tuple(candidates[at : at + fits]) for at in range(0, len(candidates), max(1, fits))] or [()]
    return [
        Wave(tuple(part), portion)
        for portion in portions
        for part in _packed(groups, lengths, (1 + len(portion)) * costs.stream, available)
    ]


def _packed(
    groups: Sequence[Group], lengths: Sequence[int], bytes_per_token: int, available: int
) -> Iterator[list[Group]]:
    """Yield groups in order, as many together as fit; divide one that is too large."""
    part: list[Group] = []
    taken = 0
    for group in groups:
        each = lengths[group.positions[0]] * bytes_per_token
        size = max(1, min(len(group.positions), available // each))
        for start in range(0, len(group.positions), size):
            positions = group.positions[start : start + size]
            if part and taken + len(positions) * each > available:
                yield part
                part, taken = [], 0
            part.append(Group(positions, group.rows))
            taken += len(positions) * each
    yield part


def default_budget(device: torch.device) -> int:
    """Return half of the accelerator's free memory; on a CPU, which other processes share, a fixed size."""
    if device.type != "cuda":
        return CPU_BUDGET
    return torch.cuda.mem_get_info(device)[0] // 2
