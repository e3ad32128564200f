"""A linear bridge over removed blocks, in closed form (ReplaceMe, arXiv 2505.02819 §2.2, Eq. 5 to 7).

For removed blocks i+1..i+n, with M the output of the MLP of block i, Y what it is
added to, and L the unpruned model's hidden state after block i+n:

    T = argmin ‖M T + Y − L‖² + α ‖T − 1‖²  =  (MᵀM + α 1)⁻¹ (Mᵀ(L − Y) + α 1)

T goes into the last linear layer of that MLP, so the pruned model has no more
weights than before. α is tiny and only keeps directions that the tokens never
took as they were. Every run of removed blocks has a bridge of its own, found from
the first to the last: M and Y come from the student as it is by then, bridges
before and adapters included, so that later ones make up for what earlier ones miss.

N tokens, D hidden size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.contracts import Progress, RecoverySpec, no_progress
from actors.data import TokenBatch, TrainingData
from actors.errors import RequestError
from actors.models import (
    LayerwisePass,
    add_deltas,
    build_model,
    depth,
    device,
    find_layers,
    load_source,
    read_deltas,
    read_weights,
)
from actors.recovery.distillation.student import layerwise_pass

RIDGE = 1e-8
"""α over the mean of MᵀM's diagonal."""

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Bridge:
    """The student's block that a bridge is folded into, and the last of the removed blocks it replaces."""

    student_block: int
    last_removed: int


@dataclass(frozen=True)
class Solution:
    """Tensors in the place of the source's, by source name, and the tokens they were found on."""

    tensors: dict[str, Tensor]
    tokens: int


