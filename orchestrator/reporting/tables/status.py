"""The state of a run for the terminal: a line a trajectory, and below it a line for each of its stages."""

from collections import Counter

from rich.text import Text

from orchestrator.reporting.data.run_status import Activity, RunStatus, TrajectoryView
from orchestrator.storage.usage import Usage

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


def status_text(status: RunStatus, now: float, with_reasons: bool = True) -> Text:
    """Return where a run is, as lines; why trajectories failed only `with_reasons`."""
    text = Text()
    heads = {
        "running": f"running; as its driver on {status.host} wrote it {duration(status.age_s)} ago",
        "paused": "paused: what runs goes on to its end, nothing starts; `iterabre continue` goes on",
        "ended": f"its driver on {status.host} has ended, {duration(status.age_s)} ago",
        "silent": f"no word from its driver on {status.host} for {duration(status.age_s)}: it has ended or "
        "is cut off from the storage; --resume continues. Last known:",
        "not started": "no driver has written how far it is",
    }
    text.append(f"{heads[status.state]}\n", "bold")
    if status.paused and status.state != "paused":
        text.append("paused: a driver that resumes it starts nothing before `iterabre continue`\n", "bold")
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items())
    text.append(f"{len(status.trajectories)} trajectories: {counts}\n" if counts else "")
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
    if view.waited_s >= 1:
        text.append(f"  waited {duration(view.waited_s)}", "dim")
    text.append("\n")
    for activity in view.activities:
        text.append(f"    {_activity_line(activity, now)}\n")
    if view.reason and with_reasons:
        text.append(f"    {view.reason}\n", STYLES.get(view.state, ""))
    if view.log and with_reasons:
        text.append(f"    log: {view.log}\n", "dim")


def _activity_line(activity: Activity, now: float) -> str:
    parts = [activity.stage + (" (in the background)" if activity.background else "")]
    if activity.waits_for:
        parts.append(f"waits {duration(now - activity.waits_since)} for {activity.waits_for}")
        return "  ".join(parts)
    if activity.total:
        parts.append(f"{activity.done}/{activity.total} {activity.note}".rstrip())
    if activity.started_at:
        parts.append(f"for {duration(now - activity.started_at)}")
    if activity.places:
        places = Counter(activity.places)
        shown = (place if count == 1 else f"{count} x {place}" for place, count in places.items())
        parts.append(f"on {', '.join(shown)}")
    return "  ".join(parts)


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
