"""What a stage holds: admission, `iterabre plan` and the budget go by the same devices."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import CLOSED_FORM_OBJECTIVES, MERGING_CRITERIA, Progress, ScoreResult, ScoreSpec
from actors.recovery.objectives import OBJECTIVES
from actors.scoring import CRITERIA, MergeCriterion
from orchestrator.config import CampaignConfig, ExecutionConfig, parse_config
from orchestrator.errors import ClusterTooSmallError
from orchestrator.execution.campaign import limits_of
from orchestrator.execution.dry_run import campaign_stages
from orchestrator.execution.resolvers import ComputeResolver
from orchestrator.execution.stage_runner import StageRunner
from orchestrator.planning.cost_model import START_S, Machine, StageCost
from orchestrator.planning.estimate import Costed, costed_stages, estimate
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.scheduling.admission import AdmissionController, Candidate, check_resources
from orchestrator.scheduling.coordinator import Coordinator, LeaseReply, LeaseRequest
from orchestrator.scheduling.leases import Leases
from orchestrator.scheduling.limits import Limits
from orchestrator.scheduling.packing import Node
from orchestrator.scheduling.resources import (
    CLOSED_FORM,
    MERGE_SCORING,
    TASK_SCORING,
    ResourceBundle,
    ResourceRequest,
    held_kinds,
    resource_kind,
    stage_resources,
)
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign

KINDS = ("score", TASK_SCORING, "generate", "recover", "evaluate", "export")
MACHINE = Machine("made up", 1.0, 1.0, memory_gb=1.0, price_per_hour=1.0)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three methods, which between them have a stage of every kind."""
    directory: Path = tmp_path_factory.mktemp("resources")
    made = tiny_campaign(directory)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"q": "Who is number {i} ?"}}\n' for i in range(8)))
    tiny = made["methods"][0]
    answers = {
        **tiny["recovery"],
        "objective": "sgr",
        "loss": {"attention": 0.0},
        "data": {"path": str(prompts), "prompt_column": "q", "chat_template": "plain"},
        "generation": {"max_new_tokens": 6},
        "sequence_length": 64,
        "max_tokens": 256,
    }
    by_task = {**tiny["scoring"], "criterion": "task_metric", "task": {"name": "blimp_sample"}}
    made["methods"] += [
        {**tiny, "name": "answers", "recovery": answers},
        {**tiny, "name": "task", "scoring": by_task},
    ]
    return made


@pytest.fixture(scope="module")
def plan(campaign: dict[str, Any]) -> CampaignPlan:
    return build_plan(parse_config(campaign, "campaign.yaml"))


def pool(actors: int, cpus: float = 1.0, gpus: float = 0.0) -> dict[str, Any]:
    return {"actors": actors, "cpus": cpus, "gpus": gpus}


def training(workers: int, cpus: float = 1.0, gpus: float = 0.0) -> dict[str, Any]:
    return {"workers": workers, "cpus": cpus, "gpus": gpus}


def settings(score: Any, generate: Any, recover: Any, evaluate: Any) -> dict[str, Any]:
    return {"scoring": score, "generation": generate, "training": recover, "evaluation": evaluate}


