"""Data sets of the tasks in this folder, for lm-eval's `custom_dataset`.

lm-eval passes a task's `dataset_kwargs` and its metadata as keywords. The data
are found through the installed package, so the tasks run from any directory.
"""

import json
import re
from typing import Any

from datasets import Dataset

from actors.data import builtin_file


def blimp_sample(**_: Any) -> dict[str, Dataset]:
    """Return minimal pairs: `sentence_good`, `sentence_bad`, `UID`."""
    lines = builtin_file("blimp-sample.jsonl").read_text(encoding="utf-8").splitlines()
    return {"validation": Dataset.from_list([json.loads(line) for line in lines])}


def wikitext2_pages(num_pages: int, **_: Any) -> dict[str, Dataset]:
    """Return the first pages of the WikiText-2 raw test split, as in its document-level version.

    A page starts at a top-level heading, a line ` = Title = `, and leaves out
    the newline before the next one.
    """
    text = builtin_file("wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    pages = re.split(r"\n(?= = [^=\n][^\n]* = \n)", text)[1:]
    return {"test": Dataset.from_list([{"page": page} for page in pages[:num_pages]])}
