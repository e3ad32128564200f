"""The file that makes a directory a run: the configuration it was started with."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from actors.artifacts import list_all, read_bytes, write_bytes
from orchestrator.config import CampaignConfig, absolute_path, parse_config
from orchestrator.errors import RequestError, RunExistsError
from orchestrator.storage.stage_manifest import installed_versions
from orchestrator.storage.stage_store import Store

FORMAT = 1


def open_run(
    store: Store,
    config: dict[str, Any],
    planned: Mapping[str, int] | None = None,
    directories: Sequence[str] = (),
    trajectories: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Start a run at `store`, or leave as it is the one that is there; `check_run` comes first.

    Args:
        config: as it is written, with relative paths.
        planned: iterations of each trajectory, to tell how far the run is.
        directories: where relative paths of `config` are looked for.
        trajectories: `trajectory` (its id), `model`, `method` and the `depths` at which it is measured.
    """
    if read_run(store) is None:
        _write(store, {"format": FORMAT, "created_at": _now()}, config, planned, directories, trajectories)


def update_run(
    store: Store,
    config: dict[str, Any],
    planned: Mapping[str, int],
    directories: Sequence[str],
    trajectories: Sequence[Mapping[str, Any]],
    changes: Sequence[str],
) -> None:
    """Record that the run at `store` goes on with another configuration, and what has changed.

    What it was before stays in `former`, the newest last; the arguments are those of `open_run`.
    """
    recorded = existing_run(store)
    former = {name: recorded.get(name) for name in ("config", "versions", "directories")}
    former |= {"until": _now(), "changes": list(changes)}
    kept = {"format": FORMAT, "created_at": recorded.get("created_at")}
    kept["former"] = [*recorded.get("former", ()), former]
    _write(store, kept, config, planned, directories, trajectories)


def check_run(store: Store, resume: bool) -> None:
    """Check that a run can start or go on at `store`; change nothing.

    With `resume` and nothing there, a new run is started, so that a restarted job can always be given the
    same command.

    Raises:
        RunExistsError: a run is there and `resume` is off, or the directory holds something else.
    """
    if read_run(store) is None:
        # Hidden files are such as our own unfinished ones.
        if any(not entry.base_name.startswith(".") for entry in list_all(store.uri)):
            raise RunExistsError(
                f"{store.uri} is not empty and holds no run; choose another storage.path or name"
            )
    elif not resume:
        raise RunExistsError(
            f"{store.uri} holds a run; continue it with --resume or choose another storage.path or name"
        )


def read_run(store: Store) -> dict[str, Any] | None:
    """Return what `open_run` wrote, or None if there is no run.

    It holds `config`, `versions`, `planned`, `trajectories`, `created_at`, …, and in `former` what was
    recorded before the run went on with another configuration.
    """
    text = read_bytes(store.run_manifest_uri)
    return None if text is None else json.loads(text)


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


def _write(
    store: Store,
    kept: Mapping[str, Any],
    config: dict[str, Any],
    planned: Mapping[str, int] | None,
    directories: Sequence[str],
    trajectories: Sequence[Mapping[str, Any]],
) -> None:
    header = {
        **kept,
        "config": config,
        "versions": installed_versions(),
        "planned": dict(planned or {}),
        "trajectories": list(trajectories),
        "directories": list(directories),
    }
    write_bytes(store.run_manifest_uri, json.dumps(header, indent=2).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