ON_GPU = (pool(2, gpus=1), pool(2, gpus=1), training(2, gpus=1))
TABLE = [
    # An export has a section of its own: one CPU.
    # Evaluators from 1 to 8 at one GPU each: scoring by a task holds as many as scoring has actors.
    (settings(*ON_GPU, pool(1, gpus=1)), (2, 2, 2, 2, 1, 0)),
    (settings(*ON_GPU, pool(2, gpus=1)), (2, 2, 2, 2, 2, 0)),
    (settings(*ON_GPU, pool(4, gpus=1)), (2, 2, 2, 2, 4, 0)),
    (settings(*ON_GPU, pool(8, gpus=1)), (2, 2, 2, 2, 8, 0)),
    # Everything has a width of its own, evaluators are wider than scorers.
    (settings(pool(3, gpus=1), pool(5, gpus=2), training(7, gpus=1), pool(4, gpus=2)), (3, 6, 10, 7, 8, 0)),
    # Fractions of a GPU.
    (settings(pool(4, gpus=0.2), pool(2, gpus=0.5), training(1, gpus=1), pool(2, gpus=0.5)),
     (0.8, 2, 1, 1, 1, 0)),
    # No GPU anywhere: processors are the devices.
    (settings(pool(1), pool(1), training(1), pool(1)), (1, 1, 1, 1, 1, 1)),
    (settings(pool(2), pool(3), training(4), pool(32)), (2, 2, 3, 4, 32, 1)),
    (settings(pool(2, 4.0), pool(1, 8.0), training(2, 3.0), pool(4, 8.0)), (8, 16, 8, 6, 32, 1)),
    (settings(pool(2, 0.4), pool(1, 0.5), training(2, 0.5), pool(1, 0.25)), (0.8, 0.5, 0.5, 1, 0.25, 1)),
    # GPUs for training alone: what runs on processors holds no device that is paid for.
    (settings(pool(2), pool(2), training(4, gpus=1), pool(2)), (0, 0, 0, 4, 0, 0)),
    # GPUs for evaluation alone, and so for scoring by a task.
    (settings(pool(2), pool(1), training(1), pool(3, gpus=1)), (0, 2, 0, 0, 3, 0)),
]  # fmt: skip


def _config(campaign: dict[str, Any], execution: dict[str, Any]) -> CampaignConfig:
    return parse_config(campaign | {"execution": {"backend": "ray"} | execution}, "campaign.yaml")


def _one_of_each(plan: CampaignPlan) -> dict[str, Costed]:
    """Return a stage of each kind, at a cost of one second beside its start."""
    stages = costed_stages(plan, campaign_stages(plan))
    found = {resource_kind(costed.stage.kind, costed.stage.spec): costed for costed in reversed(stages)}
    return {kind: replace(found[kind], cost=StageCost(load_bytes=1e9)) for kind in KINDS}


@pytest.mark.parametrize(("execution", "devices"), TABLE)
def test_the_same_devices_everywhere(
    campaign: dict[str, Any], plan: CampaignPlan, execution: dict[str, Any], devices: tuple[float, ...]
) -> None:
    config = _config(campaign, execution)
    limits = replace(limits_of(config), price_per_hour=1.0)
    on_gpus = any(section["gpus"] for section in execution.values())

    def cluster(devices: float, others: float = 1e6) -> tuple[float, float]:
        return (others, devices) if on_gpus else (devices, others)

    one_more = ResourceRequest(ResourceBundle(*cluster(0.1, 0.0)))
    requests = stage_resources(config.execution) | {"one more": one_more}
    for (kind, costed), held in zip(_one_of_each(plan).items(), devices, strict=True):
        full, wider = (
            AdmissionController(lambda have=have: [Node("n", *cluster(have))], requests)
            for have in (held, held + 0.1)
        )
        queue = [Candidate(kind), Candidate("one more")]
        admitted = [[r is None for r in admission.admit([], queue)] for admission in (full, wider)]
        # With no device held, what no node is known to hold is left to Ray and its autoscaler.
        assert admitted == [[True, held == 0], [True, True]]
        planned = estimate(config, [costed], 1000, MACHINE)
        assert planned.device_hours == pytest.approx(held * (START_S[costed.stage.kind] + 1) / 3600)
        assert planned.price == planned.device_hours
        assert estimate(config, [costed], math.ceil(held) or 1, MACHINE).fits
        assert held <= 1 or not estimate(config, [costed], math.ceil(held) - 1, MACHINE).fits
        assert limits.price(kind, 3600) == pytest.approx(held)