class NormalEquations:
    """MᵀM and MᵀR of a least-squares problem min ‖M T − R‖, summed in float64 over portions of rows."""

    def __init__(self, size: int, where: torch.device):
        self.gram_DD = torch.zeros(size, size, dtype=torch.float64, device=where)
        self.moment_DD = torch.zeros_like(self.gram_DD)

    def add(self, rows_ND: Tensor, wanted_ND: Tensor) -> None:
        rows_ND, wanted_ND = rows_ND.double(), wanted_ND.double()
        self.gram_DD += rows_ND.T @ rows_ND
        self.moment_DD += rows_ND.T @ wanted_ND

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """Return T [D, D], regularised towards 1 by `ridge` times the mean of the Gram matrix's diagonal."""
        one_DD = torch.eye(len(self.gram_DD), dtype=torch.float64, device=self.gram_DD.device)
        alpha = (ridge * self.gram_DD.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.linalg.solve(self.gram_DD + alpha * one_DD, self.moment_DD + alpha * one_DD)


@dataclass
class Stream:
    """A batch on its way through a model: its hidden states before block `block`, in host memory."""

    model: PreTrainedModel
    block: int = 0
    hidden_BTD: Tensor | None = None

    def run_to(self, block: int, batch: TokenBatch) -> tuple[LayerwisePass, Tensor]:
        """Return the batch's pass and the input of block `block`, or the last output for their number."""
        layerwise = layerwise_pass(self.model, batch)
        hidden_BTD = layerwise.hidden_BTD
        if self.hidden_BTD is not None:
            hidden_BTD = self.hidden_BTD.to(hidden_BTD.device)
        for index in range(self.block, block):
            hidden_BTD = layerwise.block(index, hidden_BTD)
        self.block, self.hidden_BTD = block, hidden_BTD.cpu()
        return layerwise, hidden_BTD


def find_bridges(kept: tuple[int, ...], num_source_layers: int) -> list[Bridge]:
    """Return a bridge for every run of removed blocks, ascending.

    Args:
        kept: source indices of the student's blocks.

    Raises:
        RequestError: nothing was removed, or a run begins at layer 0.
    """
    if len(kept) == num_source_layers:
        raise RequestError("objective 'linear_bridge' needs removed layers; none were dropped")
    if 0 not in kept:
        raise RequestError(
            "objective 'linear_bridge' cannot replace layer 0: no MLP before it could take the bridge in; "
            "keep layer 0 or use another objective"
        )
    ends = (*kept[1:], num_source_layers)
    places = enumerate(zip(kept, ends, strict=True))
    return [Bridge(position, end - 1) for position, (before, end) in places if end > before + 1]


def solve_bridges(spec: RecoverySpec, data: TrainingData, progress: Progress = no_progress) -> Solution:
    """Bridge every run of removed blocks of `spec.model`, on the first `max_tokens` tokens of the data.

    Both the student and the unpruned model are in memory. With a process group,
    every worker calls this with the same data and takes its share; `progress` counts its micro-batches.

    Raises:
        RequestError: nothing to bridge, no block before, or a block whose MLP does
            not end in a linear layer that is added to the rest.
    """
    if spec.model.merges:
        raise RequestError("objective 'linear_bridge' replaces dropped layers and cannot mend merged ones")
    source, student = (load(spec.model)[0].to(device()) for load in (load_source, build_model))
    kept = spec.model.kept(depth(source.config))
    # The first sequences that together have no more than `max_tokens` tokens, at least one.
    tokens, count = 0, 0
    while count < len(data):
        tokens += data.num_tokens(torch.tensor([count]))
        if count and tokens > spec.max_tokens:
            break
        count += 1
    chosen = torch.arange(count)

    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    portions = chosen[rank::workers].split(spec.micro_batch_size)
    total, done = len(portions) * len(find_bridges(kept, depth(source.config))), itertools.count(1)

    def local_batches() -> Iterator[TokenBatch]:
        for portion in portions:
            yield data.batch(portion)
            progress(next(done), total, "micro-batches")

    unchanged = not spec.model.adapters and spec.model.weights is None
    changed = insert_bridges(source, student, kept, local_batches, unchanged)
    return Solution(_without_adapter_chain(spec, source, kept, changed), data.num_tokens(chosen))


@torch.no_grad()
def insert_bridges(
    source: PreTrainedModel,
    student: PreTrainedModel,
    kept: tuple[int, ...],
    batches: Callable[[], Iterable[TokenBatch]],
    unchanged: bool = False,
) -> dict[tuple[int, str], nn.Module]:
    """Fold a bridge into the student before every run of removed blocks.

    Both models compute each block once, however many bridges there are: between two bridges
    the hidden states of all tokens of both models wait in host memory (2·N·D values).

    Args:
        kept: source index of each of the student's blocks.
        batches: gives this worker's tokens, always the same; called once a bridge.
        unchanged: the student's blocks are the source's, so that below the first bridge one model will do.

    Returns:
        The layers changed, by the student's block and their name in it.
    """
    bridges = find_bridges(kept, depth(source.config))
    last = {bridge: find_output_projection(student, bridge.student_block) for bridge in bridges}
    waiting: dict[int, tuple[Stream, Stream]] = {}
    for bridge, (_, layer) in last.items():
        equations = NormalEquations(student.get_input_embeddings().weight.shape[1], student.device)
        for number, batch in enumerate(batches()):
            on_device = batch.to(student.device)
            streams = waiting.pop(number, None) or (Stream(source), Stream(student))
            if unchanged and bridge is bridges[0]:
                streams[0].run_to(bridge.student_block, on_device)
                streams = streams[0], replace(streams[0], model=student)
            equations.add(*_regression_rows(*streams, bridge, layer, on_device))
            if bridge != bridges[-1]:
                waiting[number] = streams
        if dist.is_initialized():
            for sums in (equations.gram_DD, equations.moment_DD):
                dist.all_reduce(sums)
        fold(layer, equations.solve())
    return {(bridge.student_block, name): layer for bridge, (name, layer) in last.items()}


def find_output_projection(model: PreTrainedModel, block: int) -> tuple[str, nn.Module]:
    """Return name and module of the linear layer that a block's MLP ends in.

    Found by running a few tokens: it is the last linear layer that runs, and its output
    is added to the rest. A norm, a gate or a scale behind it fails this.

    Raises:
        RequestError: there is no such layer.
    """
    inside = find_layers(model).modules[block]
    linear = {n: m for n, m in inside.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    ran: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, name=n: ran.append(name)) for n, m in linear.items()]
    ids_BT = torch.arange(1, 1 + PROBE_TOKENS, device=model.device)[None]
    layerwise = LayerwisePass(model, ids_BT)
    hidden_BTD = layerwise.hidden_BTD
    for earlier in range(block):
        hidden_BTD = layerwise.block(earlier, hidden_BTD)
    ran.clear()
    output_BTD = layerwise.block(block, hidden_BTD)
    for hook in hooks:
        hook.remove()
    if not ran or not _is_added(layerwise, block, hidden_BTD, output_BTD, linear[ran[-1]]):
        last = ran[-1] if ran else "none"
        raise RequestError(
            f"objective 'linear_bridge' cannot go into layers of model type {model.config.model_type!r}: "
            f"what their last linear layer ({last}) gives is not added as it is; use another objective"
        )
    return ran[-1], linear[ran[-1]]


