"""What of a trajectory is tried again: losses, and storage that was away; nothing else is run twice."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.contracts import EvaluationResult, EvaluationSpec, Progress
from actors.errors import DamagedArtifactError, MemoryExhaustedError, StorageUnavailableError
from actors.ray_pool import is_loss
from orchestrator.config import parse_config
from orchestrator.execution import trial
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses
from tests.support.simulated import SimulatedBackend, Simulation
from tests.support.tiny_campaign import tiny_campaign

KINDS = ("score", "recover", "evaluate", "export")


def in_task(cause: BaseException) -> BaseException:
    """What `ray.get` raises for an exception of a task."""
    return RayTaskError("f", "Traceback", cause, "ray::f", 1, "10.0.0.1").as_instanceof_cause()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> CampaignPlan:
    return build_plan(parse_config(tiny_campaign(tmp_path_factory.mktemp("plan")), "campaign.yaml"))


class FailingBackend(SimulatedBackend):
    """Evaluation raises what `fails` gives for its number, if anything."""

    def __init__(self, notes: Path, fails: Callable[[int], BaseException | None]):
        super().__init__(Simulation(dict.fromkeys(KINDS, 0.0), notes))
        self._fails = fails
        self.evaluated: list[EvaluationSpec] = []

    @property
    def evaluations(self) -> int:
        return len(self.evaluated)

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
        self.evaluated.append(spec)
        if error := self._fails(self.evaluations):
            raise error
        return super().evaluate(spec, uri, key, progress)


@pytest.fixture
def run(
    plan: CampaignPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str | None, FailingBackend, Store, list[float]]]:
    pauses: list[float] = []
    # Of this module only: threads that other tests left in this process sleep too.
    monkeypatch.setattr(trial, "time", SimpleNamespace(sleep=pauses.append))

    def run(
        fails: Callable[[int], BaseException | None], overlap: bool = False
    ) -> tuple[str | None, FailingBackend, Store, list[float]]:
        backend, store = FailingBackend(tmp_path, fails), Store(str(tmp_path / "run"))
        coordinator = Coordinator(Limits())
        reason = trial.run_trial(
            plan.trajectories[0], backend, store, lambda _: None, coordinator, overlap=overlap
        )
        return reason, backend, store, pauses

    return run


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "in the background"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RaySystemError("the object could not be deserialised"), "could not be deserialised"),
        (RayError("Exception mine.Odd isn't serializable"), "isn't serializable"),
        (MemoryExhaustedError("memory does not suffice"), "memory does not suffice"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_a_remote_stage_ends_the_trajectory_at_once(
    run: Any, error: Exception, said: str, overlap: bool
) -> None:
    reason, backend, store, pauses = run(lambda _: in_task(error), overlap)
    assert said in reason
    # By itself once more after a lack of memory beside other stages; what was begun meanwhile only once.
    most = 2 if overlap and isinstance(error, MemoryExhaustedError) else 1
    assert max(map(backend.evaluated.count, backend.evaluated)) == most
    assert overlap or backend.evaluations == 1
    assert pauses == []
    (status,) = read_statuses(store).values()
    assert (status.state, status.reason) == ("failed", reason)


@pytest.mark.parametrize(
    "loss",
    [
        ActorDiedError(),
        in_task(NodeDiedError("10.0.0.2")),
        WorkerCrashedError(),
        StorageUnavailableError("s3://bucket did not answer for 600 s"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_loss_is_tried_again_after_a_growing_pause(run: Any, loss: Exception) -> None:
    reason, _, store, pauses = run(lambda number: loss if number <= 2 else None)
    assert reason is None
    assert pauses == [5, 10]
    assert [status.state for status in read_statuses(store).values()] == ["done"]


def test_losses_without_progress_end_the_trajectory_and_those_with_progress_do_not(run: Any) -> None:
    reason, backend, _, pauses = run(lambda _: WorkerCrashedError())
    assert "lost 4 times" in reason
    assert backend.evaluations == 4
    pauses.clear()
    # Every evaluation fails twice: more losses than tries, but a stage is finished in between.
    reason, backend, _, pauses = run(lambda number: WorkerCrashedError() if number % 3 else None)
    assert reason is None
    assert len(pauses) == 10


def test_what_is_lost_after_a_choice_of_layers_is_not_tried_for_ever(run: Any) -> None:
    # The choice itself is no stage that was found in the store, in any attempt.
    reason, backend, _, pauses = run(lambda number: None if number == 1 else StorageUnavailableError("away"))
    assert "away" in reason
    assert backend.evaluations == 1 + trial.LOST_TRIAL_RETRIES + 1
    assert len(pauses) == trial.LOST_TRIAL_RETRIES


def test_a_damaged_artifact_is_quarantined_and_its_stage_computed_anew(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarantined: list[str] = []
    monkeypatch.setattr(
        Store, "quarantine_artifact", lambda _self, uri: not quarantined.append(uri), raising=False
    )
    damaged = DamagedArtifactError("adapter is not what was published", "somewhere/stages/recover/key/p")
    reason, _, _, pauses = run(lambda number: damaged if number == 4 else None)
    assert (reason, quarantined, pauses) == (None, ["somewhere/stages/recover/key/p"], [])
    reason, _, _, _ = run(lambda number: damaged)
    assert reason is None  # all is there
    quarantined.clear()


def test_artifacts_that_are_damaged_again_and_again_end_the_trajectory(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "quarantine_artifact", lambda _self, _uri: True, raising=False)
    reason, backend, _, _ = run(lambda _: DamagedArtifactError("not what was published", "a/b"))
    assert "not what was published" in reason
    assert backend.evaluations == 1 + trial.MOST_QUARANTINES


def test_what_is_lost_is_named_and_nothing_else_is() -> None:
    lost = [ActorDiedError(), WorkerCrashedError(), NodeDiedError("n"), ObjectLostError("a" * 8, None, "")]
    lost += [OwnerDiedError("a" * 8, None, "")]
    for error in lost:
        assert is_loss(error), error
        assert is_loss(in_task(error)), error
        assert is_loss(in_task(in_task(error))), error
    made_wrong = ActorDiedError(RayTaskError("f", "Traceback", ValueError("x"), "ray::f", 1, "10.0.0.1"))
    for error in (ValueError("x"), RaySystemError("x"), RayError("x"), OutOfMemoryError("x"), made_wrong):
        assert not is_loss(error), error
        assert not is_loss(in_task(error)), error
