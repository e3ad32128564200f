"""Where a number comes from: the stages behind the ledger's rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

MOST_USES = 4
NO_MANIFEST = ("prune",)
"""Stages that compute nothing, so that nothing is stored of them."""


@dataclass(frozen=True)
class Stage:
    """A stage, its first measurement, and all the places that use it."""

    key: str
    kind: str
    when: datetime
    where: str
    seconds: float | None
    used_by: tuple[str, ...]
    place: str | None = None

    @property
    def anchor(self) -> str:
        return anchor_of(self.key)

    @property
    def hint(self) -> str:
        """Kind and short key, for a tooltip."""
        return f"{self.kind} {self.key[:8]}"

    @property
    def uses(self) -> str:
        """The places that use it, of many the first."""
        more = len(self.used_by) - MOST_USES
        return "; ".join(self.used_by[:MOST_USES]) + (f"; and {more} more" if more > 0 else "")

    @property
    def manifest(self) -> str | None:
        """The manifest (settings, data hashes, versions) below `place`; None if no link leads there."""
        known = self.place is not None and self.kind not in NO_MANIFEST
        return f"{self.place}/{self.kind}/{self.key}/manifest.json" if known else None


def anchor_of(key: str) -> str:
    """Return the anchor of the place on the page that describes a stage."""
    return f"stage-{key[:16]}"


def stages_of(ledger: pa.Table, place: str | None = None) -> Mapping[str, Stage]:
    """Return every stage by its key, in the order of the ledger; `place` is where their manifests lie."""
    columns = ["key", "stage", "trajectory", "iteration", "phase", "when", "where"]
    rows = ledger.group_by(columns, use_threads=False).aggregate([]).to_pylist()
    timed = ledger.filter(pa.compute.field("metric") == "seconds")
    seconds = dict(zip(timed["key"].to_pylist(), timed["value"].to_pylist(), strict=True))
    first: dict[str, dict[str, Any]] = {}
    uses: dict[str, dict[str, None]] = {}
    for row in rows:
        phase = f", {row['phase']}" if row["phase"] else ""
        use = f"{row['trajectory']} iteration {row['iteration']}{phase}"
        uses.setdefault(row["key"], {})[use] = None
        first.setdefault(row["key"], row)
    return {
        key: Stage(key, row["stage"], row["when"], row["where"], seconds.get(key), tuple(uses[key]), place)
        for key, row in first.items()
    }
