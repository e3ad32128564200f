"""Write the campaign's texts: what recovery learns from, and C4 that no training sees.

    python docs/results/smollm2/texts.py --learn FILE:COLUMN ... --c4 FILE:COLUMN --test FILE ... --out DIR

All files are JSON lines, or plain text for `--test`. A document goes in once, and not if it shares 13 words
in a row with a file of `--test`, whichever of its fields they are in. A third of C4 is apart as c4.jsonl.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS_IN_A_ROW = 13


def grams(text: str) -> set[tuple[str, ...]]:
    """Return all runs of words of the text, without case and punctuation."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + WORDS_IN_A_ROW]) for i in range(len(words) - WORDS_IN_A_ROW + 1)}


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSON lines file; a line may hold line separators of Unicode."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def column(argument: str) -> list[str]:
    """Return the distinct documents of FILE:COLUMN, in the order of the file."""
    path, _, name = argument.rpartition(":")
    return list(dict.fromkeys(row[name] for row in read_rows(Path(path))))


def write(path: Path, documents: list[str]) -> None:
    """Write one document a line, and say how much it is."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    print(f"{path}: {len(documents)} documents, {sum(map(len, documents))} characters")


def main() -> None:
    """Read, filter, mix and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--learn", nargs="+", default=[])
    parser.add_argument("--c4", required=True)
    parser.add_argument("--test", nargs="+", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    tested: set[tuple[str, ...]] = set()
    for path in options.test:
        rows = read_rows(path) if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
        for each in strings(list(rows)):
            tested |= grams(each)
    rng = random.Random(0)
    c4 = column(options.c4)
    rng.shuffle(c4)
    apart = c4[: len(c4) // 3]
    tested |= {gram for text in apart for gram in grams(text)}
    learned = c4[len(apart) :] + [text for argument in options.learn for text in column(argument)]
    learned = [text for text in dict.fromkeys(learned) if not grams(text) & tested]
    rng.shuffle(learned)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "learn.jsonl", learned)
    write(options.out / "c4.jsonl", apart)


if __name__ == "__main__":
    main()
