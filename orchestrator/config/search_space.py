"""Search spaces: a method with spaces for values becomes concrete methods, when the file is read.

Pure and seeded, so that the plan shows every method that will run, a run that is
resumed meets the same ones, and two campaigns agree on them.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.errors import ConfigError

Path = tuple[str, ...]
SIGNIFICANT_DIGITS = 3
"""Drawn numbers are rounded to so many, so that a method's name has its whole value."""


DRAWN: Mapping[str, Callable[[random.Random, list[Any]], Any]] = {
    "choice": lambda draw, options: draw.choice(options),
    "uniform": lambda draw, bounds: _rounded(draw.uniform(*bounds)),
    "loguniform": lambda draw, bounds: _rounded(math.exp(draw.uniform(*map(math.log, bounds)))),
}
"""Spaces that values are drawn from, `search.samples` times; of a `grid`, every value is taken."""

SPACES = frozenset({"grid", *DRAWN})


def variants(method: Mapping[str, Any], samples: int, seed: int, where: str) -> list[dict[str, Any]]:
    """Return the concrete methods that `method`, read from YAML at `where`, stands for.

    That is every point of its grids, each with the same `samples` draws of its other
    spaces. A draw depends on `seed`, the method's name and the field alone. Variants
    that come out equal are taken once. A method without spaces is itself.

    Raises:
        ConfigError: a space is not written as one; names the field.
    """
    spaces = dict(_spaces(method, ()))
    for path, (kind, options) in spaces.items():
        _check(kind, options, ".".join((where, *path)))
    if not spaces:
        return [dict(method)]
    grids = {path: options for path, (kind, options) in spaces.items() if kind == "grid"}
    drawn = {path: space for path, space in spaces.items() if space[0] != "grid"}
    sources = {path: random.Random(f"{seed}/{method.get('name')}/{'.'.join(path)}") for path in drawn}
    draws = [
        {path: DRAWN[kind](sources[path], options) for path, (kind, options) in drawn.items()}
        for _ in range(samples if drawn else 1)
    ]
    found: dict[str, dict[str, Any]] = {}
    for point in itertools.product(*grids.values()):
        for draw in draws:
            values = {**dict(zip(grids, point, strict=True)), **draw}
            name = _name(method.get("name"), {path: values[path] for path in spaces}, spaces)
            found.setdefault(name, {**_filled(method, values, ()), "name": name})
    return list(found.values())


def _spaces(value: Any, path: Path) -> Iterator[tuple[Path, tuple[str, Any]]]:
    if not isinstance(value, dict):
        return
    if len(value) == 1 and (kind := next(iter(value))) in SPACES:
        yield path, (kind, value[kind])
        return
    for name, inner in value.items():
        yield from _spaces(inner, (*path, str(name)))


def _check(kind: str, options: Any, where: str) -> None:
    if not isinstance(options, list) or not options:
        raise ConfigError(f"{where}: write the space as {{{kind}: [..., ...]}} (got {options!r})")
    if kind in ("grid", "choice"):
        return
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in options)
    if not numbers or len(options) != 2 or not options[0] < options[1]:
        raise ConfigError(f"{where}: {kind} takes two numbers, the lower first (got {options!r})")
    if kind == "loguniform" and options[0] <= 0:
        raise ConfigError(f"{where}: loguniform takes numbers above 0 (got {options!r})")


def _filled(value: Any, values: Mapping[Path, Any], path: Path) -> Any:
    """Return `value` with its spaces replaced by `values`."""
    if path in values:
        return values[path]
    if isinstance(value, Mapping):
        return {name: _filled(inner, values, (*path, str(name))) for name, inner in value.items()}
    return value


def _name(base: Any, values: Mapping[Path, Any], spaces: Mapping[Path, tuple[str, Any]]) -> str:
    """Return `base--field=value--field=value`; a field by its last part where that is enough."""
    last = [path[-1] for path in values]
    parts = [
        f"{path[-1] if last.count(path[-1]) == 1 else '.'.join(path)}={_text(value, spaces[path][1])}"
        for path, value in values.items()
    ]
    return "--".join([str(base), *parts])


def _text(value: Any, options: list[Any]) -> str:
    """Return a value as part of a name: written out, or the position of what cannot be."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return text if re.fullmatch(r"[A-Za-z0-9._+-]+", text) else f"option{options.index(value)}"


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
