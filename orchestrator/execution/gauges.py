"""How far a campaign is, for Prometheus: gauges that Ray's own metrics agent exports."""

from collections import Counter
from collections.abc import Sequence

from ray.util.metrics import Gauge

from orchestrator.execution.progress import devices_in_use
from orchestrator.storage.run_progress import TrajectoryProgress

TRAJECTORY = ("campaign", "trajectory")
EXPORTED = {"waited_s": "waited_seconds"}


class CampaignGauges:
    """Gauges of one campaign, set by its driver. Prometheus sees their names with `ray_` in front."""

    def __init__(self, campaign: str):
        self._campaign = campaign
        self._stages = {
            name: Gauge(f"iterabre_{EXPORTED.get(name, name)}", meaning, tag_keys=TRAJECTORY)
            for name, meaning in (
                ("stages_done", "Finished stages, those found in the store included."),
                ("stages_reused", "Finished stages that were found in the store."),
                ("stages_total", "Stages of the trajectory."),
                ("waited_s", "Seconds that its stages have waited since the driver's start."),
            )
        }
        self._trajectories = Gauge(
            "iterabre_trajectories", "Trajectories by state.", tag_keys=("campaign", "state")
        )
        self._of_campaign = {
            name: Gauge(f"iterabre_{name}", meaning, tag_keys=("campaign",))
            for name, meaning in (
                ("stages_running", "Stages that are at work."),
                ("stages_waiting", "Stages that wait: for room, for another trajectory, in a pause."),
                ("devices_in_use", "GPUs that stages are at work on, or actors and workers without one."),
            )
        }
        self._perplexity = Gauge(
            "iterabre_token_perplexity",
            "Of the newest measured model: unpruned, then recovered.",
            tag_keys=(*TRAJECTORY, "text"),
        )

    def show(self, trajectories: Sequence[TrajectoryProgress]) -> None:
        """Set the gauges to the newest progress of every trajectory."""
        stages = [progress for progress in trajectories if progress.key and not progress.finished]
        running = [progress for progress in stages if not progress.waits_for]
        in_use = devices_in_use(place for progress in running for place in progress.places)
        for name, count in (
            ("stages_running", len(running)),
            ("stages_waiting", len(stages) - len(running)),
            ("devices_in_use", in_use),
        ):
            self._of_campaign[name].set(count, {"campaign": self._campaign})
        states = Counter({"running": 0, "ended": 0, "failed": 0, "cancelled": 0})
        for progress in trajectories:
            if progress.background:
                continue
            states[_state(progress)] += 1
            tags = {"campaign": self._campaign, "trajectory": progress.trajectory}
            for name, gauge in self._stages.items():
                gauge.set(getattr(progress, name), tags)
            for text, value in progress.perplexities.items():
                self._perplexity.set(value, {**tags, "text": text})
        for state, count in states.items():
            self._trajectories.set(count, {"campaign": self._campaign, "state": state})


def _state(progress: TrajectoryProgress) -> str:
    if not progress.finished:
        return "running"
    return progress.stage if progress.stage in ("failed", "cancelled") else "ended"
