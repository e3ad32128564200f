"""When `auto` stores what the teacher says: where the passes that it saves take longer than storing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ArtifactRef, TextSpec
from orchestrator.config import CampaignConfig, parse_config
from orchestrator.planning.estimate import costed_stages
from orchestrator.planning.plan import CampaignPlan, TextSize, TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.stages import PlannedStage
from orchestrator.planning.teaching import saved_seconds, shared_teachings, with_teacher_caches
from tests.support.tiny_campaign import tiny_campaign

KL = {"hidden": 0.0, "attention": 0.0, "logit_loss": "forward_kl"}
TOKENS = 2_500_000
LARGE = {
    "num_layers": 30, "num_parameters": 135_000_000, "block_parameters": (3_500_000,) * 30,
    "hidden_size": 576, "attention_width": 576, "vocab_size": 49_152,
}  # fmt: skip


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = tiny_campaign(tmp_path_factory.mktemp("teaching"))
    made["methods"][0]["recovery"] |= {"loss": KL}
    return made


def config_of(campaign: dict[str, Any], **recovery: Any) -> CampaignConfig:
    method = campaign["methods"][0]
    made = {**campaign, "methods": [{**method, "recovery": {**method["recovery"], **recovery}}]}
    return parse_config(made, "campaign.yaml")


def of_135m(plan: TrajectoryPlan) -> TrajectoryPlan:
    """The trajectory of a model of 135M parameters, each recovery over the whole of the data."""
    recovery = replace(plan.method.recovery, max_tokens=TOKENS, sequence_length=512)
    return replace(
        plan,
        model=replace(plan.model, **LARGE),  # type: ignore[arg-type]
        method=plan.method.model_copy(update={"recovery": recovery}),
        teacher_cache="hidden",
    )


def sizes_of(plan: TrajectoryPlan) -> dict[TextSpec, TextSize]:
    return {plan.recovery_text: TextSize(num_bytes=4 * TOKENS)}


def test_a_tiny_campaign_runs_its_teacher_each_time(campaign: dict[str, Any]) -> None:
    plan = build_plan(config_of(campaign))
    assert [t.teacher_cache for t in plan.trajectories] == ["off"]
    assert not any("stored" in note for note in plan.notes)


def test_auto_stores_what_saves_time(campaign: dict[str, Any]) -> None:
    config = config_of(campaign)
    plan = of_135m(build_plan(config).trajectories[0])
    decided, notes = with_teacher_caches([plan], sizes_of(plan), config)
    assert [t.teacher_cache for t in decided] == ["hidden"]
    # float32 states of 2.5M tokens, and their ids.
    assert f"once for 2 recoveries, about {TOKENS * (4 * 576 + 4) / 1e9:.2g} GB" in notes[0]


def test_what_auto_saves_is_the_passes_less_one_and_the_storage(campaign: dict[str, Any]) -> None:
    config = config_of(campaign)
    plan = of_135m(build_plan(config).trajectories[0])
    (sharing,) = shared_teachings([plan])
    flops = TOKENS * 30 * (2 * 3_500_000 + 4 * 576 * 512)  # of one pass
    per_core = 0.05e12 * 0.35
    stored = TOKENS * (4 * 576 + 4)
    takes = 15 + (4 * 135_000_000 + 2 * stored) / 1e9 + flops / (per_core * 2)  # two actors teach
    expected = 2 * flops / per_core - takes  # one worker trains
    assert saved_seconds(sharing, sizes_of(plan), config) == pytest.approx(expected)


@pytest.mark.parametrize(
    "recovery",
    [{"teacher_cache": "off"}, {"teacher_cache_gb": 1.0}, {"loss": {}}, {"adapter": {"kind": "full"}}],
    ids=["off", "more than it may take", "single layers", "full"],
)
def test_auto_lets_the_teacher_run_where_it_must(campaign: dict[str, Any], recovery: dict[str, Any]) -> None:
    config = config_of(campaign, **recovery)
    plan = of_135m(build_plan(config).trajectories[0])
    decided, notes = with_teacher_caches([plan], sizes_of(plan), config)
    assert ([t.teacher_cache for t in decided], notes) == (["off"], [])


def test_one_recovery_does_not_pay_for_what_is_stored(campaign: dict[str, Any]) -> None:
    config = config_of({**campaign, "targets": [{"layers": 3}]})
    plan = of_135m(build_plan(config).trajectories[0])
    on_one = config.model_copy(
        update={"execution": config.execution.model_copy(update={"scoring": replaced_actors(config, 1)})}
    )
    (sharing,) = shared_teachings([plan])
    assert saved_seconds(sharing, sizes_of(plan), on_one) < 0


def replaced_actors(config: CampaignConfig, actors: int) -> Any:
    return config.execution.scoring.model_copy(update={"actors": actors})


def test_the_plan_counts_the_disk_and_the_time_of_what_is_stored(campaign: dict[str, Any]) -> None:
    config = config_of(campaign)
    plan = of_135m(build_plan(config).trajectories[0])
    stored = TOKENS * (4 * 576 + 4)
    off = CampaignPlan("c", (replace(plan, teacher_cache="off"),), sizes_of(plan)).needed_bytes()
    shared = CampaignPlan("c", (plan, replace(plan, id="other")), sizes_of(plan))
    assert shared.needed_bytes() == 2 * off + stored
    spec = plan.teach_spec()
    stage = PlannedStage("teach", "k", 1, 30, spec, finished=False)
    (costed,) = costed_stages(CampaignPlan("c", (plan,), sizes_of(plan)), {plan.id: [stage]})
    assert costed.cost.flops == TOKENS * 30 * (2 * 3_500_000 + 4 * 576 * 512)
    assert costed.cost.load_bytes == 4 * 135_000_000 + stored


def test_a_recovery_with_stored_states_is_planned_without_its_teacher(
    campaign: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(campaign)
    plan = of_135m(build_plan(config).trajectories[0])
    spec = plan.recovery_spec(plan.dense)
    runs = PlannedStage("recover", "a", 1, 27, spec, finished=False)

    reads = replace(runs, key="b", spec=replace(spec, teacher_states=ArtifactRef("x", ())))
    both = costed_stages(CampaignPlan("c", (plan,), sizes_of(plan)), {plan.id: [runs, reads]})
    saved = both[0].cost.flops - both[1].cost.flops
    assert saved == TOKENS * 30 * (2 * 3_500_000 + 4 * 576 * 512)
    assert both[0].cost.memory_bytes - both[1].cost.memory_bytes == 4 * 3 * 3_500_000