def test_merges_and_closed_forms_ask_for_what_they_need(plan: CampaignPlan) -> None:
    execution = ExecutionConfig.model_validate(settings(*ON_GPU, pool(8, gpus=4)) | {"export": {"cpus": 2}})
    one = ResourceRequest(ResourceBundle(1, 1))
    requests = stage_resources(execution)
    assert requests[MERGE_SCORING] == requests[CLOSED_FORM] == one
    assert requests["export"] == ResourceRequest(ResourceBundle(2, 0))
    trajectory = plan.trajectories[0]
    score = trajectory.score_spec(trajectory.dense)
    recover = trajectory.recovery_spec(trajectory.dense, trajectory.recovery_text)
    assert resource_kind("score", replace(score, criterion="laco")) == MERGE_SCORING
    assert resource_kind("recover", replace(recover, objective="linear_bridge")) == CLOSED_FORM
    assert (resource_kind("score", score), resource_kind("recover", recover)) == ("score", "recover")


def test_the_names_of_merges_and_closed_forms_are_those_of_the_tables() -> None:
    assert {name for name, row in CRITERIA.items() if isinstance(row, MergeCriterion)} == MERGING_CRITERIA
    assert {name for name, row in OBJECTIVES.items() if row.solve} == CLOSED_FORM_OBJECTIVES


def test_placement_is_part_of_what_a_stage_requests() -> None:
    execution = ExecutionConfig.model_validate(
        {
            "scoring": {"gpus": 1, "accelerator": "A100", "labels": {"zone": "x"}, "memory_gb": 2},
            "max_devices": 1,
        }
    )
    bundle = ResourceBundle(1, 1, 2e9, "A100", {"zone": "x"})
    # Two actors are more than the quota has devices for.
    assert stage_resources(execution)["score"] == ResourceRequest(bundle, 1, 1)
    assert str(bundle) == "1 A100 GPU and 2 GB and zone=x"


def test_scoring_by_a_task_queues_for_evaluators(plan: CampaignPlan, tmp_path: Path) -> None:
    class Recording(Coordinator):
        def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
            asked.append(request.kind)
            return super().try_acquire(request, wait_s)

    class Backend:
        def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
            return ScoreResult((0,), (1.0,), (0,), 1, 1, 1)

    asked: list[str] = []
    for trajectory in plan.trajectories:
        store, leases = Store(str(tmp_path / trajectory.id)), Leases(Recording(Limits()))
        resolver = ComputeResolver(trajectory, store, Backend(), lambda _progress: None, leases, 1)
        StageRunner(trajectory, resolver).score(trajectory.iterations[0], trajectory.dense)
    assert asked == ["score", "score", TASK_SCORING]


@pytest.mark.parametrize(
    ("section", "asked", "message"),
    [
        ("scoring", pool(9, gpus=2), r"execution.scoring needs 2 GPU \(1 x 2\)"),
        ("generation", pool(9, cpus=5), r"execution.generation needs 5 CPU \(1 x 5\)"),
        ("training", training(3, gpus=0.5), r"execution.training needs 1.5 GPU \(3 x 0.5\)"),
        ("evaluation", pool(9, cpus=4.5), r"execution.evaluation needs 4.5 CPU \(1 x 4.5\)"),
    ],
)
def test_what_a_stage_needs_to_begin_must_be_there(
    campaign: dict[str, Any], section: str, asked: dict[str, Any], message: str
) -> None:
    small = [Node("n", 4, 1)]
    with pytest.raises(ClusterTooSmallError, match=message):
        check_resources(stage_resources(_config(campaign, {section: asked}).execution), small)
    fits = _config(campaign, settings(pool(9), pool(9), training(2), pool(9)))
    check_resources(stage_resources(fits.execution), small)


def test_kinds_are_known_from_the_ledger_alone(campaign: dict[str, Any]) -> None:
    tiny, *others = campaign["methods"]
    bridged = {**tiny, "name": "bridged", "recovery": {**tiny["recovery"], "start": "linear_bridge"}}
    merged = {**tiny, "name": "merged", "scoring": {**tiny["scoring"], "criterion": "laco"}}
    config = _config(campaign | {"methods": [tiny, *others, bridged, merged]}, {})
    assert held_kinds(config.methods) == {
        ("score", None, "task"): TASK_SCORING,
        ("score", None, "merged"): MERGE_SCORING,
        ("recover", "start", "bridged"): CLOSED_FORM,
    }
