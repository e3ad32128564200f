"""Stages of generated responses and of a recovery's start: planned, run once, never again after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import TextSpec
from orchestrator.config import parse_config
from orchestrator.execution.dry_run import planned_stages
from orchestrator.execution.local import LocalBackend
from orchestrator.execution.stage_runner import StageRunner
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_progress import TrajectoryProgress
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import resolver_of_one, tiny_campaign
from tests.support.tiny_models import tiny_tokenizer
from tests.unit.cli.command import iterabre


@pytest.fixture
def campaign(tmp_path: Path) -> dict[str, Any]:
    """Two methods that train on the same responses, one after a start, each of one iteration."""
    made = tiny_campaign(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"q": f"Who is number {i} ?", "a": "fox"}) + "\n" for i in range(8)))
    recovery = made["methods"][0]["recovery"]
    recovery |= {
        "objective": "sgr",
        "loss": {"attention": 0.0},
        "data": {"path": str(path), "prompt_column": "q", "chat_template": "plain"},
        "generation": {"max_new_tokens": 6, "max_prompts": 6},
        "sequence_length": 64,
        "max_tokens": 256,
    }
    made["methods"].append({**made["methods"][0], "name": "other"})
    made["methods"][1]["recovery"] = {**recovery, "start": "linear_bridge", "learning_rate": 0.01}
    made["targets"] = [{"layers": 3}]
    return made


def trajectories(campaign: dict[str, Any]) -> tuple[TrajectoryPlan, ...]:
    return build_plan(parse_config(campaign, "campaign.yaml")).trajectories


def run(campaign: dict[str, Any], trajectory: TrajectoryPlan) -> list[TrajectoryProgress]:
    """What was reported while the trajectory ran in this process."""
    config = parse_config(campaign, "campaign.yaml")
    store, heard = Store.of_campaign(config.storage.path, config.name), []
    backend = LocalBackend(config.execution, store)
    run_trajectory(
        trajectory, StageRunner(trajectory, resolver_of_one(trajectory, store, backend, heard.append))
    )
    return heard


def begun(heard: list[TrajectoryProgress]) -> list[str]:
    """Stages in the order in which they began."""
    return [stage for stage, _ in dict.fromkeys((a.stage, a.started_at) for a in heard if a.started_at)]


def test_responses_are_generated_once_and_a_start_comes_before_the_objective(
    campaign: dict[str, Any], tmp_path: Path
) -> None:
    first, second = trajectories(campaign)
    heard = run(campaign, first)
    assert begun(heard) == ["evaluate", "score", "evaluate", "generate", "recover", "evaluate", "export"]
    assert (heard[-1].stages_done, heard[-1].stages_reused) == (len(planned_stages(first)), 0)

    heard = run(campaign, second)
    assert begun(heard)[3:6] == ["generate", "recover", "recover"]
    assert heard[-1].stages_done == len(planned_stages(second)) == len(planned_stages(first)) + 1
    assert heard[-1].stages_reused == 4  # both evaluations before recovery, the scores and the responses

    again = run(campaign, second)[-1]
    assert (again.stages_done, again.stages_reused) == (
        len(planned_stages(second)),
        len(planned_stages(second)) - 1,
    )
    stages = tmp_path / "runs/tiny/stages"
    assert len(list((stages / "generate").iterdir())) == 1
    assert len(list((stages / "recover").iterdir())) == 3

    rows = Ledger(str(tmp_path / "runs/tiny/ledger")).read().to_pylist()
    generated = {r["metric"]: r["value"] for r in rows if r["stage"] == "generate"}
    assert (generated["prompts"], generated["responses"]) == (6, 6)
    assert 6 <= generated["tokens"] <= 36
    recovered = [r for r in rows if r["stage"] == "recover" and r["metric"] == "tokens"]
    assert {r["phase"]: r["value"] > 0 for r in recovered if r["method"] == "other"} == {
        "start": True,
        None: True,
    }
    steps = [r["value"] for r in rows if r["metric"] == "step_tokens" and r["method"] == "iterabre"]
    assert sum(steps) == next(r["value"] for r in recovered if r["method"] == "iterabre")
    assert 256 - 2 * 64 < sum(steps) <= 256


def test_what_generation_depends_on(campaign: dict[str, Any]) -> None:
    def key(**changes: Any) -> str:
        recovery = campaign["methods"][0]["recovery"]
        generation = {**recovery["generation"], **changes}
        method = {**campaign["methods"][0], "recovery": {**recovery, "generation": generation}}
        trajectory = trajectories({**campaign, "methods": [method]})[0]
        return stage_key("generate", trajectory.key_inputs(trajectory.generation_spec()))

    assert key() == key(batch_size=3)
    different = [{"max_new_tokens": 7}, {"max_prompts": 5}, {"temperature": 0.5}, {"engine": "vllm"}]
    assert len({key(), *(key(**change) for change in different)}) == 5


def test_seeds_share_greedy_responses_but_not_drawn_ones(campaign: dict[str, Any]) -> None:
    campaign["seeds"] = [0, 1]
    greedy = {t.generation_spec() for t in trajectories(campaign)}
    for method in campaign["methods"]:
        method["recovery"]["generation"]["temperature"] = 1.0
    assert (len(greedy), len({t.generation_spec() for t in trajectories(campaign)})) == (1, 2)


def test_methods_share_a_start_that_does_not_depend_on_what_differs(campaign: dict[str, Any]) -> None:
    campaign["methods"][0]["recovery"]["start"] = "linear_bridge"
    first, second = trajectories(campaign)
    starts = [t.start_spec(t.dense.without((3,)), TextSpec(builtin="x")) for t in (first, second)]
    assert starts[0] == starts[1]
    assert starts[0].objective == "linear_bridge"


def test_a_start_is_fitted_to_tokens_of_its_own(campaign: dict[str, Any]) -> None:
    campaign["methods"][0]["recovery"] |= {"start": "linear_bridge", "start_tokens": 128}
    campaign["methods"][1]["recovery"] |= {"start_tokens": 128, "max_tokens": 512}
    trained = [t.recovery_spec(t.dense.without((3,))).max_tokens for t in trajectories(campaign)]
    starts = [t.start_spec(t.dense.without((3,)), TextSpec(builtin="x")) for t in trajectories(campaign)]
    assert trained == [256, 512]
    assert starts[0] == starts[1]
    assert starts[0].max_tokens == 128


def test_other_objectives_generate_nothing(campaign: dict[str, Any]) -> None:
    for method in campaign["methods"]:
        method["recovery"] |= {"objective": "sft"}
        method["recovery"]["data"] |= {"response_column": "a"}
    assert [t.generation_spec() for t in trajectories(campaign)] == [None, None]


def test_the_precision_of_training_changes_its_key(campaign: dict[str, Any]) -> None:
    keys = set()
    for precision in (None, "bfloat16", "float32"):
        campaign["methods"][0]["recovery"]["precision"] = precision
        trajectory = trajectories(campaign)[0]
        keys.add(stage_key("recover", trajectory.key_inputs(trajectory.recovery_spec(trajectory.dense))))
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("recovery", "data", "message"),
    [
        ({"objective": "kd"}, {}, "objective 'kd': it trains on running text"),
        ({"objective": "sft"}, {}, "objective 'sft' needs prompt_column and response_column"),
        (
            {"objective": "sft"},
            {"response_column": "b"},
            "no column 'b' (response_column); its columns are: q, a",
        ),
        ({}, {"prompt_column": None}, "objective 'sgr' needs the prompts"),
        ({}, {"prompt_column": "p"}, "no column 'p' (prompt_column)"),
        ({}, {"chat_template": None}, "method 'iterabre': the tokenizer of"),
        ({}, {"chat_template": "./nowhere.jinja"}, "nowhere.jinja"),
        ({"generation": {"responses_per_prompt": 2}}, {}, "all be the same at temperature 0"),
        ({"start": "linear"}, {}, "methods.0.recovery.start"),
    ],
)
def test_misfits_are_refused_before_anything_starts(
    campaign: dict[str, Any], tmp_path: Path, recovery: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    assert tiny_tokenizer().chat_template is None
    method = campaign["methods"][0]
    method["recovery"] = {**method["recovery"], **recovery, "data": {**method["recovery"]["data"], **data}}
    file = tmp_path / "campaign.yaml"
    file.write_text(json.dumps(campaign))
    answer = iterabre("campaign", file)
    assert (answer.exit_code, answer.out) == (2, "")
    assert message in answer.err
    assert not (tmp_path / "runs").exists()
