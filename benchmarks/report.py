"""The report of a large campaign: seconds to build it and its size, for a ledger of so many rows.

    python -m benchmarks.report [--rows 100000] [--output DIR]

The ledger is that of a made-up campaign (models × methods × seeds, three targets, four of the methods
iterative), written through the ledger as stages do. Its numbers follow from seeded draws.
"""

import argparse
import hashlib
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.reporting.charts.method_charts import GROUPS
from orchestrator.reporting.html import build_report
from orchestrator.reporting.run_source import Source
from orchestrator.storage.ledger import Ledger, Row

MODELS = {
    "llama-3.1-8b": (32, 8.03e9), "llama-3.2-3b": (28, 3.21e9), "llama-3.2-1b": (16, 1.24e9),
    "qwen2.5-7b": (28, 7.62e9), "qwen2.5-0.5b": (24, 4.94e8), "mistral-7b": (32, 7.24e9),
    "gemma-2-2b": (26, 2.61e9), "smollm2-135m": (30, 1.35e8),
}  # fmt: skip
"""Layers and parameters."""
METHODS = {
    "iterabre": ("hidden_cosine", "iterative", 0.5), "iterabre-direct": ("hidden_cosine", "direct", 0.5),
    "shortgpt": ("block_influence", "direct", 0.0), "angular-healed": ("angular_block", "iterative", 0.4),
    "shortened-llama-ppl": ("perplexity", "iterative", 0.35), "random": ("random", "iterative", 0.3),
}  # fmt: skip
"""Criterion, schedule, and the share of a damage that recovery makes good."""
DAMAGE = {
    "hidden_cosine": 1.0,
    "block_influence": 1.2,
    "angular_block": 1.3,
    "perplexity": 0.9,
    "random": 3.0,
}
TASKS = {
    "arc_challenge": 0.45, "arc_easy": 0.72, "hellaswag": 0.56, "copa": 0.85, "piqa": 0.78, "race": 0.42,
    "winogrande": 0.7, "boolq": 0.8, "mmlu": 0.6, "blimp": 0.82,
    "xwinograd": 0.75, "xstorycloze": 0.62, "xnli": 0.45,
}  # fmt: skip
MEANS = {
    "reasoning": ("arc_challenge", "arc_easy", "hellaswag", "copa", "piqa"),
    "language": ("blimp", "race", "winogrande"),
    "knowledge": ("boolq", "mmlu"),
}
ITERATIONS, STOPS = 5, (2, 4, 5)
STEP_METRICS = (
    "loss", "loss_hidden", "loss_logits", "learning_rate", "grad_norm", "step_seconds", "step_tokens",
    "tokens_per_second", "peak_memory",
)  # fmt: skip