def fold(layer: nn.Module, transform_DD: Tensor) -> None:
    """Make a linear layer return y T instead of y, in place."""
    transposed = isinstance(layer, Conv1D)
    weight_ID = layer.weight.double() if transposed else layer.weight.double().T
    folded_ID = weight_ID @ transform_DD
    layer.weight.copy_(folded_ID if transposed else folded_ID.T)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ transform_DD)


def _is_added(
    layerwise: LayerwisePass, block: int, hidden_BTD: Tensor, output_BTD: Tensor, layer: nn.Module
) -> bool:
    """Return whether doubling the layer's output adds exactly that output to the block's."""
    seen: list[Tensor] = []

    def double(_module: nn.Module, _inputs: object, given: Tensor) -> Tensor:
        seen.append(given)
        return 2 * given

    hook = layer.register_forward_hook(double)
    doubled_BTD = layerwise.block(block, hidden_BTD)
    hook.remove()
    if len(seen) != 1 or seen[0].shape != output_BTD.shape:
        return False
    rounding = 8 * torch.finfo(output_BTD.dtype).eps * doubled_BTD.float().abs().max()
    return bool((doubled_BTD.float() - output_BTD.float() - seen[0].float()).abs().max() <= rounding)


def _regression_rows(
    source: Stream, student: Stream, bridge: Bridge, layer: nn.Module, batch: TokenBatch
) -> tuple[Tensor, Tensor]:
    """Return M and L − Y [N, D] of a batch, without padding."""
    layerwise, before_BTD = student.run_to(bridge.student_block, batch)
    mlp: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _i, given: mlp.append(given))
    after_BTD = layerwise.block(bridge.student_block, before_BTD)
    hook.remove()
    mlp_BTD = mlp[-1].float()
    _, wanted_BTD = source.run_to(bridge.last_removed + 1, batch)
    wanted_BTD = wanted_BTD.float() - (after_BTD.float() - mlp_BTD)
    token_weights = slice(None) if batch.mask_BT is None else batch.mask_BT.flatten().bool()
    return mlp_BTD.flatten(0, 1)[token_weights], wanted_BTD.flatten(0, 1)[token_weights]


def _without_adapter_chain(
    spec: RecoverySpec,
    source: PreTrainedModel,
    kept: tuple[int, ...],
    changed: dict[tuple[int, str], nn.Module],
) -> dict[str, Tensor]:
    """Return the changed weights by source name, less what the adapter chain will add to them again."""
    path = find_layers(source).path
    added = [read_deltas(adapter, path, kept) for adapter in spec.model.adapters]
    chain = [replace(deltas, scale=-deltas.scale) for deltas in added]
    tensors = read_weights(spec.model.weights) if spec.model.weights else {}
    for (block, name), module in changed.items():
        weight = module.weight.detach().float().clone()
        add_deltas(weight, chain, block, f"{name}.weight")
        place = f"{path}.{kept[block]}.{name}"
        tensors[f"{place}.weight"] = weight.to(source.dtype)
        if module.bias is not None:
            tensors[f"{place}.bias"] = module.bias.detach()
    return tensors
