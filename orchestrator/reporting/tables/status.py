"""The state of a run for the terminal: a line a trajectory, and below it a line for each of its stages."""

from collections import Counter

from rich.text import Text

from orchestrator.reporting.data.run_status import Activity, RunStatus, TrajectoryView
from orchestrator.storage.run_progress import Overview
from orchestrator.storage.usage import Usage

PHASES = {"dense": "unpruned", "pruned": "before recovery", "recovered": "recovered"}
"""What the model of an evaluation is called."""

BAR = 12
"""Characters of a bar."""

STYLES = {
    "running": "green",
    "waiting": "yellow",
    "failed": "red",
    "cancelled": "magenta",
    "stopped": "magenta",
    "interrupted": "yellow",
}
QUIET = ("not started", "done")
"""States of which a campaign may have hundreds: named in a line each, without details."""

MOST_QUIET = 20


def status_text(status: RunStatus, now: float, with_reasons: bool = True, driver: str | None = None) -> Text:
    """Return where a run is, as lines; why trajectories failed only `with_reasons`.

    `driver` is the first line where the driver itself shows it.
    """
    text = Text()
    heads = {
        "running": f"running; as its driver on {status.host} wrote it {duration(status.age_s)} ago",
        "paused": "paused: what runs goes on to its end, nothing starts; `iterabre continue` goes on",
        "ended": f"its driver on {status.host} has ended, {duration(status.age_s)} ago",
        "silent": f"no word from its driver on {status.host} for {duration(status.age_s)}: it has ended or "
        "is cut off from the storage; --resume continues. Last known:",
        "not started": "no driver has written how far it is",
    }
    text.append(f"{heads[status.state] if driver is None else driver}\n", "bold")
    if status.paused and status.state != "paused":
        text.append("paused: a driver that resumes it starts nothing before `iterabre continue`\n", "bold")
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items())
    text.append(f"{len(status.trajectories)} trajectories: {counts}\n" if counts else "")
    if status.overview is not None and status.state != "ended":
        text.append(f"{overview_text(status.overview, now)}\n")
    quiet = [view for view in status.trajectories if view.state in QUIET]
    for view in status.trajectories:
        if view.state not in QUIET or view in quiet[:MOST_QUIET]:
            _append(text, view, now, with_reasons)
    if len(quiet) > MOST_QUIET:
        text.append(f"… and {len(quiet) - MOST_QUIET} more that are {' or '.join(QUIET)}\n", "dim")
    return text


def _append(text: Text, view: TrajectoryView, now: float, with_reasons: bool) -> None:
    text.append(f"{view.trajectory}  ", "bold")
    text.append(view.state, STYLES.get(view.state, "dim"))
    if view.stages_total:
        text.append(f"  iteration {view.iteration}/{view.iterations}")
        text.append(f"  stages {view.stages_done}/{view.stages_total}")
        text.append(f" ({view.stages_reused} reused)" if view.stages_reused else "")
    measured = measured_text(view)
    if measured and not view.activities:
        text.append(f"  {measured}", "cyan")
    if view.waited_s >= 1:
        text.append(f"  waited {duration(view.waited_s)}", "dim")
    text.append("\n")
    if measured and view.activities:
        text.append(f"    last measured: {measured}\n", "cyan")
    for activity in view.activities:
        text.append(f"    {_activity_line(activity, view, now)}\n")
    if view.reason and with_reasons:
        text.append(f"    {view.reason}\n", STYLES.get(view.state, ""))
    if view.log and with_reasons:
        text.append(f"    log: {view.log}\n", "dim")


def _activity_line(activity: Activity, view: TrajectoryView, now: float) -> str:
    parts = [activity_name(activity, view)]
    if activity.waits_for:
        parts.append(f"waits {duration(now - activity.waits_since)} for {activity.waits_for}")
        return "  ".join(parts)
    if activity.total:
        filled = BAR * activity.done // activity.total
        parts.append(f"{'━' * filled}{'─' * (BAR - filled)} {activity_count(activity)}")
    if activity.started_at:
        parts.append(f"for {duration(now - activity.started_at)}")
    if activity.restarted:
        parts.append(activity.restarted)
    if activity.places:
        places = Counter(activity.places)
        shown = (place if count == 1 else f"{count} x {place}" for place, count in places.items())
        parts.append(f"on {', '.join(shown)}")
    return "  ".join(parts)


def measured_text(view: TrajectoryView) -> str:
    """Return the number of the newest measured model, if there is one."""
    named = {name.replace("/token_", " "): value for name, value in view.measured.items()}
    return ", ".join(f"{name} {value:.4g}" for name, value in named.items())


def activity_name(activity: Activity, view: TrajectoryView) -> str:
    """Return a stage with what it is about: of an evaluation the model, and its iteration if another."""
    about = [PHASES.get(activity.phase, activity.phase)] if activity.phase else []
    if activity.iteration not in (0, view.iteration):
        about.append(f"iteration {activity.iteration}")
    return f"{activity.stage} ({', '.join(about)})" if about else activity.stage


def activity_count(activity: Activity) -> str:
    """Return how far a stage is, in its own units."""
    return f"{activity.done}/{activity.total} {activity.note}".rstrip() if activity.total else ""


def overview_text(overview: Overview, now: float) -> str:
    """Return how far the whole run is: finished stages, time so far, time left."""
    parts = [f"{overview.stages_done} of {overview.stages_total} stages done"]
    parts.append(f"{duration(now - overview.started_at)} so far")
    if overview.left_s is not None:
        parts.append(f"{roughly(overview.left_s)} left")
    elif overview.unknown:
        parts.append(f"time left: known after the first {overview.unknown} stage")
    return ", ".join(parts)


def roughly(seconds: float) -> str:
    """Return an estimated time as `under 1 min`, `about 25 min`, `about 3.5 h` or `about 2.5 days`."""
    if seconds < 60:
        return "under 1 min"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"about {seconds / 86400:.1f} days"


def duration(seconds: float) -> str:
    """Return a time as `12 s`, `3:05` or `2:03:05`."""
    whole = max(0, int(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def usage_text(usage: Usage, price_per_hour: float) -> str:
    """Return the cost of a run in words: at work, failed, idle."""
    worked, failed, idle = (
        f"{seconds / 3600:.2f} device hours ({seconds / 3600 * price_per_hour:.2f})"
        for seconds in (usage.worked_s, usage.failed_s, usage.idle_s)
    )
    return f"cost: {worked} at work, {failed} in attempts that failed, {idle} idle"
