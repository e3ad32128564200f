"""What a run directory says about how the run went, compared with one that nothing disturbed."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from actors.artifacts import is_temporary
from actors.stage_output import MARK

OF_THE_MACHINE = ("s", "tokens/s", "bytes", "forwards")
"""Units of numbers that differ between two runs that did the same."""
TOLERANCE = 1e-6
CLOCKS_S = 0.05
"""Between the clock of the log and that of the file system, and the log's rounding."""

STARTS = re.compile(
    rf"^(?:{MARK}\S+\t)?(\S+ \S+) INFO orchestrator\.execution\.resolvers .*: (\w+) ([0-9a-f]{{12}}) starts$",
    re.MULTILINE,
)


def manifests(run: Path) -> dict[str, float]:
    """When each finished stage (`kind/first 12 digits of its key`) was committed, in seconds of the clock."""
    found = run.glob("stages/*/*/manifest.json")
    return {
        f"{m.parts[-3]}/{m.parts[-2][:12]}": m.stat().st_mtime for m in found if "quarantine" not in m.parts
    }


def starts(sessions: Iterable[Path]) -> list[tuple[str, float]]:
    """Every time that a stage was begun, from the logs that the trials themselves have written."""
    logs = {file.resolve() for session in sessions for file in session.glob("session_*/logs/worker-*.err")}
    found = [match.groups() for file in logs for match in STARTS.finditer(file.read_text(errors="replace"))]
    return sorted((f"{kind}/{key}", _seconds(when)) for when, kind, key in found)


def faults(run: Path, reference: Path, begun: list[tuple[str, float]]) -> list[str]:
    """All in which the run is not as good as the undisturbed one; empty if it is."""
    return [*_differences(run, reference), *_repeated(run, reference, begun), *_rubbish(run)]


def repeats(begun: list[tuple[str, float]]) -> int:
    """Stages that were begun again."""
    return sum(count - 1 for count in Counter(stage for stage, _ in begun).values())


def _differences(run: Path, reference: Path) -> list[str]:
    got, want = _numbers(run), _numbers(reference)
    apart = [
        f"{name}: {got[name]!r}, not {value!r}"
        for name, value in want.items()
        if name in got and abs(got[name] - value) > TOLERANCE * abs(value)
    ]
    missing = [f"{name} is missing" for name in want.keys() - got.keys()]
    more = [f"{name} should not be there" for name in got.keys() - want.keys()]
    return [*missing, *more, *apart]


def _repeated(run: Path, reference: Path, begun: list[tuple[str, float]]) -> list[str]:
    done = manifests(run)
    again = [
        f"{stage} was begun again, finished"
        for stage, when in begun
        if when > done.get(stage, float("inf")) + CLOCKS_S
    ]
    other = done.keys() ^ manifests(reference).keys()
    unseen = done.keys() - {stage for stage, _ in begun}
    return [
        *again,
        *(f"{stage} is finished in one run alone" for stage in sorted(other)),
        *(f"{stage} is finished and was never begun" for stage in sorted(unseen)),
    ]


def _rubbish(run: Path) -> list[str]:
    """Files and directories that no manifest accounts for."""
    temporary = [
        p for p in run.rglob(".*") if is_temporary(p.name) or p.name.startswith((".writing", ".down"))
    ]
    stages = [p for p in run.glob("stages/*/*") if not (p / "manifest.json").is_file()]
    payloads = [
        payload
        for manifest in run.glob("stages/*/*/manifest.json")
        for payload in manifest.parent.glob("payload-*")
        if payload.name not in manifest.read_text()
    ]
    checkpoints = [*run.glob("train/*"), *run.glob("driver.lock")]
    return [f"left behind: {p.relative_to(run)}" for p in (*temporary, *stages, *payloads, *checkpoints)]


def _numbers(run: Path) -> dict[tuple[Any, ...], float]:
    """Every measured number that says nothing of the machine's speed or memory, by what it is."""
    parts = sorted(str(file) for file in (run / "ledger").glob("*.parquet"))
    rows = ds.dataset(parts).to_table().to_pylist() if parts else []
    where = ("trajectory", "iteration", "stage", "phase", "metric", "step", "layer")
    measured = [row for row in rows if row["unit"] not in OF_THE_MACHINE]
    found = {tuple(row[name] for name in where): row["value"] for row in measured}
    assert len(found) == len(measured), "a number stands in the ledger twice"
    return found


def _seconds(when: str) -> float:
    return datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp()
