"""Print what each method keeps of the unpruned model, as a Markdown table, from the ledger of the run.

    python docs/results/smollm2/retention.py [RUN]

Kept is score / unpruned score, of the mean accuracy of five tasks, with chance in it. ± is one standard
error over the questions; those of a task are the same for all models, but are counted as if they were
drawn anew for each. Where a method ran with several seeds, numbers are means over them.
"""

import sys
from collections import defaultdict
from math import hypot
from pathlib import Path
from statistics import fmean

import pyarrow.dataset

TASKS = ("arc_easy", "winogrande", "lambada_openai", "openbookqa", "boolq")
TEXTS = ("wikitext2", "c4")

Numbers = dict[str, tuple[float, float]]
"""Values of metrics with their standard errors."""


def measured(run: Path) -> dict[str, Numbers]:
    """Return the numbers of each method's model, over its seeds, and of the unpruned model."""
    rows = pyarrow.dataset.dataset(run / "ledger").to_table().to_pylist()
    found: dict[str, dict[str, dict[int, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["stage"] == "evaluate" and row["phase"] in ("dense", "recovered"):
            method = "unpruned" if row["phase"] == "dense" else row["method"]
            found[method][row["metric"]][row["seed"]] = (row["value"], row["stderr"] or 0.0)
    return {
        method: {
            metric: (fmean(value for value, _ in seeds.values()), max(error for _, error in seeds.values()))
            for metric, seeds in metrics.items()
        }
        for method, metrics in found.items()
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
    """Read the ledger and print the table."""
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "run"
    found = measured(run)
    dense = found.pop("unpruned")
    without_boolq = tuple(task for task in TASKS if task != "boolq")
    head = ["method", *TEXTS, *TASKS, "mean", "kept", "kept without BoolQ"]
    print(f"| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}")
    for method, numbers in [
        ("unpruned", dense),
        *sorted(found.items(), key=lambda each: each[1]["wikitext2/loss_nats"]),
    ]:
        cells = [method, *(f"{numbers[f'{text}/token_perplexity'][0]:.1f}" for text in TEXTS)]
        cells += [f"{numbers[f'{task}/acc'][0]:.3f}" for task in TASKS]
        value, error = mean(numbers, TASKS)
        cells.append(f"{value:.3f} ± {error:.3f}")
        shares = [kept(numbers, dense, tasks) for tasks in (TASKS, without_boolq)]
        cells += ["", ""] if method == "unpruned" else shares
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
