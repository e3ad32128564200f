"""First-order change of the loss if a block's weights were zero, by backpropagation one block at a time.

Forward once without a graph, keeping what each block receives; then each block, from the last to the
first, is run again with a graph of its own. Gradients are added up over all sequences before their absolute
value is taken, and only one block's are ever held: so all sequences pass a block before the next one, on
the way there and on the way back, and a streamed model is read twice.

Shape letters: G sequences of one length, T tokens, K tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from actors.artifacts import cache_dir
from actors.errors import RequestError
from actors.models import LayerwisePass, depth, find_layers, resident, text_config
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.likelihood import tokens_at_once
from actors.scoring.measures.memory_budget import Group, costs_of, plan_waves
from actors.scoring.measures.passed_blocks import NO_BLOCK, layerwise_pass, take_hidden
from actors.scoring.measures.weights import matrices


def taylor(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return Σ_k Σ_ij |W_k,ij · ∂L/∂W_k,ij| of each block, L the mean loss of the sequences in nats. [S, N]

    All rows are alike. A sequence of a single token has no next token and is left out. What the blocks
    receive takes up to half of the memory budget, and what does not fit is on disk meanwhile.

    Raises:
        RequestError: every sequence is a single token; the budget cannot hold one sequence in a block.
    """
    sequences = [ids_T for ids_T in calibration.sequences if len(ids_T) > 1]
    if not sequences:
        raise RequestError("every calibration sequence is a single token, which has no next-token loss")
    budget, costs = calibration.budget(model), costs_of(model).with_gradients()
    waves = plan_waves([len(ids_T) for ids_T in sequences], (), costs, budget)
    groups = [group for wave in waves for group in wave.groups]
    num_layers = depth(model.config)
    scores_N = torch.zeros(num_layers, dtype=torch.float64)
    with _States(budget // 2) as states:
        batches = _forward(model, sequences, groups, states, calibration)
        for batch in batches:
            # The last hidden state gives way to the gradient by it.
            output_GTD = states.take(num_layers, batch.number)
            gradient_GTD = _loss_gradient(batch, output_GTD, budget) / len(sequences)
            states.keep(num_layers, batch.number, gradient_GTD)
        for index in reversed(range(num_layers)):
            with resident(model, index, then=index - 1 if index else NO_BLOCK):
                scores_N[index] = _change(find_layers(model).modules[index], index, batches, states)
            calibration.counter.layer_forwards += len(sequences)
    return scores_N.expand(len(calibration.sequences), -1)


@dataclass(frozen=True)
class _Batch:
    """Sequences of one length that pass the blocks together."""

    number: int
    layerwise: LayerwisePass
    targets_GT: Tensor


class _States(AbstractContextManager["_States"]):
    """States [G, T, D] between two blocks, by index of the block and number of the batch.

    Args:
        room: bytes in memory; what does not fit is in files of this node's cache.
    """

    def __init__(self, room: int):
        self._left = room
        self._states: dict[tuple[int, int], Tensor | torch.device] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def keep(self, index: int, number: int, state_GTD: Tensor) -> None:
        """Keep a state."""
        if state_GTD.nbytes <= self._left:
            self._left -= state_GTD.nbytes
            self._states[index, number] = state_GTD
            return
        self._states[index, number] = state_GTD.device
        try:
            torch.save(state_GTD.cpu(), self._file(index, number))
        except (OSError, RuntimeError) as error:
            raise RequestError(
                f"criterion 'taylor': what blocks receive does not fit into memory and cannot be written "
                f"to {str(cache_dir())!r} ({error}); raise scoring.memory_budget_gb, or set ITERABRE_CACHE"
            ) from error

    def look(self, index: int, number: int) -> Tensor:
        """Return a state, which stays."""
        state = self._states[index, number]
        if isinstance(state, Tensor):
            return state
        return torch.load(self._file(index, number), map_location=state)

    def take(self, index: int, number: int) -> Tensor:
        """Return a state and forget it."""
        state_GTD = self.look(index, number)
        if isinstance(self._states.pop((index, number)), Tensor):
            self._left += state_GTD.nbytes
        else:
            self._file(index, number).unlink()
        return state_GTD

    def _file(self, index: int, number: int) -> Path:
        if self._folder is None:
            cache_dir().mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(prefix="taylor-", dir=cache_dir())
        return Path(self._folder.name) / f"{index}-{number}.pt"

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            self._folder.cleanup()


@torch.no_grad()
def _forward(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    groups: Sequence[Group],
    states: _States,
    calibration: Calibration,
) -> list[_Batch]:
    """Take all groups through all blocks; keep what each block receives and the last one gives."""
    batches: list[_Batch] = []
    num_layers = depth(model.config)
    for index in range(num_layers):
        # The way back begins with the last block, which is not here any more by then.
        with resident(model, index, then=min(index + 1, num_layers - 1)):
            for number, group in enumerate(groups if index == 0 else ()):
                layerwise = layerwise_pass(model, sequences, group)
                targets_GT = torch.stack([sequences[i] for i in group.positions])
                batches.append(_Batch(number, layerwise, targets_GT))
                states.keep(0, number, take_hidden(layerwise))
            for batch in batches:
                hidden_GTD = states.look(index, batch.number)
                states.keep(index + 1, batch.number, batch.layerwise.block(index, hidden_GTD))
        calibration.counter.layer_forwards += len(sequences)
    return batches


@torch.enable_grad()
def _loss_gradient(batch: _Batch, output_GTD: Tensor, budget: int) -> Tensor:
    """Return the gradient of the sum of the mean losses by the output of the last block. [G, T, D]"""
    leaf_GTD = output_GTD.detach().requires_grad_()
    gradient_GTD = torch.zeros_like(leaf_GTD)
    num_rows, num_tokens = batch.targets_GT.shape
    # Logits have gradients, too.
    at_once = tokens_at_once(2 * num_rows, text_config(batch.layerwise.config).vocab_size, budget)
    for tokens_K in torch.arange(num_tokens - 1, device=batch.targets_GT.device).split(at_once):
        logits_GKV = batch.layerwise.logits(leaf_GTD, tokens_K).float()
        targets = batch.targets_GT[:, tokens_K + 1].flatten().to(logits_GKV.device)
        loss = cross_entropy(logits_GKV.flatten(0, 1), targets, reduction="sum") / (num_tokens - 1)
        gradient_GTD += torch.autograd.grad(loss, leaf_GTD)[0]
    return gradient_GTD


def _change(block: nn.Module, index: int, batches: Sequence[_Batch], states: _States) -> float:
    """Return Σ_k Σ_ij |W_k,ij · ∂L/∂W_k,ij| of a block; what it received gives way to the gradient by it."""
    weights = matrices(block)
    gradients = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        hidden_GTD = states.take(index, batch.number)
        upstream_GTD = states.take(index + 1, batch.number)
        downstream_GTD, *found = _backward(batch.layerwise, index, hidden_GTD, upstream_GTD, weights)
        states.keep(index, batch.number, downstream_GTD)
        for total, gradient in zip(gradients, found, strict=True):
            total += gradient
    return sum(_products(weights, gradients))


@torch.no_grad()
def _products(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterator[float]:
    for weight, gradient in zip(weights, gradients, strict=True):
        yield (weight.float() * gradient.float()).abs().sum(dtype=torch.float64).item()


@torch.enable_grad()
def _backward(
    layerwise: LayerwisePass,
    index: int,
    hidden_GTD: Tensor,
    upstream_GTD: Tensor,
    weights: Sequence[nn.Parameter],
) -> tuple[Tensor, ...]:
    """Return the gradients by the block's input and by `weights`; zero for an expert that saw no token."""
    leaf = hidden_GTD.detach().requires_grad_()
    # Weights of a model with folded adapters come frozen.
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        output = layerwise.block(index, leaf)
        upstream_GTD = upstream_GTD.to(output.device)
        return torch.autograd.grad(output, [leaf, *weights], upstream_GTD, materialize_grads=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
