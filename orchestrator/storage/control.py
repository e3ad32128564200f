"""What an operator wants of a run while it goes: `control.json`, written by a command on any machine.

The driver's coordinator reads it every few seconds. It outlives the driver: a run that was paused is
paused when it is resumed, and a trajectory that was cancelled stays so.
"""

import json
import logging
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from actors.artifacts import read_bytes, write_bytes
from actors.errors import RequestError
from orchestrator.storage.layout import RunLayout

log = logging.getLogger(__name__)

READ_INTERVAL_S = 3.0
PATIENCE_S = 1.0
"""Longest wait for what was last read long ago."""


@dataclass(frozen=True)
class Control:
    """What is asked of a run.

    Attributes:
        paused: no further stage starts.
        cancelled: trajectories that are not to go on.
        methods: priorities that replace those of the campaign file, by the name of the method.
        models: the same, by the id of the model.
    """

    paused: bool = False
    cancelled: Collection[str] = ()
    methods: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, int] = field(default_factory=dict)

    def cancelling(self, trajectories: Collection[str]) -> "Control":
        """Return the same with these trajectories cancelled."""
        return replace(self, cancelled=sorted({*self.cancelled, *trajectories}))

    def continuing(self, trajectories: Collection[str]) -> "Control":
        """Return the same with these trajectories no longer cancelled."""
        return replace(self, cancelled=sorted(set(self.cancelled) - set(trajectories)))

    def prioritising(self, methods: Collection[str], models: Collection[str], priority: int) -> "Control":
        """Return the same with that priority for these methods and models."""
        return replace(
            self,
            methods={**self.methods, **dict.fromkeys(methods, priority)},
            models={**self.models, **dict.fromkeys(models, priority)},
        )


@dataclass(frozen=True)
class Origin:
    """What of a trajectory priorities go by: method and model, and their priorities in the campaign file."""

    method: str
    model: str
    method_priority: int = 0
    model_priority: int = 0


@dataclass(frozen=True)
class Directives:
    """A `Control` in the terms of the coordinator. Higher priorities go first; 0 is usual."""

    paused: bool = False
    cancelled: Collection[str] = ()
    priorities: Mapping[str, int] = field(default_factory=dict)


def directives(control: Control, origins: Mapping[str, Origin]) -> Directives:
    """Return what `control` means for the trajectories of a campaign, given by id.

    A trajectory's priority is that of its method plus that of its model.
    """
    priorities = {
        trajectory: control.methods.get(origin.method, origin.method_priority)
        + control.models.get(origin.model, origin.model_priority)
        for trajectory, origin in origins.items()
    }
    return Directives(control.paused, frozenset(control.cancelled), priorities)


def read_control(store: RunLayout) -> Control:
    """Return what is asked of the run; nothing is if nobody wrote it.

    Raises:
        RequestError: the file is not what `write_control` writes.
    """
    content = read_bytes(store.control_uri)
    if content is None:
        return Control()
    try:
        stored: dict[str, Any] = json.loads(content)
        known = Control()
        return Control(
            bool(stored.get("paused", known.paused)),
            tuple(map(str, stored.get("cancelled", ()))),
            {str(name): int(value) for name, value in stored.get("methods", {}).items()},
            {str(name): int(value) for name, value in stored.get("models", {}).items()},
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{store.control_uri} cannot be read ({error}); delete it, then give `iterabre pause`, `cancel` "
            "and `prioritise` again"
        ) from error


def write_control(store: RunLayout, control: Control) -> None:
    """Write what is asked of the run, in place of what was asked before."""
    content = asdict(control) | {"cancelled": list(control.cancelled)}
    write_bytes(store.control_uri, json.dumps(content, indent=1).encode())


class ControlReader:
    """The newest `Directives` of a run, read again every few seconds while they are asked for.

    After the first time it does not wait for a slow storage, as a thread reads: the coordinator, which asks
    for each request, must not stand still. What cannot be read leaves all as it was. Picklable before the
    first call.
    """

    def __init__(
        self, store: RunLayout, origins: Mapping[str, Origin], interval_s: float | None = None
    ) -> None:
        self._store = store
        self._origins = origins
        self._interval_s = READ_INTERVAL_S if interval_s is None else interval_s
        self._newest: Directives | None = None
        self._read_at = 0.0
        self._reading = False

    def __call__(self) -> Directives:
        if self._newest is None:
            self._newest = directives(Control(), self._origins)
            self._read()
        elif not self._reading and (age_s := time.monotonic() - self._read_at) > self._interval_s:
            self._reading = True
            reading = threading.Thread(target=self._read, name="control", daemon=True)
            reading.start()
            if age_s > 3 * self._interval_s:  # nobody has asked for long
                reading.join(PATIENCE_S)
        return self._newest

    def _read(self) -> None:
        try:
            self._newest = directives(read_control(self._store), self._origins)
        except Exception as error:
            log.warning("%s cannot be read; what was asked before holds: %s", self._store.control_uri, error)
        finally:
            self._read_at = time.monotonic()
            self._reading = False
