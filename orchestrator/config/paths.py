"""Paths of a campaign file: which fields hold one, and which file or directory of this machine is meant.

Workers of a cluster have working directories of their own. So paths become absolute once, in the
driver, before anything is sent; hub ids, URIs and names stay as they are.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from actors.contracts import LocalPath, Settings
from orchestrator.config.section import SECTIONS, fields_of

SectionT = TypeVar("SectionT", bound=BaseModel | Settings)


def absolute_path(path: str, directories: Sequence[str | Path] = (".",)) -> str:
    """Return the absolute path of what `path` names in the first of `directories` that has it.

    Otherwise `path` itself: a hub id, a URI, or nothing that is on this machine.
    """
    if not path or "://" in path:
        return path
    expanded = os.path.expanduser(path)
    if os.path.isabs(expanded):
        return os.path.abspath(expanded)
    candidates = (os.path.abspath(os.path.join(directory, expanded)) for directory in directories)
    return next((candidate for candidate in candidates if os.path.lexists(candidate)), path)


def with_absolute_paths(section: SectionT, directories: Sequence[str | Path]) -> SectionT:
    """Return `section` with every path in it absolute, see `absolute_path`."""
    changed: dict[str, Any] = {}
    for name, field in fields_of(type(section)).items():
        value = getattr(section, name)
        marker = next((mark for mark in field.metadata if isinstance(mark, LocalPath)), None)
        if marker is not None and value is not None and value not in marker.names:
            changed[name] = absolute_path(value, directories)
        elif isinstance(value, SECTIONS):
            changed[name] = with_absolute_paths(value, directories)
        elif isinstance(value, list | tuple) and any(isinstance(item, SECTIONS) for item in value):
            changed[name] = type(value)(with_absolute_paths(item, directories) for item in value)
    if isinstance(section, BaseModel):
        return section.model_copy(update=changed)
    return replace(section, **changed)  # type: ignore[type-var]
