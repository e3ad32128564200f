"""TensorBoard: event files in the run's own storage."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from actors.artifacts import join, write_bytes
from orchestrator.config import CampaignConfig
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State

CAMPAIGN = "campaign"
"""The directory of the campaign's own texts, beside those of the trajectories, whose names are longer."""


class TensorBoard:
    """An event file for every batch, in the trajectory's directory; a batch that comes twice replaces it.

    Files are whole when they appear and are never written on, so that they can lie in an object store.
    """

    failures: tuple[type[Exception], ...] = ()
    keeps = True

    def __init__(self, _config: CampaignConfig, store: Store):
        self._store = store

    def open(self) -> str:
        """Return the command that shows the curves."""
        return f"tensorboard --logdir {self._store.all_tensorboard_uri}"

    def write(self, batch: Batch) -> None:
        """Write the batch as an event file of its own."""
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        with tempfile.TemporaryDirectory() as directory:
            with SummaryWriter(directory) as writer:
                _, session, _ = hparams(dict(batch.parameters), {})
                writer.file_writer.add_summary(session)
                for point in batch.points:
                    writer.add_scalar(point.name, point.value, point.step, point.when.timestamp())
            self._keep(directory, batch.trajectory, batch.number)

    def close(self, _states: Mapping[str, State]) -> None:
        """Do nothing: TensorBoard shows no states."""

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Write what is text of its own, configuration and cards; TensorBoard shows no pages or figures."""
        from tensorboardX import SummaryWriter

        with tempfile.TemporaryDirectory() as directory:
            with SummaryWriter(directory) as writer:
                for name, content in files.items():
                    if name.endswith(".md"):
                        writer.add_text(name, content.decode())
                    elif name.endswith(".json"):
                        writer.add_text(name, f"```json\n{content.decode()}\n```")
            self._keep(directory, CAMPAIGN, 0)

    def _keep(self, directory: str, run: str, number: int) -> None:
        """Put the one event file in `directory` among those of `run`."""
        (events,) = Path(directory).iterdir()
        # TensorBoard reads a directory's files in the order of their names.
        name = f"events.out.tfevents.{number:010d}"
        write_bytes(join(self._store.tensorboard_uri(run), name), events.read_bytes())
