"""DeepSpeed: the one place that knows how the optimizer is run and its state is kept."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist

from actors.contracts import RecoverySpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.recovery.adapters import trainable_parameters

CHECKPOINT_TAG = "state"
ZERO_STAGES = (0, 1, 2)
OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size / (micro_batch_size * workers)",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate and weight_decay",
    "scheduler": "lr_schedule and warmup_steps",
}
"""DeepSpeed fields that follow from the recovery settings, and from which."""


class Engine:
    """A training module under DeepSpeed.

    Args:
        module: forward(batch) → dict of scalars with `loss`.
        spec: batch sizes, optimizer and the user's DeepSpeed configuration.
        world_size: number of workers; a process group of that size must exist.

    Raises:
        RequestError: the batch does not divide among the workers, or the
            DeepSpeed configuration contradicts the recovery settings.
    """

    def __init__(self, module: nn.Module, spec: RecoverySpec, world_size: int):
        config = deepspeed_config(spec, world_size)
        _keep_to_torch_collectives()
        self._pending = False
        self._parameters = trainable_parameters(module)
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=self._parameters, config=config
        )
        self._engine.train()

    def accumulate(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; the detached terms."""
        if self._pending:
            # DeepSpeed counts micro-batches by calls of step(); this one changes no weights.
            self._engine.step()
        terms = self._engine(batch.to(self._engine.device))
        self._engine.backward(terms["loss"])
        self._pending = True
        return {name: value.detach() for name, value in terms.items()}

    def apply(self, learning_rate: float) -> float:
        """Change the weights by the gradient accumulated over one whole batch.

        Returns the L2 norm of that gradient before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None if self._engine.zero_optimization() else self._gradient_norm()
        self._engine.step()
        self._pending = False
        # With ZeRO the gradient is sharded; its norm is known once the step is made.
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def mean_over_workers(self, values: Tensor) -> list[float]:
        """Element-wise mean of a few numbers; every worker calls this and gets the same."""
        dist.all_reduce(values)
        return (values / dist.get_world_size()).tolist()

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def save(self, directory: Path, state: dict[str, Any]) -> None:
        """Write adapters, optimizer and `state`; every worker calls this, each writes its share."""
        self._engine.save_checkpoint(
            str(directory), tag=CHECKPOINT_TAG, client_state=state, exclude_frozen_parameters=True
        )

    def load(self, directory: Path) -> dict[str, Any]:
        """Read back what `save` wrote and return its `state`."""
        _, state = self._engine.load_checkpoint(str(directory), tag=CHECKPOINT_TAG, load_module_strict=False)
        return state

    def close(self) -> None:
        self._engine.destroy()


def deepspeed_config(spec: RecoverySpec, world_size: int) -> dict[str, Any]:
    """The user's DeepSpeed configuration completed by what the recovery settings imply.

    Raises:
        RequestError: see `Engine`.
    """
    user = _parse(spec.deepspeed)
    ours = {
        "train_batch_size": spec.batch_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(spec, world_size),
        "gradient_clipping": spec.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            # DeepSpeed's own fused Adam is compiled on first use, for minutes.
            "params": {"lr": spec.learning_rate, "weight_decay": spec.weight_decay, "torch_adam": True},
        },
    }
    for name in OURS.keys() & user.keys():
        if user[name] not in ("auto", ours.get(name)):
            raise RequestError(
                f"DeepSpeed field {name!r} is {user[name]!r}, but it follows from the recovery settings "
                f"({OURS[name]}); leave it out or give 'auto'"
            )
    _check_zero_stage(user)
    quiet = {"steps_per_print": None, "wall_clock_breakdown": False}
    free = {name: value for name, value in user.items() if name not in OURS}
    return {**quiet, **free, **ours}


def accumulation_steps(spec: RecoverySpec, world_size: int) -> int:
    """Micro-batches of one worker in one optimizer step.

    Raises:
        RequestError: the batch does not divide evenly.
    """
    at_once = spec.micro_batch_size * world_size
    if at_once < 1 or spec.batch_size % at_once:
        raise RequestError(
            f"batch_size {spec.batch_size} is no multiple of micro_batch_size {spec.micro_batch_size} "
            f"x {world_size} workers = {at_once}; change one of the three"
        )
    return spec.batch_size // at_once


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, as DeepSpeed needs one; gone afterwards."""
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
        _end_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _end_process_group() -> None:
    """End the group and have DeepSpeed forget it, so that the next recovery can start its own."""
    if deepspeed.comm.comm.cdb is None:
        dist.destroy_process_group()
        return
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def _parse(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise RequestError(f"the DeepSpeed configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"the DeepSpeed configuration must be a JSON object, not {type(config).__name__}")
    return config


def _check_zero_stage(user: dict[str, Any]) -> None:
    stage = user.get("zero_optimization", {}).get("stage", 0)
    if stage not in ZERO_STAGES:
        raise RequestError(
            f"DeepSpeed field 'zero_optimization.stage' is {stage!r}; recovery trains with "
            f"{', '.join(map(str, ZERO_STAGES))}; frozen weights are not sharded"
        )


def _keep_to_torch_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives and from chatting.

    `__compatible_ops__` is DeepSpeed's own record of what it may build.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
