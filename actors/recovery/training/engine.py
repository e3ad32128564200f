"""The DeepSpeed engine: the one place that runs the optimizer and keeps its state.

What is trained is kept in float32, with AdamW's two moments, whatever type the
computation has; the frozen weights have the type of the computation. So there
is one kind of master weights for all ZeRO stages, and autocast does the rest.
"""

import gc
import logging
import math
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch import distributed as dist

from actors.contracts import RecoverySpec
from actors.data import TokenBatch
from actors.models import device
from actors.recovery.training.checkpoint import read_state, read_tensors, write_shard
from actors.recovery.training.deepspeed_config import (
    deepspeed_config,
    loss_scale_settings,
    optimizer_settings,
    precision_of,
    zero_stage,
)
from actors.recovery.training.loss_scale import LossScale
from actors.recovery.training.zero3 import partition

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KIBIBYTE = 1024


class Engine:
    """A training module under DeepSpeed.

    Args:
        module: forward(batch) → dict of scalars with `loss`.
        spec: batch sizes, optimizer, precision and the user's DeepSpeed configuration.
        world_size: number of workers; a process group of that size must exist.
        micro_batch_size: sequences of one forward pass.

    Attributes:
        loss_scale: the factor on the loss; 1 but for float16.
        updates: optimizer steps made.
        device: where the module computes.

    Raises:
        RequestError: see `deepspeed_config`.
    """

    def __init__(self, module: nn.Module, spec: RecoverySpec, world_size: int, micro_batch_size: int):
        # Its own record of what it may build: the shared-memory collectives are compiled on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._spec, self._world_size = spec, world_size
        self._dtype = getattr(torch, precision_of(spec))
        self._module = module
        self._named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.stage = zero_stage(spec)
        if self.stage < 3:
            for _, parameter in self._named:
                parameter.data = parameter.data.float()
        self.updates = 0
        self.device = device()
        # Words between hosts, which no device has to wait for.
        self._hosts = dist.new_group(backend="gloo") if world_size > 1 and self.device.type != "cpu" else None
        self.loss_scale = LossScale()
        if self._dtype == torch.float16:
            self.loss_scale = LossScale.for_float16(**loss_scale_settings(spec))
        self._initialize(micro_batch_size)

    @property
    def num_trainable(self) -> int:
        """The number of trained values, on all workers together."""
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self._named)

    @property
    def backward_is_local(self) -> bool:
        """True if no worker waits for another before the whole gradient is there.

        Stage 2 and 3 exchange gradients during it, stage 3 weights as well: a
        worker that fails there leaves the others waiting.
        """
        return self.stage < 2 or (self.stage == 2 and self._world_size == 1)

    @property
    def steps_are_deferred(self) -> bool:
        """True if a step needs no number on the host: the device itself drops one that is not finite.

        DeepSpeed's own stages read the gradient's norm in every step, as float16 does for its loss scale.
        """
        return self.stage == 0 and self._dtype != torch.float16

    def accumulate(self, batch: TokenBatch, last: bool) -> dict[str, Tensor]:
        """Run forward and backward of one micro-batch and return the detached terms.

        Args:
            last: whether this is the step's last micro-batch.
        """
        self._engine.set_gradient_accumulation_boundary(last and self.stage >= 2)
        terms = self._engine(batch.to(self.device, non_blocking=True))
        if self.stage:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)
            self._engine.backward(terms["loss"])
        else:
            self._engine.backward(terms["loss"] * self.loss_scale.value)
        return {name: value.detach() for name, value in terms.items()}

    def step(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Change the weights by the gradient accumulated over one whole batch.

        Returns the L2 norm of that gradient before clipping. If it is not finite,
        nothing is changed and the gradient is dropped; nor, where steps are deferred, if
        `loss` is not.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage < 2:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
        if self.stage:
            # DeepSpeed unscales and clips; a gradient that is not finite it drops by itself.
            self._engine.step()
            norm = torch.as_tensor(self._engine.get_global_grad_norm())
        else:
            parameters = [parameter for _, parameter in self._named if parameter.grad is not None]
            gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale.value)
            norm = torch.nn.utils.get_total_norm(gradients)
            if self._spec.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._spec.max_grad_norm, norm)
            # Fused optimizers read this on the device and change nothing where it is 1.
            self._adam.found_inf = (~(norm.isfinite() & loss.isfinite())).float()
            self._adam.step()
            self._engine.zero_grad()
        if self.steps_are_deferred or math.isfinite(norm):
            self.updates += 1
            self.loss_scale.record_step(dynamic=self._dtype == torch.float16)
        return norm

    def reinitialize(self, micro_batch_size: int) -> None:
        """Go on with smaller micro-batches from the weights as they are, without any gradient.

        Building DeepSpeed's engine anew is the one sure way to leave nothing of a
        backward pass that broke off; the shards stay what they were.
        """
        adam = self._adam.state_dict()
        self._engine.destroy()
        for _, parameter in self._named:
            parameter.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._initialize(micro_batch_size)
        self._adam.load_state_dict(adam)
        self._link_moments()

    def mean_over_workers(self, values: Tensor) -> Tensor:
        """Return the element-wise mean over the workers, the same on all of them."""
        if self._world_size > 1:
            dist.all_reduce(values)
        return values / self._world_size

    def max_over_workers(self, value: int) -> int:
        """Return the largest of the workers' numbers, the same on all of them; no device is waited for."""
        if self._world_size == 1:
            return value
        greatest = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=self._hosts)
        return int(greatest)

    def save(self, directory: Path, state: dict[str, Any]) -> None:
        """Write weights, optimizer and `state`; every worker calls this, each writes its share.

        Raises:
            WorkError: the directory cannot be written.
        """
        rank, kinds = dist.get_rank(), (WEIGHT, *MOMENTS)
        shapes = {
            f"{name}|{kind}": getattr(parameter, "ds_shape", parameter.shape)
            for name, parameter in self._named[rank :: self._world_size]
            for kind in kinds
        }

        def own_tensors() -> Iterator[Tensor]:
            for number, (_, parameter) in enumerate(self._named):
                for kind in kinds:
                    whole = self._full_tensor(parameter, kind)
                    if number % self._world_size == rank:
                        yield whole

        ours = {
            "updates": self.updates,
            "loss_scale": self.loss_scale.value,
            "steps_since_overflow": self.loss_scale.steps_since_overflow,
        }
        write_shard(directory, rank, self._world_size, shapes, own_tensors(), {**state, "engine": ours})

    def load(self, directory: Path) -> dict[str, Any]:
        """Read back what `save` wrote, with however many workers, and return its `state`.

        Raises:
            CorruptCheckpointError: it is not whole; nothing was changed.
        """
        state = read_state(directory)
        by_name = dict(self._named)
        self._create_moments(state["engine"]["updates"])
        for key, value in read_tensors(directory, state["parts"]):
            name, _, kind = key.rpartition("|")
            parameter = by_name[name]
            if kind == WEIGHT:
                with self.gathered([parameter]):
                    parameter.data.copy_(value)
            elif self.stage == 3:
                # By shards, as DeepSpeed's own way for whole tensors fails where they do not divide evenly.
                safe_set_local_optimizer_state(parameter, _own_part(value, parameter.ds_tensor), kind)
            elif self.stage:
                safe_set_full_optimizer_state(parameter, value, kind)
            else:
                self._adam.state[parameter][kind].copy_(value)
        if self.stage:
            self._engine.optimizer.refresh_fp32_params()
        self.updates = state["engine"]["updates"]
        self.loss_scale.value = state["engine"]["loss_scale"]
        self.loss_scale.steps_since_overflow = state["engine"]["steps_since_overflow"]
        return state

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Make parameters whole on every worker; equal changes on all of them are kept."""
        chosen = list(parameters)
        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0, enabled=self.stage == 3):
            yield

    def close(self) -> None:
        self._engine.destroy()

    def _initialize(self, micro_batch_size: int) -> None:
        parameters = [parameter for _, parameter in self._named]
        config = deepspeed_config(self._spec, self._world_size, micro_batch_size)
        if self.stage == 3:
            partition(self._module, config, self.device)
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self._spec.learning_rate,
            weight_decay=self._spec.weight_decay,
            fused=True,
            **optimizer_settings(self._spec),
        )
        self._engine, *_ = deepspeed.initialize(
            # Wrapped anew each time: DeepSpeed never takes its hooks off the outermost module.
            model=_Autocast(self._module, self._dtype),
            model_parameters=parameters,
            optimizer=optimizer,
            config=config,
        )
        self._engine.train()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """torch's own optimizer, with ZeRO over this worker's shards."""
        return self._engine.optimizer.optimizer if self.stage else self._engine.optimizer

    def _full_tensor(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Gather one parameter, or one of its moments, from all shards; every worker must call this."""
        if self.stage == 0:
            return parameter.data if kind == WEIGHT else self._adam.state[parameter][kind]
        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _create_moments(self, updates: int) -> None:
        """Create AdamW's state after that many steps; torch creates it in the first step only."""
        if self.stage == 3:
            shards = self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            shards = [shard for group in self._adam.param_groups for shard in group["params"]]
        for shard in shards:
            where = shard.device if self._adam.defaults["fused"] else torch.device("cpu")
            step = torch.tensor(float(updates), device=where)
            self._adam.state[shard] = {"step": step, **{name: torch.zeros_like(shard) for name in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Link the moments to their parameters in DeepSpeed, which does so in the first step only."""
        if self.stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _own_part(whole: Tensor, shard: Tensor) -> Tensor:
    """Return this worker's part of a tensor, which is filled up with zeros to equal parts like `shard`."""
    own = torch.zeros(shard.numel())
    part = whole.flatten()[dist.get_rank() * shard.numel() :][: shard.numel()]
    own[: len(part)] = part
    return own


class _Autocast(nn.Module):
    """A module that computes in a type other than that of what it trains."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self._dtype = dtype

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        device = batch.input_ids_BT.device.type
        with torch.autocast(device, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self.module(batch)


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held so far: on its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE


@contextmanager
def tensor_float32(precision: str) -> Iterator[None]:
    """Have a GPU multiply matrices by TF32, ten bits of each factor, where the precision is float32."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = before or precision == "float32"
    try:
        yield
    finally:
        flags.allow_tf32 = before


@contextmanager
def single_process_group() -> Iterator[None]:
    """Create a process group of this process alone, which DeepSpeed needs, and destroy it afterwards."""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in launcher}
    os.environ.update(launcher)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=10),
    )
    try:
        yield
    finally:
        # DeepSpeed's record of the group must go too, so that the next recovery can start its own.
        if deepspeed.comm.comm.cdb is None:
            dist.destroy_process_group()
        else:
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
