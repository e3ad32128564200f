"""Every criterion once more, slowly and obviously: whole models, plain loops, Python floats.

Shared by the tests of single scorings and of schedules. Each takes the model, the
unpruned reference, the sequences and how many layers go together, and returns one
score a layer.
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.models import remove_layers
from tests.support.tiny_models import blocks_of, skipped

Plain = Callable[[PreTrainedModel, PreTrainedModel, Sequence[Tensor], int], list[float]]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


@torch.no_grad()
def last_hidden(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """After the final norm. [T, D]"""
    return model(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]


@torch.no_grad()
def residual_stream(model: PreTrainedModel, ids_T: Tensor) -> list[Tensor]:
    """What each block receives, and what the last gives: N+1 tensors [T, D]."""
    given: list[Tensor] = []

    def note(_block: nn.Module, _inputs: object, output: Tensor) -> None:
        given.append(output[0] if isinstance(output, tuple) else output)

    # The last of the model's own hidden states is after the final norm, so that one is noted here.
    hook = blocks_of(model)[-1].register_forward_hook(note)
    states = model(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    return [state[0] for state in (*states[:-1], given.pop())]


def hidden_cosine(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: Sequence[Tensor], _: int
) -> list[float]:
    scores = []
    for layer in range(len(blocks_of(model))):
        similarities = []
        for ids_T in sequences:
            want = last_hidden(reference, ids_T).flatten().tolist()
            with skipped(model, [layer]):
                similarities.append(cosine(want, last_hidden(model, ids_T).flatten().tolist()))
        scores.append(mean(similarities))
    return scores


def block_influence(
    model: PreTrainedModel, _reference: PreTrainedModel, sequences: Sequence[Tensor], _: int
) -> list[float]:
    rows = []
    for ids_T in sequences:
        points = [point.tolist() for point in residual_stream(model, ids_T)]
        rows.append([1 - mean(map(cosine, before, after)) for before, after in pairwise(points)])
    return [mean(column) for column in zip(*rows, strict=True)]


def angular_block(
    model: PreTrainedModel, _reference: PreTrainedModel, sequences: Sequence[Tensor], num_remove: int
) -> list[float]:
    """arccos of the cosine of the last token before block i and after block i + n - 1, over π."""
    num_layers = len(blocks_of(model))
    scores = []
    for first in range(num_layers):
        if first + num_remove > num_layers:
            scores.append(1.0)
            continue
        angles = []
        for ids_T in sequences:
            points = residual_stream(model, ids_T)
            before, after = points[first][-1].tolist(), points[first + num_remove][-1].tolist()
            angles.append(math.acos(min(1.0, cosine(before, after))) / math.pi)
        scores.append(mean(angles))
    return scores


def taylor(
    model: PreTrainedModel, _reference: PreTrainedModel, sequences: Sequence[Tensor], _: int
) -> list[float]:
    """One ordinary backward pass through the whole model, all gradients held."""
    model = copy.deepcopy(model).requires_grad_(True)
    losses = [model(ids_T[None], labels=ids_T[None], use_cache=False).loss for ids_T in sequences]
    torch.stack(losses).mean().backward()
    return [
        math.fsum(
            (weight * weight.grad).abs().double().sum().item()
            for name, weight in block.named_parameters()
            if "norm" not in name and "ln_" not in name and not name.endswith("bias")
        )
        for block in blocks_of(model)
    ]


def _weights(block: nn.Module) -> list[list[float]]:
    """Every linear layer's weights as one list of numbers."""
    linear = [m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return [module.weight.flatten().tolist() for module in linear]


def magnitude_l1(
    model: PreTrainedModel, _reference: PreTrainedModel, _sequences: Sequence[Tensor], _: int
) -> list[float]:
    return [math.fsum(abs(w) for weight in _weights(block) for w in weight) for block in blocks_of(model)]


def magnitude_l2(
    model: PreTrainedModel, _reference: PreTrainedModel, _sequences: Sequence[Tensor], _: int
) -> list[float]:
    return [
        math.fsum(math.sqrt(math.fsum(w * w for w in weight)) for weight in _weights(block))
        for block in blocks_of(model)
    ]


def deepest(
    model: PreTrainedModel, _reference: PreTrainedModel, _sequences: Sequence[Tensor], _: int
) -> list[float]:
    last = len(blocks_of(model)) - 1
    return [-1.0 if layer == last else float(layer) for layer in range(last + 1)]


def reverse(
    model: PreTrainedModel, _reference: PreTrainedModel, _sequences: Sequence[Tensor], _: int
) -> list[float]:
    return [float(layer) for layer in range(len(blocks_of(model)))]


def random(
    model: PreTrainedModel, _reference: PreTrainedModel, _sequences: Sequence[Tensor], _: int
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, generator=generator).item() for _ in blocks_of(model)]


PLAIN: dict[str, tuple[Plain, bool]] = {
    "hidden_cosine": (hidden_cosine, True),
    "block_influence": (block_influence, False),
    "angular_block": (angular_block, False),
    "deepest": (deepest, True),
    "reverse": (reverse, True),
    "taylor": (taylor, False),
    "magnitude_l1": (magnitude_l1, False),
    "magnitude_l2": (magnitude_l2, False),
    "random": (random, True),
}
"""The function, and whether the layer of the highest score goes first."""


def plain_removal(
    criterion: str, model: PreTrainedModel, sequences: Sequence[Tensor], portions: Sequence[int]
) -> list[list[int]]:
    """Source layers removed in each portion, scored anew before each of them."""
    score, highest_first = PLAIN[criterion]
    current, left = copy.deepcopy(model), list(range(len(blocks_of(model))))
    removed = []
    for portion in portions:
        scores = score(current, model, sequences, portion)
        if criterion == "angular_block":
            first = min(range(len(left) - portion + 1), key=lambda i: scores[i])
            chosen = list(range(first, first + portion))
        else:
            chosen = sorted(range(len(left)), key=lambda i: -scores[i] if highest_first else scores[i])
            chosen = chosen[:portion]
        removed.append([left[i] for i in chosen])
        remove_layers(current, chosen)
        left = [layer for i, layer in enumerate(left) if i not in chosen]
    return removed
