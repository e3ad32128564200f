"""The stage `teach`: planned, run once for all that share it, gone on with after an interruption."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import RecoveryResult
from actors.errors import TooLargeError
from actors.teaching import shards, teacher
from orchestrator.config import parse_config
from orchestrator.execution.dry_run import campaign_stages, planned_stages
from orchestrator.execution.local import LocalBackend
from orchestrator.execution.resolvers import finished_model
from orchestrator.execution.stage_kinds import StageRequest
from orchestrator.execution.stage_runner import StageRunner
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.stages import count_stages
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import resolver_of_one, tiny_campaign
from tests.unit.cli.command import iterabre

KL = {"hidden": 0.0, "attention": 0.0, "logit_loss": "forward_kl"}


@pytest.fixture
def campaign(tmp_path: Path) -> dict[str, Any]:
    """Three methods, two targets: 4 → 3 → 2 layers, all on one text."""
    made = tiny_campaign(tmp_path)
    first = made["methods"][0]
    first["recovery"] |= {"loss": KL, "teacher_cache": "hidden", "checkpoint_steps": 2}
    mixed = {**first["recovery"], "loss": {**KL, "next_token": 0.5}, "adapter": {"rank": 2}}
    made["evaluation"] |= {"also_before_recovery": False, "at": "targets"}
    made["methods"] += [
        {**first, "name": "mixed", "recovery": mixed},
        {**first, "name": "deepest", "scoring": {"criterion": "deepest"}},
    ]
    return made


def plan_of(campaign: dict[str, Any]) -> CampaignPlan:
    return build_plan(parse_config(campaign, "campaign.yaml"))


def run(campaign: dict[str, Any], trajectory: TrajectoryPlan) -> Store:
    config = parse_config(campaign, "campaign.yaml")
    store = Store.of_campaign(config.storage.path, config.name)
    backend = LocalBackend(config.execution, store)
    run_trajectory(trajectory, StageRunner(trajectory, resolver_of_one(trajectory, store, backend)))
    return store


def kinds(trajectory: TrajectoryPlan, store: Store | None = None) -> list[str]:
    return [stage.kind for stage in planned_stages(trajectory, store)]


def test_a_campaign_of_three_methods_and_two_targets_teaches_once(
    campaign: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(campaign)
    stages = campaign_stages(plan)
    taught = [stage for each in stages.values() for stage in each if stage.kind == "teach"]
    assert len(taught) == 3
    assert len({stage.key for stage in taught}) == 1
    counts = count_stages(stage for each in stages.values() for stage in each)
    assert counts.shared >= 2
    assert kinds(plan.trajectories[0])[:5] == ["evaluate", "score", "prune", "teach", "recover"]

    for trajectory in plan.trajectories:
        store = run(campaign, trajectory)
    assert len(list((tmp_path / "runs/tiny/stages/teach").iterdir())) == 1
    assert len(list((tmp_path / "runs/tiny/stages/recover").iterdir())) == 6
    rows = Ledger(str(tmp_path / "runs/tiny/ledger")).read().to_pylist()
    numbers = {r["metric"]: r["value"] for r in rows if r["stage"] == "teach"}
    assert numbers["tokens"] == 16 * numbers["sequences"] > 0
    assert numbers["stored"] > numbers["tokens"] * 4
    # What is recovered needs no teacher any more, whether its states are kept or not.
    assert "teach" not in kinds(plan.trajectories[0], store)
    assert len(finished_model(plan.trajectories[0], store, 2).adapters) == 2


def test_iterations_methods_targets_and_seeds_share_what_the_teacher_says(campaign: dict[str, Any]) -> None:
    def keys(**changes: Any) -> set[str]:
        method = campaign["methods"][0]
        methods = [{**method, "recovery": {**method["recovery"], **changes}}]
        plans = plan_of({**campaign, "seeds": [0, 1], "methods": methods}).trajectories
        return {stage_key("teach", plan.key_inputs(plan.teach_spec())) for plan in plans}

    same = keys()
    assert len(same) == 1
    assert same == keys(max_tokens=64, learning_rate=0.1, micro_batch_size=2, teacher_cache_gb=5.0)
    assert same == keys(teacher_cache_dtype="float32")
    others: list[dict[str, Any]] = [
        {"sequence_length": 32},
        {"packing": "documents"},
        {"precision": "bfloat16"},
        {"teacher_cache_dtype": "bfloat16"},
        {"teacher_cache_blocks": [1]},
        {"teacher_cache": "topk"},
    ]
    found = [keys(**changes) for changes in others]
    assert len(set.union(same, *found)) == 1 + len(others)
    streamed = {**campaign["methods"][0]["recovery"]["data"], "streaming": True}
    assert len(keys(data=streamed)) == 2  # another seed reads the stream in another order


def test_only_topk_changes_what_a_recovery_is(campaign: dict[str, Any]) -> None:
    def key(**changes: Any) -> str:
        recovery = {**campaign["methods"][0]["recovery"], **changes}
        method = {**campaign["methods"][0], "recovery": recovery}
        plan = plan_of({**campaign, "methods": [method]}).trajectories[0]
        return stage_key("recover", plan.key_inputs(plan.recovery_spec(plan.dense)))

    caches = ("auto", "off", "hidden", "topk")
    found = [key(teacher_cache=cache) for cache in caches]
    assert len(set(found)) == 2
    assert found[0] == found[2] == key(teacher_top_k=5) != found[3]
    assert key(teacher_cache="topk", teacher_top_k=5) != found[3]


def test_an_interrupted_stage_is_run_again_and_a_finished_one_is_not(
    campaign: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign["methods"] = campaign["methods"][:1]
    trajectory = plan_of(campaign).trajectories[0]
    monkeypatch.setattr(shards, "SHARD_TOKENS", 64)
    publish, published = teacher.publish_file, Counter()

    def interrupted(path: Path, uri: str) -> Any:
        published.up()
        if published.count == 3:
            raise KeyboardInterrupt
        return publish(path, uri)

    monkeypatch.setattr(teacher, "publish_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(campaign, trajectory)
    store = run(campaign, trajectory)
    shown = published.count
    assert "recover" in kinds(trajectory, store)
    run(campaign, trajectory)
    assert published.count == shown


class Counter:
    """A number that goes up."""

    def __init__(self) -> None:
        self.count = 0

    def up(self) -> None:
        self.count += 1


def test_what_cannot_be_cached_is_refused_before_anything_starts(
    campaign: dict[str, Any], tmp_path: Path
) -> None:
    def answers() -> Iterator[tuple[int, str]]:
        for changes in (
            {"loss": {}},
            {"adapter": {"kind": "full"}},
            {"teacher_cache": "topk", "loss": {**KL, "logit_loss": "mse"}},
        ):
            recovery = {**campaign["methods"][0]["recovery"], **changes}
            made = {**campaign, "methods": [{**campaign["methods"][0], "recovery": recovery}]}
            file = tmp_path / "campaign.yaml"
            file.write_text(json.dumps(made))
            answer = iterabre("campaign", file)
            yield answer.exit_code, answer.err

    layers, full, mse = answers()
    assert (layers[0], full[0], mse[0]) == (2, 2, 2)
    assert "recovery.teacher_cache 'hidden' cannot be, because recovery.loss.hidden" in " ".join(
        layers[1].split()
    )
    assert "trains the head" in full[1]
    assert "no logits" in mse[1]
    assert not (tmp_path / "runs").exists()


class NoRoom:
    """Resolves recoveries alone: there is no room for what the teacher says."""

    def __init__(self) -> None:
        self.requested: list[str] = []

    def holds(self, _kind: object, _key: str) -> bool:
        return False

    def resolve(self, stage: StageRequest[Any]) -> Any:
        self.requested.append(stage.kind.name)
        if stage.kind.name == "teach":
            raise TooLargeError("no room")
        assert stage.spec.teacher_states is None
        return RecoveryResult(None, (), 0, 0)


@pytest.mark.parametrize("cache", ["auto", "hidden"])
def test_auto_lets_the_teacher_run_where_there_is_no_room(
    campaign: dict[str, Any], cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    campaign["methods"][0]["recovery"]["teacher_cache"] = cache
    plan = replace(plan_of(campaign).trajectories[0], teacher_cache="hidden")
    resolver = NoRoom()
    stages = StageRunner(plan, resolver)  # type: ignore[arg-type]
    if cache == "hidden":
        with pytest.raises(TooLargeError, match="no room"):
            stages.recover(plan.iterations[0], plan.dense.without((2,)))
        return
    for iteration, dropped in zip(plan.iterations, ((2,), (1, 2)), strict=True):
        stages.recover(iteration, plan.dense.without(dropped))
    assert resolver.requested == ["teach", "recover", "recover"]
    assert "no room; the teacher runs in each recovery instead" in caplog.text
