"""What a run has used of the cluster: one small file for each start of its driver, and their sum.

The ledger has the stages that were finished. What it cannot have is here: the devices of nodes that were
up, at work or idle, and of attempts that failed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from actors.artifacts import join, list_files, read_bytes, write_bytes
from orchestrator.storage.layout import RunLayout

SUFFIX = ".json"


@dataclass(frozen=True)
class Usage:
    """Device seconds: of nodes that were up, beside what others held there; of stages; of failed attempts."""

    up_s: float = 0.0
    worked_s: float = 0.0
    failed_s: float = 0.0

    @property
    def idle_s(self) -> float:
        """Device seconds in which nodes were up and no stage of the campaign held the device."""
        return max(0.0, self.up_s - self.worked_s - self.failed_s)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.up_s + other.up_s, self.worked_s + other.worked_s, self.failed_s + other.failed_s)


def write_usage(run: RunLayout, started_at: float, usage: Usage) -> None:
    """Write what has been used since a start of the driver, in place of what was written of that start."""
    write_bytes(_uri(run, started_at), json.dumps(asdict(usage)).encode())


def usage_since(run: RunLayout, started_at: float) -> Usage:
    """Return what was written of the start of the driver at that time; nothing if there is none."""
    return _read(_uri(run, started_at))


def total_usage(run: RunLayout) -> Usage:
    """Return what a run has used in all."""
    return _sum([_read(join(run.usage_uri, info.base_name)) for info in list_files(run.usage_uri)])


def usage_before(run: RunLayout, started_at: float) -> Usage:
    """Return what a run has used before the start of the driver at that time."""
    own = _uri(run, started_at)
    uris = [join(run.usage_uri, info.base_name) for info in list_files(run.usage_uri)]
    return _sum([_read(uri) for uri in uris if uri != own])


def _uri(run: RunLayout, started_at: float) -> str:
    return join(run.usage_uri, f"{started_at:.3f}{SUFFIX}")


def _read(uri: str) -> Usage:
    stored = read_bytes(uri)
    return Usage() if stored is None else Usage(**json.loads(stored))


def _sum(usages: Sequence[Usage]) -> Usage:
    return sum(usages, start=Usage())
