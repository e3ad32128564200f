"""Documents whose likeliest choice is no likelier than another: lm-eval then counts the first one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.contracts import Metric


def tie_metrics(
    tasks: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    groups: Mapping[str, Sequence[str]],
) -> Iterator[Metric]:
    """Yield `TASK/ties`, a number of documents, for each multiple-choice task and group that has any.

    Args:
        tasks: lm-eval's tasks by name.
        samples: lm-eval's logged samples by task, with `doc`, `doc_id` and `filtered_resps` each.
        groups: names of the tasks and groups in each group; no more than a name for a single task.
    """
    counts = {
        name: len({sample["doc_id"] for sample in samples[name] if _is_tied(task, sample)})
        for name, task in tasks.items()
        if task.OUTPUT_TYPE == "multiple_choice" and name in samples
    }

    def total(name: str) -> int:
        return counts[name] if name in counts else sum(map(total, groups.get(name, ())))

    for name in dict.fromkeys((*counts, *groups)):
        if count := total(name):
            yield Metric(f"{name}/ties", count, "documents")


def _is_tied(task: Any, sample: Mapping[str, Any]) -> bool:
    # Where likelihoods without context are requested as well, they follow those of the choices.
    num_choices = len(task.doc_to_choice(sample["doc"]))
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"][:num_choices]]
    return likelihoods.count(max(likelihoods)) > 1
