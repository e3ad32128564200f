"""How far a campaign is, for Prometheus: gauges that Ray's own metrics agent exports."""

from collections import Counter
from collections.abc import Sequence

from ray.util.metrics import Gauge

from orchestrator.storage.run_progress import TrajectoryProgress

TRAJECTORY = ("campaign", "trajectory")


class CampaignGauges:
    """Gauges of one campaign, set by its driver. Prometheus sees their names with `ray_` in front."""

    def __init__(self, campaign: str):
        self._campaign = campaign
        self._stages = {
            name: Gauge(f"iterabre_{name}", meaning, tag_keys=TRAJECTORY)
            for name, meaning in (
                ("stages_done", "Finished stages, those found in the store included."),
                ("stages_reused", "Finished stages that were found in the store."),
                ("stages_total", "Stages of the trajectory."),
            )
        }
        self._trajectories = Gauge(
            "iterabre_trajectories", "Trajectories by state.", tag_keys=("campaign", "state")
        )
        self._perplexity = Gauge(
            "iterabre_token_perplexity",
            "Of the newest measured model: unpruned, then recovered.",
            tag_keys=(*TRAJECTORY, "text"),
        )

    def show(self, trajectories: Sequence[TrajectoryProgress]) -> None:
        """Set the gauges to the newest progress of every trajectory."""
        states = Counter({"running": 0, "ended": 0, "failed": 0})
        for progress in trajectories:
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
    return "failed" if progress.stage == "failed" else "ended"
