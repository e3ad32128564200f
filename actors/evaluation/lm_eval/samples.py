"""Samples of tasks as files, in the form of `lm_eval --log_samples`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_list


def write_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path) -> None:
    """Write `samples_TASK.jsonl` for each task: a line for each document and filter.

    A line has `doc_id`, `doc`, `target`, the prompt and the rest of each request under `arguments`, the
    responses as the model gave them (`resps`) and after the filter (`filtered_resps`), and the value of
    each of `metrics` under its own name.
    """
    for task, logged in samples.items():
        name = task.replace("/", "_")
        with (directory / f"samples_{name}.jsonl").open("w", encoding="utf-8") as file:
            for sample in logged:
                file.write(_line(sample) + "\n")


def _line(sample: Mapping[str, Any]) -> str:
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": argument for j, argument in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    # Data sets read a column of one type alone, and likelihoods are pairs of a number and a truth value.
    texts = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    written = {**sample, **texts, "arguments": arguments, "target": str(sample["target"])}
    return json.dumps(written, default=handle_non_serializable, ensure_ascii=False)
