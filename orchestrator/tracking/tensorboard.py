"""TensorBoard: event files in the run's own storage."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from actors.artifacts import join, write_bytes
from orchestrator.config import CampaignConfig
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State


class TensorBoard:
    """An event file for every batch, in the trajectory's directory; a batch that comes twice replaces it.

    Files are whole when they appear and are never written on, so that they can lie in an object store.
    """

    failures: tuple[type[Exception], ...] = ()
    keeps = True

    def __init__(self, _config: CampaignConfig, store: Store):
        self._store = store

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
            (events,) = Path(directory).iterdir()
            home = self._store.tensorboard_uri(batch.trajectory)
            # TensorBoard reads a directory's files in the order of their names.
            write_bytes(join(home, f"events.out.tfevents.{batch.number:010d}"), events.read_bytes())

    def close(self, _states: Mapping[str, State]) -> None:
        """Do nothing: TensorBoard shows no states."""
