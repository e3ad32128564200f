"""`task_metric`: which layer goes is what evaluating every model without one layer says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.contracts import (
    EvaluationResult,
    EvaluationSpec,
    Metric,
    ModelRef,
    ModelSpec,
    ScoreSpec,
    TaskSpec,
    TextSpec,
)
from actors.errors import RequestError
from actors.evaluation.lm_eval.harness import evaluate_tasks
from actors.models import load_model, remove_layers
from actors.scoring.task_metric import task_scores, task_value
from orchestrator.config import ExecutionConfig, parse_config
from orchestrator.execution.local import LocalBackend
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import save_tiny
from tests.unit.cli.command import iterabre

TASK = TaskSpec("blimp_sample", limit=40)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    path = save_tiny(tmp_path_factory.mktemp("candidates") / "model", num_layers=5)
    model = ModelRef(ModelSpec(path), dropped=(1,))
    return ScoreSpec(
        model=model, calibration=TextSpec(builtin="iterabre-appendix-a"), criterion="task_metric", task=TASK
    )


def _accuracy_without(spec: ScoreSpec, layers: list[int]) -> float:
    model, tokenizer = load_model(spec.model.source.path)
    remove_layers(model, layers)
    metrics, _ = evaluate_tasks(model, tokenizer, ["blimp_sample"], limit=40)
    return metrics[0].value


def test_every_candidate_is_evaluated(spec: ScoreSpec, tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    backend = LocalBackend(ExecutionConfig(backend="local"), Store(str(tmp_path)))
    result = backend.score(spec, lambda done, total, note: heard.append((done, total, note)))
    want = {layer: _accuracy_without(spec, [1, layer]) for layer in (0, 2, 3, 4)}
    assert dict(zip(result.source_layers, result.scores, strict=True)) == pytest.approx(want)
    assert len(set(want.values())) > 1
    assert result.removal_order == tuple(sorted(want, key=lambda layer: (-want[layer], -layer)))
    assert heard == [(done, 4, "candidates") for done in range(1, 5)]


def test_an_unknown_metric_is_refused_after_one_candidate(spec: ScoreSpec, tmp_path: Path) -> None:
    backend = LocalBackend(ExecutionConfig(backend="local"), Store(str(tmp_path)))
    wrong = replace(spec, task=replace(TASK, metric="exact_match", limit=1))
    heard: list[int] = []
    with pytest.raises(RequestError, match="'blimp_sample' has no metric 'exact_match'; it has acc"):
        backend.score(wrong, lambda done, _total, _note: heard.append(done))
    assert heard == []


@pytest.mark.parametrize(("higher_is_better", "order"), [(True, (3, 2, 5, 0)), (False, (0, 5, 3, 2))])
def test_ties_go_to_the_deeper_layer_either_way(higher_is_better: bool, order: tuple[int, ...]) -> None:
    task = replace(TASK, higher_is_better=higher_is_better)
    model = ModelRef(ModelSpec("m"), dropped=(1, 4))
    result = task_scores(model, task, {5: 0.25, 0: 0.0, 3: 0.5, 2: 0.5})
    assert result.source_layers == (0, 2, 3, 5)
    assert result.scores == (0.0, 0.5, 0.5, 0.25)
    assert result.removal_order == order


def test_the_metric_is_that_of_the_task_itself() -> None:
    metrics = (
        Metric("blimp/acc", 0.1),
        Metric("blimp_sample/acc", 0.7),
        Metric("blimp_sample/acc_norm", 0.2),
    )
    assert task_value(TASK, EvaluationResult(metrics, 0)) == 0.7


def _campaign(place: Path, **scoring: Any) -> dict[str, Any]:
    campaign = tiny_campaign(place)
    method = campaign["methods"][0]
    method["recovery"]["objective"] = "none"
    method["scoring"] = {"criterion": "task_metric", "task": {"name": "blimp_sample", "limit": 20}} | scoring
    return campaign


def _plan(campaign: dict[str, Any]) -> TrajectoryPlan:
    return build_plan(parse_config(campaign, "campaign.yaml")).trajectories[0]


def test_a_campaign(tmp_path: Path) -> None:
    """Greedy: the second layer is chosen on the model that has lost the first."""
    answer = iterabre("campaign", write_campaign(_campaign(tmp_path), tmp_path / "campaign.yaml"))
    assert answer.exit_code == 0, answer.err
    rows = Ledger(Store(str(tmp_path / "runs/tiny")).ledger_uri).read().to_pylist()
    dropped = [row["layer"] for row in rows if (row["stage"], row["metric"]) == ("prune", "dropped")]
    spec = ScoreSpec(model=ModelRef(ModelSpec(str(tmp_path / "model"))), calibration=TextSpec())
    want: list[int] = []
    for _ in range(2):
        left = [layer for layer in range(4) if layer not in want]
        accuracy = {layer: _accuracy_at_20(spec, [*want, layer]) for layer in left}
        want.append(max(left, key=lambda layer: (accuracy[layer], layer)))
    assert dropped == want


def _accuracy_at_20(spec: ScoreSpec, layers: list[int]) -> float:
    model, tokenizer = load_model(spec.model.source.path)
    metrics, _ = evaluate_tasks(remove_layers(model, layers), tokenizer, ["blimp_sample"], limit=20)
    return metrics[0].value


def test_the_task_is_asked_for_and_only_where_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'task_metric' needs scoring\.task"):
        _plan(_campaign(tmp_path, task=None))
    with pytest.raises(RequestError, match=r"'hidden_cosine' has no use for scoring\.task"):
        _plan(_campaign(tmp_path, criterion="hidden_cosine"))
    with pytest.raises(RequestError, match="unknown task 'blimp_simple'"):
        _plan(_campaign(tmp_path, task={"name": "blimp_simple"}))


def test_the_key_depends_on_the_task(tmp_path: Path) -> None:
    tasks = [{"name": "blimp_sample"}, {"name": "blimp_sample", "limit": 5}, {"name": "wikitext2_prefix"}]
    plans = [_plan(_campaign(tmp_path, task=task)) for task in tasks]
    keys = {stage_key("score", plan.key_inputs(plan.score_spec(plan.dense))) for plan in plans}
    assert len(keys) == 3


@pytest.mark.parametrize(("criterion", "stages"), [("hidden_cosine", 1), ("angular_block", 2)])
def test_portions_share_a_scoring_unless_a_run_is_chosen(tmp_path: Path, criterion: str, stages: int) -> None:
    plan = _plan(_campaign(tmp_path, criterion=criterion, task=None))
    specs = [plan.score_spec(plan.dense, layers_to_drop) for layers_to_drop in (1, 2)]
    assert len({stage_key("score", plan.key_inputs(spec)) for spec in specs}) == stages


def test_candidates_keep_adapters_and_settings(spec: ScoreSpec) -> None:
    from orchestrator.execution.task_scoring import score_by_task

    seen: list[EvaluationSpec] = []

    def evaluate_all(specs: Any) -> Any:
        seen.extend(specs)
        return [(i, EvaluationResult((Metric("blimp_sample/acc", 0.5),), 0)) for i in reversed(range(4))]

    score_by_task(spec, evaluate_all, lambda *_: None)
    assert [candidate.model.dropped for candidate in seen] == [(0, 1), (1, 2), (1, 3), (1, 4)]
    assert all(
        (candidate.tasks, candidate.limit, candidate.perplexity) == (("blimp_sample",), 40, ())
        for candidate in seen
    )


def test_missing_data_of_the_task_are_found_before_anything_runs(tmp_path: Path) -> None:
    task = {
        "task": "gone",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/gone.yaml").write_text(yaml.safe_dump(task))
    campaign = _campaign(tmp_path, task={"name": "gone"})
    campaign["evaluation"]["include_path"] = str(tmp_path / "tasks")
    answer = iterabre("campaign", write_campaign(campaign, tmp_path / "campaign.yaml"))
    assert answer.exit_code == 2
    assert "cannot read the data of the tasks gone" in answer.err
    assert not list((tmp_path / "runs").rglob("*.parquet"))
