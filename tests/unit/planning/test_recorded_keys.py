"""Runs of version 0.1.0 stay usable: its stages are found under the keys of today, and its run is resumed.

`recorded/` holds what that version wrote: the manifests of a campaign's stages, and its campaign.json. Paths
are relative there, and the hashes of the files behind them are given.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.contracts import (
    ArtifactRef,
    ExportResult,
    FileRef,
    Merge,
    ModelInfo,
    ModelRef,
    ModelSpec,
    Origin,
    TextSpec,
    extend,
)
from actors.recovery import find_objective
from actors.scoring import find_criterion
from orchestrator.config import CampaignConfig, load_config, parse_config
from orchestrator.errors import ConfigError
from orchestrator.planning.changes import Effect, compare
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import Traits, TrajectoryPlan
from orchestrator.planning.planner import evaluation_spec
from orchestrator.planning.recorded import read_recorded, record_of
from orchestrator.storage.stage_store import Store

HERE = Path(__file__).parent / "recorded"
RECORDED: dict[str, Any] = json.loads((HERE / "stages.json").read_text())
FINGERPRINTS: dict[str, str] = RECORDED["fingerprints"]


def _plan(
    config: CampaignConfig, method_name: str, seed: int, last_hidden_state: str = "before_norm"
) -> TrajectoryPlan:
    """Return the plan that the planner makes where the files have the recorded fingerprints.

    That version distilled the last block's state as it is before the final norm.
    """
    method = next(method for method in config.methods if method.name == method_name)
    loss = replace(method.recovery.loss, last_hidden_state=last_hidden_state)
    method = method.model_copy(update={"recovery": replace(method.recovery, loss=loss)})
    criterion, objective = find_criterion(method.scoring.criterion), find_objective(method.recovery.objective)
    source = extend(ModelSpec, config.models[0])
    evaluation = evaluation_spec(config.evaluation, source, min(config.seeds))
    evaluation = replace(evaluation, tasks_fingerprint=FINGERPRINTS.get(str(evaluation.include_path)))
    texts = [extend(TextSpec, text) for text in (method.scoring.calibration, method.recovery.data)]
    texts += [text.data for text in evaluation.perplexity]
    fingerprints: dict[TextSpec | ModelSpec, str] = {
        text: FINGERPRINTS[text.builtin or str(text.path)] for text in texts
    }
    if method.recovery.teacher is not None:
        teacher = extend(ModelSpec, method.recovery.teacher)
        fingerprints[teacher] = FINGERPRINTS[teacher.path]
    return TrajectoryPlan(
        id=method.name,
        campaign=config.name,
        model_id=config.models[0].id,
        model=ModelInfo(source, "llama", 4, 10, 10, FINGERPRINTS[source.path]),
        method=method,
        seed=seed,
        iterations=(),
        evaluation=evaluation,
        also_before_recovery=True,
        deepspeed='{"bf16":{"enabled":true},"steps_per_print":5}' if config.name == "more" else "{}",
        fingerprints=fingerprints,
        traits=Traits(
            criterion.seeded, criterion.chooses_run, objective.applies_recovery, objective.trains_on
        ),
        any_layers=True,
        origin=Origin(),
    )


def _artifact(sha256: str) -> ArtifactRef:
    return ArtifactRef("anywhere", tuple(FileRef(*file) for file in RECORDED["artifacts"][sha256]))


def _model(plan: TrajectoryPlan, recorded: dict[str, Any]) -> ModelRef:
    """Return the model on the trajectory, made by the steps that a trajectory takes."""
    model = plan.dense.without(tuple(recorded["dropped"]))
    model = model.merged(
        tuple(Merge(m["base"], tuple(m["merged"]), m["variant"]) for m in recorded["merges"])
    )
    if recorded["weights"]:
        model = model.bridged(_artifact(recorded["weights"]))
    for adapter in recorded["adapters"]:
        model = model.adapted(_artifact(adapter))
    return model


def _spec(plan: TrajectoryPlan, stage: dict[str, Any]) -> Any:
    if stage["stage"] == "generate":
        return plan.generation_spec()
    model = _model(plan, stage["inputs"]["model"])
    match stage["stage"]:
        case "score":
            return plan.score_spec(model, stage["num_remove"])
        case "start":
            return plan.start_spec(model, plan.recovery_text)
        case "recover":
            return plan.recovery_spec(model)
    return plan.evaluation_spec(model)


CAMPAIGNS = {name: load_config(HERE / f"{name}.yaml") for name in ("campaign", "more")}


@pytest.mark.parametrize(
    "stage",
    RECORDED["stages"],
    ids=lambda stage: f"{stage['method']}-{stage['stage']}-{stage['key'][:6]}",
)
def test_a_stage_has_the_key_that_it_was_stored_under(stage: dict[str, Any]) -> None:
    plan = _plan(CAMPAIGNS[stage["campaign"]], stage["method"], stage["seed"])
    inputs = json.loads(json.dumps(plan.key_inputs(_spec(plan, stage))))
    assert inputs == stage["inputs"]
    kind = "recover" if stage["stage"] == "start" else stage["stage"]
    assert stage_key(kind, inputs) == stage["key"]


def test_with_the_last_state_after_the_norm_only_distillations_of_all_states_have_other_keys() -> None:
    changed = set()
    for stage in RECORDED["stages"]:
        plan = _plan(CAMPAIGNS[stage["campaign"]], stage["method"], stage["seed"], "after_norm")
        inputs = json.loads(json.dumps(plan.key_inputs(_spec(plan, stage))))
        if inputs != stage["inputs"]:
            assert inputs == {**stage["inputs"], "last_hidden_state": "after_norm"}
            changed.add((stage["method"], stage["stage"]))
    distilled = {
        (stage["method"], stage["stage"])
        for stage in RECORDED["stages"]
        if stage["inputs"].get("objective") == "kd" and stage["inputs"]["loss"]["hidden"]
    }
    assert changed == distilled
    assert len(distilled) > 1


def test_a_result_with_a_field_that_is_no_more_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    written = {"uri": "run:/models/a/3-layers", "files": []}
    result = {"artifact": written, "num_layers": 4, "num_parameters": 56352, "num_emptied_parameters": 0}
    home = tmp_path / "stages" / "export" / "a" / "result.json"
    home.parent.mkdir(parents=True)
    home.write_text(json.dumps(result))
    described = {"kind": "export", "key": "a", "inputs": {}, "result": {}, "payload": None, "seconds": 1.0}
    described |= {"format": 1, "created_at": "2026-01-01T00:00:00+00:00", "host": "h", "versions": {}}
    (home.parent / "manifest.json").write_text(json.dumps(described))
    read = store.peek("export", "a", ExportResult)
    assert read is not None
    assert (read.num_layers, read.num_parameters) == (4, 56352)


def test_a_field_that_is_no_more_is_read_at_its_value_alone() -> None:
    raw = yaml.safe_load((HERE / "campaign.yaml").read_text())
    config = parse_config(raw, "campaign.yaml")
    raw["methods"][0]["scoring"]["granularity"] = "block"
    assert parse_config(raw, "campaign.yaml") == config
    raw["methods"][0]["scoring"]["granularity"] = "attention"
    with pytest.raises(ConfigError, match=r"methods\.0\.scoring\.granularity: unknown key"):
        parse_config(raw, "campaign.yaml")


def test_every_kind_of_stage_is_recorded() -> None:
    stages = {stage["stage"] for stage in RECORDED["stages"]}
    assert stages == {"score", "start", "recover", "evaluate", "generate"}


def test_the_recorded_run_is_resumed_by_the_same_campaign(tmp_path: Path) -> None:
    """But for its method `attn`, which removed the attention of blocks: nothing does that any more."""
    store = Store(str(tmp_path))
    (tmp_path / "campaign.json").write_text((HERE / "campaign.json").read_text())
    raw = yaml.safe_load((HERE / "campaign.yaml").read_text())
    recorded = read_recorded(store)
    assert recorded is not None

    def changes() -> list[str]:
        config = parse_config(raw, "campaign.yaml").model_dump(mode="json")
        now = record_of(config, [], recorded.record.versions)
        found = compare(recorded.record, now)
        # Defaults of how it runs may be others today.
        return [f"{each.effect.name} {each}" for each in found if each.effect is not Effect.HARMLESS]

    assert changes() == ["LEFT_OUT methods: attn"]
    raw["methods"][0]["recovery"]["adapter"]["rank"] = 5
    assert changes() == ["AGAIN methods.iterabre.recovery.adapter.rank: 4 → 5", "LEFT_OUT methods: attn"]
