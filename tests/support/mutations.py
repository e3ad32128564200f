"""Seeded damage to files, as disks, editors, converters and other tools do it."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**63, 1e-30, 0.5, "", "4", "nonsense", [], [1, "two"], {}, {"a": 1},
)  # fmt: skip
"""Values of all JSON types, hardly ever the right one."""


def mutate(file: Path, rng: Random) -> str:
    """Damage `file` in one drawn way and return a description of it."""
    ways = [*BYTE_MUTATIONS, *(JSON_MUTATIONS if _holds_object(file) else ())]
    way = rng.choice(ways)
    way(file, rng)
    return f"{way.__name__.removeprefix('_')} {file.name}"


def mutate_directory(directory: Path, rng: Random) -> str:
    """Damage one drawn file of `directory`, or exchange or delete files; return a description."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    file = rng.choice(files)
    kind = rng.random()
    if kind < 0.1:
        file.unlink()
        return f"delete {file.name}"
    if kind < 0.2:
        other = rng.choice([f for f in files if f != file])
        held = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(held)
        return f"exchange {file.name} and {other.name}"
    return mutate(file, rng)


def _truncate(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _append(file: Path, rng: Random) -> None:
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.randint(1, 40)))


def _overwrite(file: Path, rng: Random) -> None:
    """A few bytes at a drawn place, most often near the beginning, where headers are."""
    content = bytearray(file.read_bytes())
    start = min(int(rng.expovariate(1 / 400)), len(content) - 1)
    drawn = rng.randbytes(rng.randint(1, 8))
    content[start : start + len(drawn)] = drawn
    file.write_bytes(content)


def _cut_out(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    start = rng.randrange(len(content))
    file.write_bytes(content[:start] + content[start + rng.randint(1, 60) :])


def _repeat_a_part(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    start = rng.randrange(len(content))
    end = start + rng.randint(1, 60)
    file.write_bytes(content[:end] + content[start:end] + content[end:])


def _add_byte_order_mark(file: Path, _rng: Random) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def _windows_line_ends(file: Path, _rng: Random) -> None:
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


def _other_encoding(file: Path, rng: Random) -> None:
    text = file.read_bytes().decode("utf-8", errors="replace")
    file.write_bytes(text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "cp037"]), errors="replace"))


def _empty(file: Path, _rng: Random) -> None:
    file.write_bytes(b"")


def _drop_a_key(file: Path, rng: Random) -> None:
    held = json.loads(file.read_text())
    place = _drawn_object(held, rng)
    del place[rng.choice(sorted(place))]
    file.write_text(json.dumps(held))


def _wrong_value(file: Path, rng: Random) -> None:
    held = json.loads(file.read_text())
    place = _drawn_object(held, rng)
    place[rng.choice(sorted(place))] = rng.choice(WRONG_VALUES)
    file.write_text(json.dumps(held))


def _exchange_values(file: Path, rng: Random) -> None:
    held = json.loads(file.read_text())
    place = _drawn_object(held, rng)
    one, other = rng.choice(sorted(place)), rng.choice(sorted(place))
    place[one], place[other] = place[other], place[one]
    file.write_text(json.dumps(held))


def _wrong_whole(file: Path, rng: Random) -> None:
    file.write_text(json.dumps(rng.choice(WRONG_VALUES)))


Mutation = Callable[[Path, Random], None]
BYTE_MUTATIONS: tuple[Mutation, ...] = (
    _truncate, _append, _overwrite, _cut_out, _repeat_a_part, _add_byte_order_mark, _windows_line_ends,
    _other_encoding, _empty,
)  # fmt: skip
JSON_MUTATIONS: tuple[Mutation, ...] = (
    _drop_a_key,
    _wrong_value,
    _wrong_value,
    _exchange_values,
    _wrong_whole,
)


def _holds_object(file: Path) -> bool:
    try:
        held = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(held, dict) and bool(held)


def _drawn_object(held: dict[str, Any], rng: Random) -> dict[str, Any]:
    """The object itself, or now and then one inside it."""
    inner = [value for value in held.values() if isinstance(value, dict) and value]
    return _drawn_object(rng.choice(inner), rng) if inner and rng.random() < 0.4 else held
