"""Weights & Biases: a run for each trajectory, online or in files to send later."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from orchestrator.config import CampaignConfig, WandbConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State


class Wandb:
    """A run of Weights & Biases for each trajectory; its axes are `iteration` and `training_step`."""

    def __init__(self, config: CampaignConfig, store: Store):
        import wandb

        section = config.tracking.wandb
        assert section is not None, "used only with its section"
        if section.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RequestError(
                "tracking.wandb.mode online needs a key: set WANDB_API_KEY, log in once with `wandb login`, "
                "or use mode: offline"
            )
        self.failures: tuple[type[Exception], ...] = (wandb.Error,)
        logging.getLogger("wandb").setLevel(logging.WARNING)
        # Every driver writes offline files of its own, and one that is sent replaces those sent before.
        self.keeps = section.mode == "online"
        self._section: WandbConfig = section
        self._campaign = config.name
        self._logs_dir = store.logs_dir
        self._runs: dict[str, Any] = {}

    def write(self, batch: Batch) -> None:
        """Log the points to the trajectory's run, those of a step together."""
        if batch.trajectory not in self._runs:
            self._runs[batch.trajectory] = self._open(batch)
        run = self._runs[batch.trajectory]
        together: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        for point in batch.points:
            axis = "training_step" if point.in_training else "iteration"
            together[axis, point.step][point.name] = point.value
        for (axis, step), values in sorted(together.items()):
            run.log({axis: step, **values})
            for name in values:
                run.define_metric(name, step_metric=axis)

    def close(self, states: Mapping[str, State]) -> None:
        """Finish every run, with exit code 1 unless its trajectory is done."""
        for trajectory, run in self._runs.items():
            run.finish(exit_code=0 if states[trajectory] == "done" else 1)

    def _open(self, batch: Batch) -> Any:
        """Return the trajectory's run, new or resumed."""
        import wandb

        return wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            id=batch.run_id,
            name=batch.trajectory,
            group=self._campaign,
            config=dict(batch.parameters),
            dir=self._logs_dir,
            resume="allow",
            reinit="create_new",
            # Numbers of the ledger only: neither this process's output, code and machine nor its packages.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
