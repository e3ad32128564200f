"""Every model that a campaign measured, with its numbers: what comparisons and paper tables are made of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

DENSE, PRUNED, RECOVERED = "dense", "pruned", "recovered"
NOT_A_SCORE = ("parameters", "seconds", "waited_s")
CODE_CLASSES = ("malformed_fences", "unbalanced_parentheses", "other_syntax", "undefined_names")
LOWER_IS_BETTER = (
    "perplexity",
    "loss_nats",
    "loss",
    "loss_over_log_vocab",
    "repetition",
    "self_bleu",
    "bytes",
    *CODE_CLASSES,
)
HIGHER_IS_BETTER = (
    "acc",
    "acc_norm",
    "exact_match",
    "f1",
    "pass_at_1",
    "pass@1",
    "rouge",
    "top1",
    "per_second",
    "per_forward",
    "speedup",
    "acceptance_rate",
    "log_probability",
    "clean",
)
"""Endings of a metric's measure, or beginnings of its words, that say which way is better."""
NOISE = 2.0
"""Differences of no more standard errors are taken for noise: some one in twenty is, by chance, greater."""
ONE_SEED = 0.02
"""Where a number has no error, as a perplexity of one seed, differences of no more than this share are taken
for noise: two seeds of one method come that far apart."""

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Number:
    """A measured value, with its standard error if it has one and the key of the stage it comes from.

    A number that was computed from others has no key.
    """

    value: float
    stderr: float | None
    key: str


def stderr_of_difference(one: Number, other: Number) -> float | None:
    """Return the standard error between two independent numbers; None if either has none.

    Two models that answer the same questions are not independent: their difference is known better than this.
    """
    if one.stderr is None or other.stderr is None:
        return None
    return math.hypot(one.stderr, other.stderr)


def within_noise(one: Number, other: Number) -> bool:
    """Return true if another draw of questions and seeds could reverse the order of the two."""
    error = stderr_of_difference(one, other)
    apart = abs(one.value - other.value)
    if error is None:
        return apart <= ONE_SEED * max(abs(one.value), abs(other.value))
    return apart <= NOISE * error


@dataclass(frozen=True)
class Measured:
    """One model in one state.

    `phase` is dense (unpruned), pruned (before recovery) or recovered; with the
    objective none, what is recovered is what was pruned. `averaged` are the tasks of its mean accuracy.
    """

    trajectory: str
    model: str
    method: str
    seed: int
    iteration: int
    phase: str
    layers: int | None
    parameters: int | None
    numbers: Mapping[str, Number]
    averaged: tuple[str, ...] = ()


def measured_models(ledger: pa.Table) -> list[Measured]:
    """Return all measured models, in the order of trajectory, iteration and phase."""
    depths = _depths(ledger)
    rows = ledger.filter((pc.field("stage") == "evaluate") & pc.is_valid(pc.field("phase"))).to_pylist()
    found: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["trajectory"], row["iteration"], row["phase"]), []).append(row)
    order = {phase: rank for rank, phase in enumerate((DENSE, PRUNED, RECOVERED))}
    places = sorted(found, key=lambda place: (place[0], place[1], order.get(place[2], len(order))))
    models: list[Measured] = []
    for place in places:
        group = found[place]
        parameters = next((int(row["value"]) for row in group if row["metric"] == "parameters"), None)
        numbers = {
            row["metric"]: Number(row["value"], row["stderr"], row["key"])
            for row in group
            if row["metric"] not in NOT_A_SCORE
        }
        named = {
            name: group[0][name] for name in ("trajectory", "model", "method", "seed", "iteration", "phase")
        }
        layers = depths.get(place[:2])
        models.append(Measured(**named, layers=layers, parameters=parameters, numbers=numbers))
    return models


def _depths(ledger: pa.Table) -> dict[tuple[str, int], int]:
    """Return the layers of each trajectory's model after each iteration, unpruned at iteration 0."""
    rows = ledger.filter(pc.field("stage") == "prune").to_pylist()
    depths = {(r["trajectory"], r["iteration"]): int(r["value"]) for r in rows if r["metric"] == "layers"}
    dropped: dict[str, int] = {}
    for row in rows:
        if row["metric"] == "dropped" and row["iteration"] == 1:
            dropped[row["trajectory"]] = dropped.get(row["trajectory"], 0) + 1
    for trajectory, count in dropped.items():
        if (trajectory, 1) in depths:
            depths[trajectory, 0] = depths[trajectory, 1] + count
    return depths


def direction(metric: str) -> Direction | None:
    """Return the direction in which a metric is better, None where nothing says so."""
    if is_suite_mean(metric):
        return "higher"
    measure = metric.rsplit("/", 1)[-1].split(",")[0].removesuffix("_4")
    if any(measure == name or measure.endswith(f"_{name}") for name in LOWER_IS_BETTER):
        return "lower"
    if any(
        measure == name or measure.startswith(name) or measure.endswith(name) for name in HIGHER_IS_BETTER
    ):
        return "higher"
    return None


def is_suite_mean(metric: str) -> bool:
    """Return true if the metric is the average of a category of tasks, such as `reasoning/mean`."""
    return metric.endswith("/mean")


def is_speed(metric: str) -> bool:
    """Return true if the metric measures how fast or how large a model is, not how good."""
    return metric.startswith("throughput/") or metric.endswith("bytes")


def metrics_of(models: Iterable[Any]) -> list[str]:
    """Return all metrics with a direction: token perplexities, means of tasks, scores, speeds.

    Within each kind they come in the order in which they were measured, which is the campaign file's.
    """
    names = dict.fromkeys(name for model in models for name in model.numbers if direction(name))
    return sorted(
        names,
        key=lambda name: (not name.endswith("/token_perplexity"), not is_suite_mean(name), is_speed(name)),
    )


def retention(value: float, dense: float, metric: str) -> float:
    """Return the share of the unpruned model's quality that is left, 1 for all of it.

    Score / unpruned score (*Limits*, Table 2); for what is better when lower, its inverse.
    """
    if direction(metric) == "lower":
        value, dense = dense, value
    return value / dense if dense else float("nan")


def headline_metrics(models: Iterable[Any]) -> list[str]:
    """Return the metrics with a direction, without those of a group's members and repetitions.

    `blimp_wh_island/acc` is a member's where there is `blimp/acc`; a loss repeats its perplexity, and
    `acc_norm` repeats `acc` where no suite counts it.
    """
    names = metrics_of(models)
    subjects = {name.rpartition("/")[0] for name in names}

    def is_member(subject: str) -> bool:
        return any(subject != group and subject.startswith(f"{group}_") for group in subjects if group)

    return [
        name for name in names if not is_member(name.rpartition("/")[0]) and not _is_repetition(name, names)
    ]


def _is_repetition(metric: str, names: Sequence[str]) -> bool:
    subject, _, measure = metric.rpartition("/")
    if measure == "acc_norm":
        return f"{subject}/acc" in names and "classification/mean" not in names
    if subject == "throughput" and measure != "speedup":
        # Tokens a second depend on what else the machine did; the speed-up was measured in turns.
        return measure.startswith("prefill") or "throughput/speedup" in names
    if measure in CODE_CLASSES:
        return f"{subject}/clean" in names
    if measure == "log_probability_vocabulary":
        return f"{subject}/log_probability" in names
    return "loss" in measure and f"{subject}/token_perplexity" in names
