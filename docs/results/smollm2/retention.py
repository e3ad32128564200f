"""Print what each method keeps of the unpruned model, as a Markdown table, from the ledgers of the runs.

    python docs/results/smollm2/retention.py [RUN ...]

Kept is score / unpruned score, of the mean accuracy of five tasks, with chance in it. ± is one standard
error over the questions; those of a task are the same for all models, but are counted as if they were
drawn anew for each. Where a method ran with several seeds, numbers are means over them.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import fmean

import pyarrow.dataset

TASKS = ("arc_easy", "winogrande", "lambada_openai", "openbookqa", "boolq")
OTHERS = ("arc_challenge", "blimp_sample", "copa")
"""Tasks that are shown and are not in the mean."""

TEXTS = ("wikitext2", "c4")
NAMES = {
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "arc_easy": "ARC-E",
    "winogrande": "WinoGrande",
    "lambada_openai": "LAMBADA",
    "openbookqa": "OpenBookQA",
    "boolq": "BoolQ",
    "arc_challenge": "ARC-C",
    "blimp_sample": "BLiMP",
    "copa": "COPA",
}
UNPRUNED = (30, "unpruned")

Numbers = dict[str, tuple[float, float]]
"""Values of metrics with their standard errors."""


def measured(runs: Sequence[Path]) -> dict[tuple[int, str], Numbers]:
    """Return the numbers of each method's model by its blocks, over its seeds, and of the unpruned model."""
    found: dict[tuple[int, str], dict[str, dict[int, tuple[float, float]]]]
    found = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        rows = pyarrow.dataset.dataset(run / "ledger").to_table().to_pylist()
        blocks = {
            (row["trajectory"], row["iteration"]): int(row["value"])
            for row in rows
            if (row["stage"], row["metric"]) == ("prune", "layers")
        }
        for row in rows:
            if row["stage"] == "evaluate" and row["phase"] in ("dense", "recovered"):
                pruned = row["phase"] == "recovered"
                model = (blocks[row["trajectory"], row["iteration"]], row["method"]) if pruned else UNPRUNED
                found[model][row["metric"]][row["seed"]] = (row["value"], row["stderr"] or 0.0)
    return {
        model: {
            metric: (fmean(value for value, _ in seeds.values()), max(error for _, error in seeds.values()))
            for metric, seeds in metrics.items()
        }
        for model, metrics in found.items()
    }


def mean(numbers: Numbers, tasks: tuple[str, ...]) -> tuple[float, float]:
    """Return the mean accuracy of some tasks with its standard error."""
    own = [numbers[f"{task}/acc"] for task in tasks]
    return fmean(value for value, _ in own), hypot(*(error for _, error in own)) / len(own)


def kept(numbers: Numbers, dense: Numbers, tasks: tuple[str, ...]) -> str:
    """Return the share of the unpruned model's mean accuracy, in per cent."""
    (value, error), (whole, _) = mean(numbers, tasks), mean(dense, tasks)
    return f"{value / whole:.0%} ± {error / whole:.0%}"


def main() -> None:
    """Read the ledgers and print the table."""
    found = measured([Path(run) for run in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*-blocks")))
    dense = found[UNPRUNED]
    without_boolq = tuple(task for task in TASKS if task != "boolq")
    columns = [NAMES[name] for name in (*TEXTS, *TASKS)]
    head = ["blocks", "method", *columns, "mean", "kept", "kept without BoolQ", *(NAMES[t] for t in OTHERS)]
    print(f"| {' | '.join(head)} |\n|--:|---|{'--:|' * (len(head) - 2)}")
    for (blocks, method), numbers in sorted(
        found.items(), key=lambda each: (-each[0][0], each[1]["wikitext2/loss_nats"])
    ):
        cells = [str(blocks), method, *(f"{numbers[f'{text}/token_perplexity'][0]:.1f}" for text in TEXTS)]
        cells += [f"{numbers[f'{task}/acc'][0]:.3f}" for task in TASKS]
        value, error = mean(numbers, TASKS)
        cells.append(f"{value:.3f} ± {error:.3f}")
        shares = [kept(numbers, dense, tasks) for tasks in (TASKS, without_boolq)]
        cells += ["", ""] if numbers is dense else shares
        cells += [f"{numbers[f'{task}/acc'][0]:.3f}" if f"{task}/acc" in numbers else "" for task in OTHERS]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
