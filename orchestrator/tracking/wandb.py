"""Weights & Biases: a run for the campaign and each trajectory, online or in files to send later."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.contracts import digest
from orchestrator.config import CampaignConfig, WandbConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, Parameters, State


class Wandb:
    """A run of Weights & Biases for each trajectory, of the campaign's group, whose own run has the files.

    The axes are `iteration`, `training_step` and `global_step`.
    """

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
        self._run_id = digest([store.uri])[:16]
        self._logs_dir = store.logs_dir
        self._runs: dict[str, Any] = {}
        self._campaign_run: Any = None

    def open(self) -> str:
        """Return the address of the campaign's run; offline, the command that sends the files."""
        if self._section.mode == "offline":
            return f"wandb sync {self._logs_dir}/wandb/offline-run-*"
        self._campaign_run = self._init(self._run_id, self._campaign, {})
        return str(self._campaign_run.url)

    def write(self, batch: Batch) -> None:
        """Log the points to the trajectory's run, those of a step together."""
        if batch.trajectory not in self._runs:
            self._runs[batch.trajectory] = self._init(batch.run_id, batch.trajectory, batch.parameters)
        run = self._runs[batch.trajectory]
        together: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        for point in batch.points:
            together[point.axis, point.step][point.name] = point.value
        for (axis, step), values in sorted(together.items()):
            run.log({axis: step, **values})
            for name in values:
                run.define_metric(name, step_metric=axis)

    def close(self, states: Mapping[str, State]) -> None:
        """Finish every run, with exit code 1 unless its trajectory is done."""
        for trajectory, run in self._runs.items():
            run.finish(exit_code=0 if states[trajectory] == "done" else 1)
        if self._campaign_run is not None:
            self._campaign_run.finish(exit_code=0 if set(states.values()) == {"done"} else 1)

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Log the files as an artifact of the campaign's run, beside whose own files they are kept."""
        import wandb

        with self._init(self._run_id, self._campaign, {}) as run:
            artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "_", self._campaign), "campaign")
            for name, content in files.items():
                file = Path(run.dir, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                artifact.add_file(str(file), name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

    def _init(self, run_id: str, name: str, parameters: Parameters) -> Any:
        """Return the run of that id, new or resumed."""
        import wandb

        return wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            id=run_id,
            name=name,
            group=self._campaign,
            config=dict(parameters),
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
