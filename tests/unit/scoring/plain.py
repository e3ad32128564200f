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


@torch.no_grad()
def kl(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: Sequence[Tensor], _: int
) -> list[float]:
    """Over the whole vocabulary at every token, in nats; tokens count alike whatever sequence they are in."""
    scores = []
    for layer in range(len(blocks_of(model))):
        nats = []
        for ids_T in sequences:
            wanted = reference(ids_T[None], use_cache=False).logits[0].double().softmax(-1).tolist()
            with skipped(model, [layer]):
                given = model(ids_T[None], use_cache=False).logits[0].double().softmax(-1).tolist()
            for p, q in zip(wanted, given, strict=True):
                nats.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        scores.append(mean(nats))
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


def _ridge_map(entering: list[Tensor], leaving: list[Tensor]) -> Tensor:
    """The best A of x (1 + A) = y over tokens with ‖y‖ = 1: least squares of rows with those of α 1 below."""
    x_ND = torch.stack([x / y.norm() for x, y in zip(entering, leaving, strict=True)])
    y_ND = torch.stack([y / y.norm() for y in leaving])
    size = x_ND.shape[1]
    alpha = 0.1 * x_ND.square().sum() / size
    penalty_DD = alpha.sqrt() * torch.eye(size, dtype=x_ND.dtype)
    padded = torch.cat([y_ND - x_ND, torch.zeros_like(penalty_DD)])
    return torch.linalg.lstsq(torch.cat([x_ND, penalty_DD]), padded, driver="gelsd").solution


def bridge_residual(
    model: PreTrainedModel, _reference: PreTrainedModel, sequences: Sequence[Tensor], num_remove: int
) -> list[float]:
    """Share of the squared norm that a linear map misses, fitted to every other sequence."""
    streams = [[point.double() for point in residual_stream(model, ids_T)] for ids_T in sequences]
    scores = []
    for first in range(len(blocks_of(model)) - num_remove + 1):
        missed = []
        for fitted, judged in ((streams[0::2], streams[1::2]), (streams[1::2], streams[0::2])):
            entering = [token for points in fitted for token in points[first]]
            leaving = [token for points in fitted for token in points[first + num_remove]]
            map_DD = _ridge_map(entering, leaving)
            for points in judged:
                for x, y in zip(points[first], points[first + num_remove], strict=True):
                    missed.append(((x + x @ map_DD - y).norm() / y.norm()).item() ** 2)
        scores.append(mean(missed))
    return scores + [max(1.0, *scores)] * (num_remove - 1)


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
    "kl": (kl, False),
    "block_influence": (block_influence, False),
    "angular_block": (angular_block, False),
    "bridge_residual": (bridge_residual, False),
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
        if criterion in ("angular_block", "bridge_residual"):
            first = min(range(len(left) - portion + 1), key=lambda i: scores[i])
            chosen = list(range(first, first + portion))
        else:
            chosen = sorted(range(len(left)), key=lambda i: -scores[i] if highest_first else scores[i])
            chosen = chosen[:portion]
        removed.append([left[i] for i in chosen])
        remove_layers(current, chosen)
        left = [layer for i, layer in enumerate(left) if i not in chosen]
    return removed
