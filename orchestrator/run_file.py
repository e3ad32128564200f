"""The file that makes a directory a run: the configuration it was started with."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pyarrow.fs import FileSelector

from actors.artifacts import explained, filesystem, read_bytes, write_bytes
from orchestrator.config import holds_credential, parse_config
from orchestrator.errors import ConfigError, RunExistsError
from orchestrator.store import Store, installed_versions

FORMAT = 1

NOT_COMPARED_ON_RESUME = ("execution", "storage", "cost", "tracking")
"""Sections that say where and how fast a campaign runs and who is told, not what it computes."""


def open_run(
    store: Store,
    config: dict[str, Any],
    resume: bool,
    planned: Mapping[str, int] | None = None,
    trajectories: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Start a run at `store`, or continue the one that is there.

    With `resume` and nothing there, a new run is started, so that a restarted
    job can always be given the same command.

    Args:
        planned: iterations of each trajectory, for those who want to know how far the run is.
        trajectories: `trajectory` (its id), `model`, `method` and the `depths` at which it is measured.

    Raises:
        RunExistsError: as `check_run`.
    """
    check_run(store, config, resume)
    if read_run(store) is not None:
        return
    header = {"format": FORMAT, "config": config, "versions": installed_versions()}
    header |= {"planned": dict(planned or {}), "trajectories": list(trajectories)}
    header["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_bytes(store.run_file_uri, json.dumps(header, indent=2).encode())


def check_run(store: Store, config: dict[str, Any], resume: bool) -> None:
    """Whether `open_run` would go ahead; changes nothing.

    Raises:
        RunExistsError: a run is there and `resume` is off, it was started with
            another configuration, or the directory holds something else.
    """
    stored = read_run(store)
    if stored is None:
        if _holds_something(store.uri):
            raise RunExistsError(
                f"{store.uri} is not empty and holds no run; choose another storage.path or name"
            )
        return
    if not resume:
        raise RunExistsError(
            f"{store.uri} holds a run; continue it with --resume or choose another storage.path or name"
        )
    if changes := _differences(_completed(stored["config"]), json.loads(json.dumps(config))):
        raise RunExistsError(
            f"{store.uri} was started with another configuration; undo these changes or choose another "
            "name:\n" + "\n".join(f"  {line}" for line in changes)
        )


def read_run(store: Store) -> dict[str, Any] | None:
    """What `open_run` wrote, or None if there is no run.

    It holds `config`, `versions`, `planned`, `trajectories` and `created_at`.
    """
    text = read_bytes(store.run_file_uri)
    return None if text is None else json.loads(text)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration as this version would record it: fields that came later at their defaults.

    What this version cannot read is compared as it stands.
    """
    try:
        return parse_config(config, "campaign.json").model_dump(mode="json")
    except ConfigError:
        return config


def _holds_something(uri: str) -> bool:
    """Whether there is anything but hidden files, such as our own unfinished ones."""
    fs, path = filesystem(uri)
    with explained(uri, "list"):
        entries = fs.get_file_info(FileSelector(path, allow_not_found=True))
    return any(not entry.base_name.startswith(".") for entry in entries)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old → new` for every dotted field that changes what is computed."""
    before, after = _flatten(old), _flatten(new)
    absent = "(absent)"
    return [
        f"{name}: {before.get(name, absent)} → {after.get(name, absent)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
        and name.split(".")[0] not in NOT_COMPARED_ON_RESUME
    ]


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
