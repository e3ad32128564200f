"""The file that makes a directory a run: the configuration it was started with."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from actors.artifacts import list_all, read_bytes, write_bytes
from orchestrator.config import (
    CampaignConfig,
    absolute_path,
    holds_credential,
    parse_config,
    with_absolute_paths,
)
from orchestrator.errors import ConfigError, RequestError, RunExistsError
from orchestrator.storage.stage_manifest import installed_versions
from orchestrator.storage.stage_store import Store

FORMAT = 1

NOT_COMPARED_ON_RESUME = ("execution", "storage", "cost", "tracking")
"""Sections that say where and how fast a campaign runs and where it publishes, not what it computes."""


def open_run(
    store: Store,
    config: dict[str, Any],
    resume: bool,
    planned: Mapping[str, int] | None = None,
    directories: Sequence[str] = (),
    trajectories: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Start a run at `store`, or continue the one that is there.

    With `resume` and nothing there, a new run is started, so that a restarted
    job can always be given the same command.

    Args:
        config: as it is written, with relative paths.
        planned: iterations of each trajectory, to tell how far the run is.
        directories: where relative paths of `config` are looked for.
        trajectories: `trajectory` (its id), `model`, `method` and the `depths` at which it is measured.

    Raises:
        RunExistsError: as `check_run`.
    """
    check_run(store, config, resume, directories)
    if read_run(store) is not None:
        return
    header = {"format": FORMAT, "config": config, "versions": installed_versions()}
    header |= {"planned": dict(planned or {}), "trajectories": list(trajectories)}
    header["directories"] = list(directories)
    header["local_paths"] = sorted(_local_paths(config, directories))
    header["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_bytes(store.run_manifest_uri, json.dumps(header, indent=2).encode())


def check_run(store: Store, config: dict[str, Any], resume: bool, directories: Sequence[str] = ()) -> None:
    """Check that `open_run` would go ahead; change nothing.

    A path is the same if it is written the same, so that run, model and data may move together, or
    if it leads to the same place, so that a run may go on from another directory.

    Raises:
        RunExistsError: a run is there and `resume` is off, it was started with
            another configuration, or the directory holds something else.
    """
    stored = read_run(store)
    if stored is None:
        # Hidden files are such as our own unfinished ones.
        if any(not entry.base_name.startswith(".") for entry in list_all(store.uri)):
            raise RunExistsError(
                f"{store.uri} is not empty and holds no run; choose another storage.path or name"
            )
        return
    if not resume:
        raise RunExistsError(
            f"{store.uri} holds a run; continue it with --resume or choose another storage.path or name"
        )
    before = _located(stored["config"], stored.get("directories") or directories)
    written = _differences(_located(stored["config"], ()), json.loads(json.dumps(config)))
    found = _differences(before, _located(config, directories))
    here = _local_paths(config, directories)
    other = (here ^ set(stored.get("local_paths", here))) - written.keys()
    if other:
        raise RunExistsError(
            f"{store.uri} was started where other paths were found than here: {', '.join(sorted(other))}; "
            "give the command in the same directory as before, or absolute paths"
        )
    if changes := [line for field, line in written.items() if field in found]:
        raise RunExistsError(
            f"{store.uri} was started with another configuration; undo these changes or choose another "
            "name:\n" + "\n".join(f"  {line}" for line in changes)
        )


def read_run(store: Store) -> dict[str, Any] | None:
    """Return what `open_run` wrote, or None if there is no run.

    It holds `config`, `versions`, `planned`, `trajectories`, `created_at`, ….
    """
    text = read_bytes(store.run_manifest_uri)
    return None if text is None else json.loads(text)


def started_at_first(store: Store) -> datetime | None:
    """Return when the run was started for the first time; None if there is none."""
    stored = read_run(store)
    return None if stored is None else datetime.fromisoformat(stored["created_at"])


def existing_run(store: Store, named: str | None = None) -> dict[str, Any]:
    """Return what `open_run` wrote, as `read_run`.

    Raises:
        RequestError: there is no run; the message has `named` for it.
    """
    stored = read_run(store)
    if stored is None:
        raise RequestError(f"{named or repr(store.uri)} holds no run: there is no campaign.json in it")
    return stored


def recorded_store(run: str, named: str | None = None) -> Store:
    """Return the store of the run at `run`, with the cache of stages that the run uses.

    Raises:
        RequestError: as `existing_run`.
    """
    store = Store(run)
    stored = existing_run(store, named)
    cache = stored["config"].get("storage", {}).get("cache")
    return Store(run, cache=cache and absolute_path(cache, stored.get("directories", ())))


def recorded_config(store: Store, named: str | None = None) -> CampaignConfig:
    """Return the configuration that a run was started with.

    Its relative paths are looked for where they were, and else in the current directory.

    Raises:
        RequestError: as `existing_run`.
    """
    stored = existing_run(store, named)
    config = parse_config(stored["config"], store.run_manifest_uri)
    return config.read_in((*stored.get("directories", ()), os.getcwd()))


def _located(config: dict[str, Any], directories: Sequence[str]) -> dict[str, Any]:
    """Return a configuration as this version would record it, with those paths absolute that are found.

    Fields that came later have their defaults. What this version cannot read stays as it stands.
    """
    try:
        parsed = parse_config(config, "campaign.json")
    except ConfigError:
        return json.loads(json.dumps(config))
    return with_absolute_paths(parsed, directories).model_dump(mode="json")


def _local_paths(config: dict[str, Any], directories: Sequence[str]) -> set[str]:
    """Return the fields with a relative path that leads somewhere on this machine."""
    return set(_differences(_located(config, ()), _located(config, directories)))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return `field: old → new` for every dotted field that changes what is computed, by the field."""
    before, after = _flatten(old), _flatten(new)
    absent = "(absent)"
    return {
        name: f"{name}: {before.get(name, absent)} → {after.get(name, absent)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
        and name.split(".")[0] not in NOT_COMPARED_ON_RESUME
        and not name.endswith(".priority")
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    items: Any = enumerate(value) if isinstance(value, list) else value.items() if value else ()
    flat: dict[str, str] = {}
    for name, item in items:
        dotted = f"{prefix}{name}"
        if isinstance(item, dict | list) and item:
            flat |= _flatten(item, f"{dotted}.")
        else:
            text = json.dumps(item)
            flat[dotted] = "(a credential)" if holds_credential(text) else text
    return flat
