"""Evaluation in the background: what may go on meanwhile, what has to wait, and what is written."""

import threading
import time
from pathlib import Path

import pytest

from actors.contracts import EvaluationResult, EvaluationSpec, Metric, Progress
from actors.errors import MemoryExhaustedError, WorkError
from orchestrator.config import parse_config
from orchestrator.execution.progress import TrajectoryProgress
from orchestrator.execution.resolvers import ComputeResolver
from orchestrator.execution.stage_runner import StageRunner
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import resolver_of_one, tiny_campaign

DENSE, FIRST = IterationPlan(0, 0, 4, False), IterationPlan(1, 1, 3, True)


class SlowBackend:
    """Evaluates on request; the unpruned model scores 0.8, any other 0.6. Fails at first `failures` times."""

    def __init__(self, failures: int = 0):
        self.may_go_on = threading.Event()
        self.left_to_fail = failures

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
        assert self.may_go_on.wait(60)
        if self.left_to_fail:
            self.left_to_fail -= 1
            raise MemoryExhaustedError("no memory")
        return EvaluationResult((Metric("arc/acc", 0.6 if spec.model.dropped else 0.8, stderr=0.1),), 100)


@pytest.fixture
def plan(tmp_path: Path) -> TrajectoryPlan:
    return build_plan(parse_config(tiny_campaign(tmp_path), "campaign.yaml")).trajectories[0]


def stages_of(
    plan: TrajectoryPlan, store: Store, backend: SlowBackend
) -> tuple[StageRunner, ComputeResolver]:
    resolver = resolver_of_one(plan, store, backend)
    return StageRunner(plan, resolver, overlap=True), resolver


def measured(store: Store) -> dict[tuple[str, str], float]:
    rows = Ledger(store.ledger_uri).read().to_pylist()
    return {(row["phase"], row["metric"]): row["value"] for row in rows if "/" in row["metric"]}


def test_evaluations_go_on_behind_what_follows(plan: TrajectoryPlan, tmp_path: Path) -> None:
    backend, store = SlowBackend(), Store(str(tmp_path / "runs"))
    stages, resolver = stages_of(plan, store, backend)
    stages.evaluate(DENSE, plan.dense, "dense")
    stages.evaluate(FIRST, plan.dense.without((2,)), "recovered")
    assert measured(store) == {}
    backend.may_go_on.set()
    stages.wait()
    assert measured(store) == {
        ("dense", "arc/acc"): 0.8,
        ("recovered", "arc/acc"): 0.6,
    }
    assert resolver.progress.stages_done == 2


def test_what_has_nothing_else_to_do_begins_the_next_evaluation(plan: TrajectoryPlan, tmp_path: Path) -> None:
    class Together(SlowBackend):
        """Ends an evaluation only once two are under way; the newer model's before the older one's."""

        def __init__(self) -> None:
            super().__init__()
            self.both, self.newer_ended = threading.Barrier(2), threading.Event()

        def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
            self.both.wait(30)
            if not spec.model.dropped:
                assert self.newer_ended.wait(30)
            return EvaluationResult((Metric("fox/token_perplexity", 9.0 + len(spec.model.dropped)),), 100)

    backend, store = Together(), Store(str(tmp_path / "runs"))

    def report(shown: TrajectoryProgress) -> None:
        if shown.stages_done:
            backend.newer_ended.set()

    resolver = resolver_of_one(plan, store, backend, report)
    stages = StageRunner(plan, resolver, overlap=True)
    stages.evaluate(DENSE, plan.dense, "dense")
    stages.evaluate(FIRST, plan.dense.without((2,)), "recovered")
    stages.wait()
    assert measured(store) == {
        ("dense", "fox/token_perplexity"): 9.0,
        ("recovered", "fox/token_perplexity"): 10.0,
    }
    assert resolver.progress.perplexities == {"fox": 10.0}


def test_export_waits_for_the_numbers_that_its_card_tells(plan: TrajectoryPlan, tmp_path: Path) -> None:
    backend, store = SlowBackend(), Store(str(tmp_path / "runs"))
    stages, _ = stages_of(plan, store, backend)
    stages.evaluate(FIRST, plan.dense.without((2,)), "recovered")
    seen: list[int] = []

    def export(_spec: object, _uri: str, _progress: object) -> None:
        seen.append(len(measured(store)))
        raise WorkError("seen enough")

    backend.export = export
    threading.Timer(0.2, backend.may_go_on.set).start()
    with pytest.raises(WorkError, match="seen enough"):
        stages.export(FIRST, plan.dense.without((2,)))
    assert seen == [1]


