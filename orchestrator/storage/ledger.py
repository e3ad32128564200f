"""Append-only Parquet ledger: one row per measured number.

Every finished stage leaves one immutable part file under a name that follows
from the stage. Writing a part again after a crash replaces it, so nothing is
counted twice. Parts appear whole: read `ledger/*.parquet` at any moment with
pandas, polars or DuckDB.
"""

import io
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from actors.artifacts import attempt, filesystem, join, list_files, write_bytes
from actors.errors import WorkError
from orchestrator.storage.layout import safe_name

SUFFIX = ".parquet"

SCHEMA = pa.schema(
    [
        pa.field("campaign", pa.string(), nullable=False),
        pa.field("trajectory", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("phase", pa.string()),
        pa.field("key", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("stderr", pa.float64()),
        pa.field("step", pa.int64()),
        pa.field("layer", pa.int32()),
        pa.field("when", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("where", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number and all that is needed to say what it is.

    `iteration` 0 is the unpruned model. `stage` is score, prune, recover,
    evaluate or export; `phase` is the state of an evaluated model: dense,
    pruned or recovered. `step` is an optimizer step, `layer` a source layer index.
    """

    campaign: str
    trajectory: str
    model: str
    method: str
    seed: int
    iteration: int
    stage: str
    key: str
    metric: str
    value: float
    unit: str = ""
    phase: str | None = None
    stderr: float | None = None
    step: int | None = None
    layer: int | None = None
    when: datetime = field(default_factory=lambda: datetime.now(UTC))
    where: str = field(default_factory=socket.gethostname)


class Ledger:
    """The ledger at `uri`, a directory of Parquet parts. One process writes; any may read."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def append(self, part_name: str, rows: Sequence[Row]) -> None:
        """Write the rows of one finished stage; the same `part_name` replaces, never repeats.

        Call `has` first: a reader such as polars takes a file's size before it opens it, and fails on
        one that is exchanged in between.
        """
        columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in SCHEMA]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), buffer)
        write_bytes(self._part_uri(part_name), buffer.getvalue())

    def has(self, part_name: str) -> bool:
        """Return whether the part was written."""
        uri = self._part_uri(part_name)

        def found() -> bool:
            fs, path = filesystem(uri)
            return fs.get_file_info(path).type == FileType.File

        return attempt(uri, "look for", found)

    def parts(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all parts that begin with `prefix`."""
        names = [info.base_name for info in list_files(self.uri)]
        return [
            name.removesuffix(SUFFIX) for name in names if name.startswith(prefix) and name.endswith(SUFFIX)
        ]

    def read(self, prefix: str = "") -> pa.Table:
        """Return every row of every part whose name begins with `prefix`, in the order of the parts' names.

        Raises:
            WorkError: a part cannot be read; the message names it.
        """
        return self.read_parts(self.parts(prefix))

    def read_parts(self, names: Sequence[str]) -> pa.Table:
        """Return every row of the parts of those names; raises as `read`."""
        if not names:
            return SCHEMA.empty_table()

        def rows() -> pa.Table:
            fs, root = filesystem(self.uri)
            parts = [f"{root}/{safe_name(name)}{SUFFIX}" for name in names]
            return ds.dataset(parts, schema=SCHEMA, format="parquet", filesystem=fs).to_table()

        try:
            return attempt(self.uri, "read", rows)
        except FileNotFoundError:
            # Parts of stages that others took the place of may be moved between listing and reading.
            if (left := [name for name in names if self.has(name)]) == list(names):
                raise
            return self.read_parts(left)
        except pa.ArrowException as error:
            raise WorkError(
                f"ledger {self.uri} cannot be read ({error}); delete the part that is named and run again "
                "with --resume, which writes it anew"
            ) from error

    def _part_uri(self, part_name: str) -> str:
        return join(self.uri, safe_name(part_name) + SUFFIX)


def measured_seconds(ledger: pa.Table) -> dict[tuple[str, str], float]:
    """Return the seconds of every stage in a ledger, by kind and key; a shared stage once."""
    rows = ledger.select(["stage", "key", "metric", "value"]).to_pylist()
    return {(row["stage"], row["key"]): row["value"] for row in rows if row["metric"] == "seconds"}
