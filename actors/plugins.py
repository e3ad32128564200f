"""Criteria, objectives and probes of other installed packages, which register them as entry points.

A package that is to be used on a cluster is installed on every node, as this one is;
a node that has another version than the driver, or none, is found by what `environment` passes on.
"""

import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, TypeVar

from actors.contracts import EvaluationSpec, RecoverySpec, ScoreSpec
from actors.errors import RequestError, WorkError, unknown_name

RowT = TypeVar("RowT")

GROUPS: Mapping[str, str] = {
    "criterion": "iterabre.criteria",
    "recovery objective": "iterabre.objectives",
    "probe": "iterabre.probes",
}
"""The group of entry points of each kind of row."""

STARTED_WITH = "ITERABRE_PLUGINS"
"""The variable that holds what the driver has, for its workers: {kind: {name: release}}, as JSON."""

UNUSABLE = (ImportError, AttributeError, NameError, SyntaxError, TypeError, ValueError, OSError)
"""What a package that does not fit this version, or this machine, raises when it is imported."""


def find_row(kind: str, name: str, built_in: Mapping[str, RowT], row_type: type[RowT]) -> RowT:
    """Return the row of that name: of the table `built_in`, or what a package has registered.

    Raises:
        RequestError: there is none, a package has taken a name of the table's, two have the
            same, or what is registered cannot be imported or is no `row_type`.
        WorkError: this node has another version of the package than the driver, or none.
    """
    others = registered(kind)
    found = sorted(others.select(name=name), key=_release)
    wanted = json.loads(os.environ.get(STARTED_WITH, "{}")).get(kind, {}).get(name)
    here = [_release(entry) for entry in found]
    if wanted is not None and here != [wanted]:
        raise WorkError(
            f"{kind} {name!r} is that of {wanted} where the campaign was started, but the node "
            f"{platform.node()} has {' and '.join(here) or 'no such package'}; install {wanted} on every "
            "node, then --resume"
        )
    if not found:
        if name not in built_in:
            raise unknown_name(kind, name, {*built_in, *others.names})
        return built_in[name]
    if name in built_in or len(found) > 1:
        ours = ["this project"] if name in built_in else []
        holders = " and ".join([*ours, *here])
        raise RequestError(f"{kind} {name!r} is registered by {holders}; uninstall or rename one")
    return _loaded(kind, found[0], row_type)


def releases(spec: Any) -> list[str]:
    """Return the name and version of each package whose rows a spec names, for the key of its result."""
    match spec:
        case ScoreSpec():
            kind, names = "criterion", [spec.criterion]
        case RecoverySpec():
            kind, names = "recovery objective", [spec.objective]
        case EvaluationSpec():
            kind, names = "probe", list(spec.probes)
        case _:
            return []
    return sorted(_release(entry) for entry in registered(kind) if entry.name in names)


def environment() -> dict[str, str]:
    """Return the variables that a driver sets for its workers, on whatever node they start."""
    rows = {kind: {entry.name: _release(entry) for entry in registered(kind)} for kind in GROUPS}
    return {STARTED_WITH: json.dumps(rows)}


@cache  # It reads the metadata of all installed packages, and keys need it thousands of times.
def registered(kind: str) -> EntryPoints:
    """Return the entry points of that kind of all installed packages."""
    return entry_points(group=GROUPS[kind])


def _loaded(kind: str, entry: EntryPoint, row_type: type[RowT]) -> RowT:
    try:
        row = entry.load()
    except UNUSABLE as error:
        raise RequestError(
            f"{kind} {entry.name!r} of {_release(entry)} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}; mend the package, or install a version that fits this one"
        ) from error
    if not isinstance(row, row_type):
        raise RequestError(
            f"{kind} {entry.name!r} of {_release(entry)} ({entry.value}) is a {type(row).__name__}; "
            f"register a {row_type.__name__}"
        )
    return row


def _release(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
