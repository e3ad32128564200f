"""Parts of the ledger that no longer describe the run, since it went on with other settings.

They are moved to `superseded/` beside the ledger: their rows would stand beside those of the stages that take
their place, under the same iteration. What they cost was paid all the same.
"""

import re
from collections.abc import Collection, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from actors.artifacts import delete_file, join, read_bytes, write_bytes
from orchestrator.storage.ledger import SUFFIX, Ledger
from orchestrator.storage.run_manifest import started_at_first
from orchestrator.storage.stage_store import Store

ORDER = (
    ("score", "all"),
    ("prune", "all"),
    ("evaluate", "pruned"),
    ("generate", "all"),
    ("recover", "start"),
    ("teach", "all"),
    ("recover", "all"),
    ("evaluate", "recovered"),
    ("export", "all"),
)
"""Kinds and phases of an iteration's stages, in the order in which they follow from one another."""

MEASURING = ("evaluate", "export", "teach")
"""Kinds from which nothing follows; a recovery is the same with what was taught and without."""


def superseded_parts(
    parts: Iterable[str], trajectory: str, slot: tuple[int, str, str], keys: Collection[str]
) -> list[str]:
    """Return the parts of a trajectory that are replaced where the stages of a slot have these keys.

    Those are the slot's own under other keys, and all that has followed from them.

    Args:
        parts: names in the form TRAJECTORY-ITERATION-KIND-PHASE-KEY, with the key's beginning alone.
        slot: iteration, kind and phase.
    """
    iteration, kind, phase = slot
    form = re.compile(re.escape(trajectory) + r"-(\d{3,})-([a-z]+)-([a-z]+)-([0-9a-f]+)")
    found = {name: match for name in parts if (match := form.fullmatch(name))}
    replaced = [
        name
        for name, match in found.items()
        if (int(match[1]), match[2], match[3]) == slot and not any(key.startswith(match[4]) for key in keys)
    ]
    if not replaced or kind in MEASURING:
        return replaced
    later = ORDER[ORDER.index((kind, phase)) + 1 :]
    followed = [
        name
        for name, match in found.items()
        if int(match[1]) > iteration or (int(match[1]) == iteration and (match[2], match[3]) in later)
    ]
    return [*replaced, *followed]


def paid_rows(store: Store) -> pa.Table:
    """Return the rows of all stages that the run has paid for: of the ledger, and the superseded ones.

    What was finished before the run began, it found in a cache: another campaign has paid for that.
    """
    ledgers = (Ledger(uri) for uri in (store.ledger_uri, store.superseded_uri))
    rows = pa.concat_tables([ledger.read() for ledger in ledgers])
    if (began := started_at_first(store)) is None:
        return rows
    return rows.filter(pc.greater_equal(rows["when"], pa.scalar(began, rows["when"].type)))


def move_superseded(store: Store, parts: Iterable[str]) -> None:
    """Move parts out of the ledger; again, where that was interrupted."""
    for name in parts:
        source = join(store.ledger_uri, name + SUFFIX)
        content = read_bytes(source)
        if content is None:
            continue
        write_bytes(join(store.superseded_uri, name + SUFFIX), content)
        delete_file(source)