def write_campaign(ledger: Ledger, num_rows: int, seeds: int = 2) -> dict[str, Any]:
    """Write a campaign of about so many rows; return its configuration."""
    stages = list(_stages(seeds))
    fixed = sum(len(rows) for _, rows in stages)
    recoveries = [part for part, rows in stages if rows[0].stage == "recover"]
    steps = max(1, (num_rows - fixed) // (len(recoveries) * len(STEP_METRICS)))
    for part, rows in stages:
        ledger.append(part, rows + (_steps(rows[0], steps) if rows[0].stage == "recover" else []))
    return {
        "name": "made-up-campaign",
        "models": [{"id": name, "path": f"org/{name}"} for name in MODELS],
        "methods": [
            {"name": name, "scoring": {"criterion": criterion}, "schedule": {"mode": mode}}
            for name, (criterion, mode, _) in METHODS.items()
        ],
        "targets": [{"layers": stop} for stop in STOPS],
        "seeds": list(range(seeds)),
    }


def _stages(seeds: int) -> Iterator[tuple[str, list[Row]]]:
    for model in MODELS:
        for method, (_, mode, _) in METHODS.items():
            for seed in range(seeds):
                if mode == "iterative":
                    stops = [range(1, ITERATIONS + 1)]
                else:
                    stops = [range(stop, stop + 1) for stop in STOPS]
                for removed in stops:
                    suffix = "" if mode == "iterative" else f"--layers{removed[0]}"
                    yield from _trajectory(
                        model, method, seed, f"{model}--{method}--seed{seed}{suffix}", removed
                    )


def _trajectory(
    model: str, method: str, seed: int, name: str, depths: range
) -> Iterator[tuple[str, list[Row]]]:
    layers, _ = MODELS[model]
    draw = random.Random(f"{model}{method}{seed}")
    order = draw.sample(range(layers // 3, layers - 1), k=ITERATIONS)
    place = {
        "campaign": "made-up-campaign",
        "trajectory": name,
        "model": model,
        "method": method,
        "seed": seed,
    }
    place |= {"where": "node-1"}
    yield _evaluation(place, 0, "dense", 0, draw)
    for iteration, removed in enumerate(depths, 1):
        before = order[: 0 if len(depths) == 1 else removed - 1]
        now = order[len(before) : removed]
        scores = {layer: draw.uniform(0.6, 0.99) for layer in range(layers) if layer not in before}
        yield _part(place, iteration, "score", [("score", scores[i], {"layer": i}) for i in scores])
        yield _part(
            place,
            iteration,
            "prune",
            [
                *(("dropped", scores[i], {"layer": i}) for i in now),
                ("layers", float(layers - removed), {}),
            ],
        )
        yield _part(
            place, iteration, "recover", [("tokens", 2.5e6, {}), ("seconds", 3000 * draw.random(), {})]
        )
        yield _evaluation(place, iteration, "pruned", removed, draw)
        yield _evaluation(place, iteration, "recovered", removed, draw)
        if removed in STOPS:
            yield _part(place, iteration, "export", [("layers", float(layers - removed), {})])


def _part(
    place: dict[str, Any],
    iteration: int,
    stage: str,
    numbers: list[tuple[str, float, dict[str, Any]]],
    **more: Any,
) -> tuple[str, list[Row]]:
    part = f"{place['trajectory']}-{iteration:03d}-{stage}-{more.get('phase', 'all')}"
    key = hashlib.sha256(part.encode()).hexdigest()
    common = place | more | {"iteration": iteration, "stage": stage, "key": key}
    return part, [Row(**common, metric=name, value=value, **fields) for name, value, fields in numbers]


def _steps(first: Row, steps: int) -> list[Row]:
    kept = ("campaign", "trajectory", "model", "method", "seed", "iteration", "stage", "key", "where")
    common = {name: getattr(first, name) for name in kept}
    return [
        Row(
            **common,
            metric=metric,
            value=1 + (first.iteration + 1) * math.exp(-step / (steps / 4 + 1)),
            step=step,
        )
        for step in range(1, steps + 1)
        for metric in STEP_METRICS
    ]


def _evaluation(
    place: dict[str, Any], iteration: int, phase: str, removed: int, draw: random.Random
) -> tuple[str, list[Row]]:
    layers, parameters = MODELS[place["model"]]
    criterion, _, recovered = METHODS[place["method"]]
    share = removed / layers * DAMAGE[criterion] * (1 - recovered * (phase == "recovered"))

    def accuracy(full: float, chance: float = 0.25) -> float:
        return chance + (full - chance) * math.exp(-2 * share) + draw.gauss(0, 0.004) * (removed > 0)

    tasks = {f"{task}/acc": accuracy(full) for task, full in TASKS.items()}
    tasks |= {f"blimp_{name}/acc": accuracy(0.6 + 0.03 * i, 0.5) for i, name in enumerate(GROUPS["blimp"])}
    tasks |= {f"mmlu_{name}/acc": accuracy(0.5 + 0.05 * i) for i, name in enumerate(GROUPS["mmlu"])}
    means = {
        f"{name}/mean": sum(tasks[f"{t}/acc"] for t in members) / len(members)
        for name, members in MEANS.items()
    }
    speed = {
        "decode_tokens_per_second": 40 * layers / (layers - removed),
        "speedup": layers / (layers - removed),
    }
    numbers: dict[str, float] = {
        "wikitext2/token_perplexity": 9 * math.exp(3 * share) + draw.random() * (removed > 0)
    }
    numbers |= tasks | means | {f"throughput/{name}": value for name, value in speed.items()}
    numbers |= {"parameters": parameters * (1 - 0.85 * removed / layers), "seconds": 900 * draw.random()}
    errors = dict.fromkeys((*tasks, *means), 0.008)
    listed = [(name, value, {"stderr": errors.get(name)}) for name, value in numbers.items()]
    return _part(place, iteration, "evaluate", listed, phase=phase)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, help="where to leave ledger and report; a scratch directory if not given"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="iterabre-report-") as scratch:
        root = arguments.output or Path(scratch)
        ledger = Ledger(str(root / "ledger"))
        config = write_campaign(ledger, arguments.rows, arguments.seeds)
        started = time.perf_counter()
        table = ledger.read()
        read_s = time.perf_counter() - started
        started = time.perf_counter()
        page = build_report(Source(table, config), root / "report")
        build_s = time.perf_counter() - started
        figures = list((root / "report" / "figures").iterdir())
        print(f"ledger: {table.num_rows:,} rows of {len(MODELS)} models, read in {read_s:.1f} s")
        print(f"report: {build_s:.1f} s, page {page.stat().st_size / 2**20:.1f} MiB")
        size = sum(file.stat().st_size for file in figures) / 2**20
        print(f"        {len(figures)} figure files, {size:.1f} MiB")


if __name__ == "__main__":
    main()
