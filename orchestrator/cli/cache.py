"""The commands `cache list`, `cache verify` and `cache prune`: stages that campaigns share."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.error_boundary import BoundedGroup
from orchestrator.cli.examples import epilog
from orchestrator.cli.options import Json
from orchestrator.cli.output import err, out, print_json, print_table
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.storage.layout import RunLayout
    from orchestrator.storage.stage_cache import CachedStage

Cache = Annotated[
    str,
    typer.Argument(help="What storage.cache of the campaigns names: a directory, s3:// or gs://."),
]

cache = typer.Typer(
    help="Look after the stages that campaigns share (storage.cache).",
    epilog=epilog("cache"),
    no_args_is_help=True,
    cls=BoundedGroup,
)


@cache.command("list")
def list_(cache: Cache, as_json: Json = False) -> None:
    """Show what lies in a cache: stages by kind, their size, when they were last used."""
    from orchestrator.storage.stage_cache import cached_stages

    stages = cached_stages(_there(cache))
    if as_json:
        print_json([_described(stage) for stage in stages])
        return
    kinds = {kind: [stage for stage in stages if stage.kind == kind] for kind in {s.kind for s in stages}}
    by_kind = sorted(kinds.items())
    columns = {
        "kind": [kind for kind, _ in by_kind],
        "stages": [str(len(own)) for _, own in by_kind],
        "unfinished": [str(sum(not stage.finished for stage in own)) for _, own in by_kind],
        "size": [_size(own) for _, own in by_kind],
        "least recent use": [_day(min(stage.last_used for stage in own)) for _, own in by_kind],
        "most recent use": [_day(max(stage.last_used for stage in own)) for _, own in by_kind],
    }
    print_table(columns, f"{cache}: {_size(stages)}")


@cache.command()
def verify(cache: Cache) -> None:
    """Read every finished stage of a cache and quarantine what is damaged; campaigns compute that again."""
    from orchestrator.storage.stage_cache import verified_stages

    whole = damaged = 0
    for stage, wrong in verified_stages(_there(cache)):
        if wrong is None:
            whole += 1
            continue
        damaged += 1
        err.print(
            f"{stage.kind} {stage.key}: {wrong}; quarantined", style="red", markup=False, soft_wrap=True
        )
    out.print(f"{whole} stages are whole, {damaged} were damaged")
    if damaged:
        raise typer.Exit(1)


@cache.command()
def prune(
    cache: Cache,
    unused_days: Annotated[
        float | None, typer.Option(min=1, help="Remove what no campaign has used for so many days.")
    ] = None,
    keep_gb: Annotated[
        float | None, typer.Option(min=0, help="Remove the least recently used until so much remains.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
) -> None:
    """Remove stages from a cache; what was used within the last day stays.

    A run that needs one of them again computes it again.
    """
    from orchestrator.storage.stage_cache import cached_stages, prunable, remove_stage

    if unused_days is None and keep_gb is None:
        raise RequestError("say what may go: --unused-days, --keep-gb, or both")
    place = _there(cache)
    stages = cached_stages(place)
    going = prunable(stages, time.time(), unused_days, None if keep_gb is None else keep_gb * 1e9)
    for stage in going:
        if dry_run:
            out.print(f"{stage.kind} {stage.key}  {_size([stage])}  last used {_day(stage.last_used)}")
        else:
            remove_stage(place, stage)
    did = "would be removed" if dry_run else "removed"
    out.print(f"{len(going)} of {len(stages)} stages {did}: {_size(going)} of {_size(stages)}")


def _there(cache: str) -> "RunLayout":
    from orchestrator.storage.layout import RunLayout
    from orchestrator.storage.stage_cache import is_there

    place = RunLayout(cache)
    if not is_there(place):
        raise RequestError(f"there is no cache at {cache!r}; give what storage.cache of a campaign names")
    return place


def _described(stage: "CachedStage") -> dict[str, object]:
    times = {name: datetime.fromtimestamp(getattr(stage, name), UTC) for name in ("created", "last_used")}
    plain = {"kind": stage.kind, "key": stage.key, "size_bytes": stage.size_bytes, "finished": stage.finished}
    return plain | {name: when.isoformat(timespec="seconds") for name, when in times.items()}


def _size(stages: "Iterable[CachedStage]") -> str:
    size_bytes = sum(stage.size_bytes for stage in stages)
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e7 else f"{size_bytes / 1e6:.2f} MB"


def _day(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M}"
