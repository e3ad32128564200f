"""The loss curve under every ZeRO stage and number of workers, and how long each takes to start.

    python benchmarks/zero_stages.py [--model PATH] [--steps 20] [--workers 1 2] [--stages 0 1 2 3] [--ray]

Without `--model`, a random Llama of four small layers. Workers are plain processes
on gloo, or with `--ray` those of a Ray Train job. Startup is from the call to the
end of the first step: processes, libraries, model and DeepSpeed.
"""

import argparse
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import distributed as dist
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.contracts import (
    ActorPoolSpec,
    AdapterSpec,
    ModelRef,
    ModelSpec,
    RecoveryResult,
    RecoverySpec,
    TextSpec,
)
from actors.recovery.training.checkpoint import CheckpointDirectory
from actors.recovery.training.train_context import TrainContext, WriteShard
from actors.recovery.training.train_loop import train

LAYERS, WIDTH = 4, 64
TEXT = TextSpec(builtin="wikitext-2-raw-validation")


@dataclass(frozen=True)
class FirstStep:
    """A picklable progress that writes down when the first step was done."""

    file: Path

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done == 1:
            self.file.write_text(str(time.time()))


def work(rank: int, world_size: int, port: int, spec: RecoverySpec, directory: Path) -> None:
    """One plain worker."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    checkpoints = CheckpointDirectory(directory / f"checkpoints-{rank}")

    def save(steps_done: int, write: WriteShard) -> None:
        checkpoints.save(steps_done, write)

    context = TrainContext(
        rank=rank,
        world_size=world_size,
        adapter_uri=str(directory / "adapter"),
        micro_batch_hint_uri=str(directory / "micro_batch_size"),
        save_checkpoint=save,
        checkpoints=lambda: iter(()),
        progress=FirstStep(directory / "first"),
    )
    result = train(spec, context)
    if rank == 0:
        (directory / "result").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def run_plain(spec: RecoverySpec, workers: int, directory: Path) -> RecoveryResult:
    """Train in plain processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (workers, port, spec, directory), nprocs=workers)
    return pickle.loads((directory / "result").read_bytes())


def run_ray(spec: RecoverySpec, workers: int, directory: Path) -> RecoveryResult:
    """Train as a Ray Train job."""
    from actors.recovery.ray import recover_on_ray

    return recover_on_ray(
        spec,
        adapter_uri=str(directory / "adapter"),
        name="zero",
        storage_path=str(directory / "train"),
        pool=ActorPoolSpec(workers, cpus=0.5, gpus=0),
        max_failures=0,
        progress_handle=FirstStep(directory / "first"),
    )


def save_small_model(directory: Path) -> str:
    """A random Llama with a tokenizer of bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def zero_config(stage: int) -> str:
    """DeepSpeed's JSON; with the thresholds, stage 3 would keep a small model's weights whole."""
    thresholds = '"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0'
    rest = f", {thresholds}" if stage == 3 else ""
    return f'{{"zero_optimization": {{"stage": {stage}{rest}}}}}'


def compare(spec: RecoverySpec, options: argparse.Namespace, run: Callable[..., RecoveryResult]) -> float:
    """Print a line for every combination; the greatest relative difference of a loss from the first's."""
    reference: list[float] = []
    worst = 0.0
    print("stage workers   first loss    last loss  difference  startup s")
    for stage, workers in product(options.stages, options.workers):
        with tempfile.TemporaryDirectory(prefix="zero-stages-") as scratch:
            started = time.time()
            result = run(replace(spec, deepspeed=zero_config(stage)), workers, Path(scratch))
            startup = float((Path(scratch) / "first").read_text()) - started
        losses = [step.loss for step in result.steps]
        reference = reference or losses
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
        worst = max(worst, difference)
        print(
            f"{stage:5d} {workers:7d} {losses[0]:12.7f} {losses[-1]:12.7f} "
            f"{difference:11.1e} {startup:10.1f}",
            flush=True,
        )
    return worst


def main() -> None:
    """Run all combinations and say by how much they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--drop", type=int, nargs="+", default=[2])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    if options.ray:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="zero-model-") as scratch:
        model = options.model or save_small_model(Path(scratch))
        spec = RecoverySpec(
            model=ModelRef(ModelSpec(model), dropped=tuple(options.drop)),
            data=TEXT,
            adapter=AdapterSpec(rank=8),
            sequence_length=options.tokens,
            batch_size=options.batch,
            micro_batch_size=options.micro_batch,
            learning_rate=1e-3,
            max_tokens=options.steps * options.batch * options.tokens,
        )
        worst = compare(spec, options, run_ray if options.ray else run_plain)
    print(f"greatest relative difference of a loss over {options.steps} steps: {worst:.1e}")


if __name__ == "__main__":
    main()
