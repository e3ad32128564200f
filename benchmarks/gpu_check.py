"""One GPU, one command, under 8 minutes, without Ray: what runs there, how fast, and with which numbers.

    python -m benchmarks.gpu_check [--sizes tiny 1b 8b] [--limit-s 450] [--json FILE] [--directory DIR]

Random models of Llama's shape in bfloat16 are scored, recovered in every way, evaluated and made to
generate. The columns: tokens a second; MFU, the model's floating-point operations (those of the plain way:
products and attention of teacher, student and backward pass, no recomputation) over the GPU's peak for dense
bfloat16; the most memory that torch held; and how often a step waited for the GPU
(`torch.cuda.set_sync_debug_mode`), which between two logs ought to be never. What does not fit, or not into
the time, is a row that says so. The first rows compare float32 numbers of a small model with those of a
process that sees no GPU.

On a machine without a GPU the same runs on the CPU; MFU, memory and waits are then empty.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from actors.contracts import (
    AdapterSpec,
    GenerationSpec,
    LossSpec,
    ModelRef,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TextSpec,
)
from actors.data import load_texts, tokenize_text
from actors.evaluation.perplexity import token_perplexity
from actors.generation.transformers import generate_responses
from actors.models import build_model
from actors.recovery.training.local import recover_locally
from actors.scoring import score_locally
from benchmarks.random_llama import SIZES, TEXT, Size, forward_flops, save_random, tokenizer

SENTENCES = TextSpec(builtin="iterabre-appendix-a")
GIB = 2**30
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121}
"""Dense bfloat16 by the makers' data sheets, by a part of the device's name."""
TOLERANCE = 5e-3
"""Of float32 on a GPU, whose products may be TF32 (10 bits of mantissa)."""


RECOVERIES = (
    ("kd", "lora"),
    ("kd", "qlora"),
    ("kd", "full"),
    ("healing", "lora"),
    ("healing", "full"),
    ("healing_aux", "lora"),
    ("sft", "lora"),
    ("linear_bridge", "closed form"),
)


@dataclass
class Row:
    """One check. `tokens` and `flops` are of the `seconds`; `waits` is None where it cannot be counted."""

    model: str
    check: str
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    peak_bytes: int = 0
    waits: float | None = None
    note: str = ""

    def line(self) -> str:
        """Return the row of the table."""
        rate, mfu = "", ""
        if self.seconds:
            rate = f"{self.tokens / self.seconds:.0f}"
            peak = next((p for name, p in PEAK_TFLOPS.items() if name in device_name()), None)
            mfu = f"{self.flops / self.seconds / peak / 1e12:.1%}" if peak and self.flops else ""
        waits = "" if self.waits is None else f"{self.waits:.1f}"
        held = f"{self.peak_bytes / GIB:.2f}" if self.peak_bytes else ""
        return f"{self.model:5} {self.check:22} {rate:>10} {mfu:>6} {held:>8} {waits:>6}  {self.note}"


@dataclass
class Waits:
    """Counts how often the host waited for the GPU; `marks` are the counts at the ends of steps."""

    count: int = 0
    marks: list[int] = field(default_factory=list)

    def mark(self, *_: object) -> None:
        """Note the end of a step; a `Progress`."""
        self.marks.append(self.count)

    def per_step(self) -> float | None:
        """Return the mean over the steps but the first, which warms up."""
        if not torch.cuda.is_available() or len(self.marks) < 2:
            return None
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count the warnings by which torch reports that the host waits."""
    waits = Waits()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        waits.count += "synchroniz" in str(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def device_name() -> str:
    """Return the name of the GPU, else `CPU`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def recovery_flops(size: Size, objective: str, adapter: str) -> float:
    """Return the operations of one token of training: frozen weights have no gradient of their own."""
    teacher = forward_flops(size, size.layers) if objective in ("kd", "healing_aux") else 0.0
    passes = 3 if adapter == "full" else 2
    return teacher + passes * forward_flops(size, size.layers - len(size.dropped))


@dataclass(frozen=True)
class Checks:
    """The checks of one model: each returns a row without its memory."""

    name: str
    size: Size
    source: ModelSpec
    work: Path

    def all(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Yield every check with its name."""
        yield "score hidden_cosine", self.score
        for objective, adapter in RECOVERIES:
            yield f"{objective} {adapter}", lambda o=objective, a=adapter: self.recover(o, a)
        yield "evaluate perplexity", self.evaluate
        yield "generate", self.generate

    def score(self) -> Row:
        """Score every block by hidden cosine."""
        size = self.size
        spec = ScoreSpec(model=ModelRef(self.source), calibration=SENTENCES, sequence_length=size.length)
        started = time.perf_counter()
        result = score_locally(spec)
        layers = size.layers
        # The candidate without block l runs the blocks above it; the first pass runs all.
        flops = result.num_tokens * forward_flops(size, layers * (layers + 1) // 2, head=False)
        return Row(
            self.name, "", result.num_tokens, time.perf_counter() - started, flops, note="with its load"
        )

    def recover(self, objective: str, adapter: str) -> Row:
        """Recover the pruned model for a few steps, of which the first two are not timed."""
        if note := self._obstacle(adapter):
            return Row(self.name, "", note=note)
        size = self.size
        spec = recovery_spec(size, self.source, objective, adapter, self._data(objective))
        with counted_waits() as waits:
            started = time.perf_counter()
            result = recover_locally(spec, str(self.work / f"{objective}-{adapter}"), self.work, waits.mark)
            seconds = time.perf_counter() - started
        if not result.steps:
            return Row(self.name, "", result.tokens, seconds, note="with its load")
        timed = result.steps[2:] or result.steps
        tokens, note = sum(step.tokens for step in timed), f"loss {result.steps[-1].loss:.4g}"
        flops = tokens * recovery_flops(size, objective, adapter)
        return Row(self.name, "", tokens, sum(s.seconds for s in timed), flops, 0, waits.per_step(), note)

    def evaluate(self) -> Row:
        """Measure the perplexity of the unpruned model."""
        size = self.size
        model, _ = build_model(ModelRef(self.source))
        ids = tokenize_text(load_texts(TEXT), tokenizer(), size.length * size.batch * 2)
        token_perplexity(model, ids[: size.length], size.length, 1)
        started = time.perf_counter()
        found = token_perplexity(model, ids, size.length, size.batch).perplexity
        seconds = time.perf_counter() - started
        flops = len(ids) * forward_flops(size, size.layers)
        return Row(self.name, "", len(ids), seconds, flops, note=f"perplexity {found:.5g}")

    def generate(self) -> Row:
        """Draw responses of the unpruned model in one batch."""
        size = self.size
        model, own = build_model(ModelRef(self.source))
        spec = GenerationSpec(
            model=self.source,
            prompts=TextSpec(chat_template="plain"),
            max_new_tokens=size.new_tokens,
            temperature=1.0,
            batch_size=size.batch,
        )
        prompts = [({"role": "user", "content": f"Write about {i}."},) for i in range(size.batch)]
        generate_responses(model, own, prompts, replace(spec, max_new_tokens=2))
        started = time.perf_counter()
        responses = generate_responses(model, own, prompts, spec)
        seconds, tokens = time.perf_counter() - started, sum(response.tokens for response in responses)
        return Row(self.name, "", tokens, seconds, tokens * forward_flops(size, size.layers))

    def _data(self, objective: str) -> TextSpec:
        if objective != "sft":
            return TEXT
        file = self.work / "answers.jsonl"
        rows = [{"q": "Go on.", "a": text} for text in load_texts(TEXT) if len(text) > 200]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TextSpec(path=str(file), prompt_column="q", response_column="a", chat_template="plain")

    def _obstacle(self, adapter: str) -> str:
        if adapter == "qlora" and not (find_spec("bitsandbytes") and torch.cuda.is_available()):
            return "skipped: needs bitsandbytes and a GPU"
        if adapter == "full" and torch.cuda.is_available():
            weights = forward_flops(replace(self.size, length=0), self.size.layers) / 2
            needed = 20 * weights
            if needed > 0.9 * torch.cuda.get_device_properties(0).total_memory:
                return f"skipped: needs {needed / GIB:.0f} GiB on one GPU"
        return ""


def recovery_spec(
    size: Size, source: ModelSpec, objective: str, adapter: str, data: TextSpec
) -> RecoverySpec:
    """Return the request for a few steps of that recovery."""
    trained = AdapterSpec() if adapter == "closed form" else AdapterSpec(kind=adapter)  # type: ignore[arg-type]
    return RecoverySpec(
        model=ModelRef(source, size.dropped),
        data=data,
        objective=objective,
        adapter=trained,
        loss=LossSpec(attention=0.0),
        sequence_length=size.length,
        batch_size=size.batch,
        micro_batch_size=max(1, size.batch // 2),
        gradient_checkpointing=adapter == "full",
        max_tokens=size.steps * size.batch * size.length,
        checkpoint_steps=10**6,
    )


def numbers(work: Path) -> dict[str, list[float]]:
    """Return float32 numbers of a small model, on the device of this process."""
    size = SIZES["tiny"]
    source = save_random(size, work / "numbers", "float32")
    spec = recovery_spec(size, source, "kd", "lora", TEXT)
    losses = [step.loss for step in recover_locally(spec, str(work / "numbers-out"), work).steps]
    model, own = build_model(ModelRef(source, size.dropped))
    ids = tokenize_text(load_texts(TEXT), own, 1000)
    scoring = ScoreSpec(model=ModelRef(source), calibration=SENTENCES, sequence_length=64)
    return {
        "scores": list(score_locally(scoring).scores),
        "losses": losses,
        "perplexity": [token_perplexity(model, ids, 64, 4).perplexity],
    }


def compare_numbers(work: Path) -> Iterator[Row]:
    """Compare what this process computes with what one computes that sees no GPU."""
    here = numbers(work)
    environment, root = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--numbers"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode:
        yield Row("tiny", "numbers", note=f"FAILED on the CPU: {done.stderr.strip().splitlines()[-1]}")
        return
    cpu = json.loads(done.stdout.splitlines()[-1])
    for name, values in here.items():
        apart = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, cpu[name], strict=True))
        failed = "" if apart <= TOLERANCE else "FAILED: "
        yield Row("tiny", f"{name} against CPU", note=f"{failed}relative difference {apart:.1e}")


def measured(name: str, check: str, run: Callable[[], Row]) -> Row:
    """Return the row of a check with its peak of memory; one that fails is a row, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        row = run()
    except Exception as error:
        traceback.print_exc()
        row = Row(name, check, note=f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}")
    row.check = check
    if torch.cuda.is_available():
        row.peak_bytes = torch.cuda.max_memory_allocated()
    return row


def run(options: argparse.Namespace, work: Path) -> list[Row]:
    """Run everything that the time allows, and print each row when it is there."""
    started, rows = time.monotonic(), []

    def show(row: Row) -> None:
        rows.append(row)
        print(row.line(), flush=True)

    print(f"{device_name()}, torch {torch.__version__}")
    print(f"{'model':5} {'check':22} {'tokens/s':>10} {'MFU':>6} {'peak GiB':>8} {'waits':>6}")
    for row in compare_numbers(work):
        show(row)
    for name in options.sizes:
        place = work / name
        checks = Checks(name, SIZES[name], save_random(SIZES[name], place, "bfloat16"), work)
        for check, compute in checks.all():
            late = time.monotonic() - started > options.limit_s
            show(Row(name, check, note="skipped: out of time") if late else measured(name, check, compute))
        for file in place.iterdir():
            file.unlink()
    print(f"{time.monotonic() - started:.0f} s")
    return rows


def main() -> None:
    """Run the checks; the exit status is 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1b", "8b"], choices=list(SIZES))
    parser.add_argument("--limit-s", type=float, default=450.0, help="no check begins later than this")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--directory", type=Path, help="for the models' files (8b: 16 GB)")
    parser.add_argument("--numbers", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="iterabre-gpu-", dir=options.directory) as scratch:
        if options.numbers:
            print(json.dumps(numbers(Path(scratch))))
            return
        rows = run(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(any(row.note.startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