def test_the_board_shows_the_perplexity_of_the_newest_healed_model(
    plan: TrajectoryPlan, tmp_path: Path
) -> None:
    class Perplexity(SlowBackend):
        def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
            value = 9.0 + 3 * len(spec.model.dropped)
            return EvaluationResult((Metric("fox/token_perplexity", value), Metric("arc/acc", 0.5)), 100)

    stages, resolver = stages_of(plan, Store(str(tmp_path / "runs")), Perplexity())
    shown = []
    for iteration, dropped, phase in (
        (DENSE, (), "dense"),
        (FIRST, (1,), "pruned"),
        (FIRST, (2,), "recovered"),
    ):
        stages.evaluate(iteration, plan.dense.without(dropped), phase)
        stages.wait()
        shown.append(resolver.progress.perplexities)
    assert shown == [{"fox": 9.0}, {"fox": 9.0}, {"fox": 12.0}]


def test_an_evaluation_without_memory_is_tried_once_more_by_itself(
    plan: TrajectoryPlan, tmp_path: Path
) -> None:
    for failures, fails in ((1, False), (2, True)):
        store, backend = Store(str(tmp_path / f"runs{failures}")), SlowBackend(failures)
        stages, _ = stages_of(plan, store, backend)
        backend.may_go_on.set()
        stages.evaluate(DENSE, plan.dense, "dense")
        if fails:
            with pytest.raises(WorkError, match="no memory"):
                stages.wait()
        else:
            stages.wait()
            assert measured(store) == {("dense", "arc/acc"): 0.8}


def test_after_a_failed_evaluation_none_begins(plan: TrajectoryPlan, tmp_path: Path) -> None:
    backend, begun = SlowBackend(), []

    def fail(spec: EvaluationSpec, *_: object) -> EvaluationResult:
        begun.append(spec)
        assert backend.may_go_on.wait(60)
        raise WorkError("broken")

    backend.evaluate = fail
    stages, _ = stages_of(plan, Store(str(tmp_path / "runs")), backend)
    stages.evaluate(DENSE, plan.dense, "dense")
    stages.evaluate(FIRST, plan.dense.without((2,)), "recovered")
    backend.may_go_on.set()
    time.sleep(0.2)  # the second would begin before anybody has seen that the first failed
    with pytest.raises(WorkError, match="broken"):
        stages.wait()
    assert len(begun) == 1


def test_the_error_of_the_newest_evaluation_is_that_of_the_trajectory(
    plan: TrajectoryPlan, tmp_path: Path
) -> None:
    backend, begun = SlowBackend(), []

    def evaluate(spec: EvaluationSpec, *_: object) -> EvaluationResult:
        begun.append(len(spec.model.dropped))
        if len(spec.model.dropped) == 2:
            backend.may_go_on.set()
            raise WorkError("broken")
        assert backend.may_go_on.wait(60)
        time.sleep(0.2)  # the newest has failed before this one ends
        return EvaluationResult((), 100)

    backend.evaluate = evaluate
    stages, _ = stages_of(plan, Store(str(tmp_path / "runs")), backend)
    for dropped in ((), (1,), (1, 2)):
        stages.evaluate(FIRST, plan.dense.without(dropped), "recovered")
    with pytest.raises(WorkError, match="broken"):
        stages.wait()
    assert sorted(begun) == [0, 2]


def test_a_scheduler_hears_of_an_iteration_only_what_was_measured_of_it(
    plan: TrajectoryPlan, tmp_path: Path
) -> None:
    backend, heard = SlowBackend(), []
    backend.may_go_on.set()
    stages = StageRunner(
        plan,
        resolver_of_one(plan, Store(str(tmp_path / "runs")), backend),
        on_iteration=lambda iteration, metrics: heard.append((iteration, dict(metrics))),
    )
    stages.evaluate(FIRST, plan.dense.without((2,)), "recovered")
    stages.finish(FIRST)
    stages.finish(IterationPlan(2, 1, 2, False, is_measured=False))
    assert heard == [(1, {"arc/acc": 0.6})]
