"""What an operator wants of a run that goes on: how it reaches the coordinator and the trajectories."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.config import CampaignConfig
from orchestrator.planning.plan import CampaignPlan
from orchestrator.storage.control import ControlReader, Origin
from orchestrator.storage.stage_store import Store

log = logging.getLogger(__name__)

CANCELLED_CHECK_S = 3.0


def control_reader(config: CampaignConfig, plan: CampaignPlan, store: Store) -> ControlReader:
    """Return what reads an operator's wishes for the trajectories of `plan`."""
    model_priorities = {model.id: model.priority for model in config.models}
    return ControlReader(
        store,
        {
            each.id: Origin(
                each.method.name, each.model_id, each.method.priority, model_priorities.get(each.model_id, 0)
            )
            for each in plan.trajectories
        },
    )


@contextmanager
def watching_for_cancellation(
    is_cancelled: Callable[[], bool], end: Callable[[], None], interval_s: float = CANCELLED_CHECK_S
) -> Iterator[None]:
    """Call `end` once the trajectory is cancelled while the body runs, from another thread.

    The body may stand in a stage of hours; only the end of its process ends that, with all that it started.
    """
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(interval_s):
            try:
                cancelled = is_cancelled()
            except Exception as error:  # the coordinator is being restarted, perhaps
                log.warning("whether the trajectory is cancelled could not be found out: %s", error)
                continue
            if cancelled and not finished.is_set():
                end()
                return

    threading.Thread(target=watch, name="cancellation", daemon=True).start()
    try:
        yield
    finally:
        finished.set()
