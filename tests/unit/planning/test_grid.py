"""What of the grid runs: exclusions, overrides of one model, targets by parameters."""

from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ModelInfo, ModelSpec
from orchestrator.config import TargetConfig, parse_config
from orchestrator.errors import ConfigError, RequestError
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.pruning_schedule import target_depth
from orchestrator.storage.layout import shortened
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture
def campaign(place: Path) -> dict[str, Any]:
    """Two models, two methods and two seeds."""
    campaign = tiny_campaign(place)
    campaign["models"].append({**campaign["models"][0], "id": "lamb"})
    campaign["methods"].append({**campaign["methods"][0], "name": "other"})
    campaign["seeds"] = [0, 1]
    return campaign


def _plan(campaign: dict[str, Any]) -> CampaignPlan:
    return build_plan(parse_config(campaign, "campaign.yaml"))


def _stops(plan: CampaignPlan) -> dict[str, list[int]]:
    return {t.id: [i.layers_left for i in t.iterations if i.is_target] for t in plan.trajectories}


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ({"model": "lamb"}, lambda model, method, seed, layers: model != "lamb"),
        ({"model": "l*", "method": "other"}, lambda model, method, seed, layers: method != "other"),
        (
            {"method": "iter?bre", "seed": 1},
            lambda model, method, seed, layers: (method, seed) != ("iterabre", 1),
        ),
        ({"target": "layers=2"}, lambda model, method, seed, layers: layers != 2),
        (
            {"model": "llama", "target": "*3"},
            lambda model, method, seed, layers: (model, layers) != ("llama", 3),
        ),
    ],
)
def test_excluded_combinations_do_not_run(campaign: dict[str, Any], entry: dict[str, Any], left: Any) -> None:
    campaign["exclude"] = [entry]
    expected: dict[str, list[int]] = {}
    for model in ("llama", "lamb"):
        for method in ("iterabre", "other"):
            for seed in (0, 1):
                stops = [layers for layers in (3, 2) if left(model, method, seed, layers)]
                expected |= {f"{model}--{method}--seed{seed}": stops} if stops else {}
    assert _stops(_plan(campaign)) == expected


def test_exclusions_that_exclude_nothing_or_everything_are_reported(campaign: dict[str, Any]) -> None:
    campaign["exclude"] = [{"model": "lama*"}]
    with pytest.raises(RequestError, match=r"exclude\.0 \(model: lama\*\) matches no comb.* of llama, lamb"):
        _plan(campaign)
    campaign["exclude"] = [{"seed": 0}, {"seed": 1}]
    with pytest.raises(RequestError, match="leaves nothing to run"):
        _plan(campaign)


def test_overrides_change_one_model_and_keep_the_rest_of_the_section(
    campaign: dict[str, Any], place: Path
) -> None:
    campaign["models"][1]["overrides"] = {
        "scoring": {"max_sequences": 2, "calibration": {"builtin": "iterabre-appendix-a"}},
        "recovery": {"adapter": {"dropout": 0.1}},
        "evaluation": {"also_before_recovery": False},
    }
    plan = _plan(campaign)
    plain, changed = plan.find("llama--other--seed0"), plan.find("lamb--other--seed0")
    assert (plain.method.scoring.max_sequences, changed.method.scoring.max_sequences) == (4, 2)
    assert changed.method.scoring.sequence_length == plain.method.scoring.sequence_length == 32
    assert changed.method.scoring.calibration.path is None
    assert (changed.method.recovery.adapter.rank, changed.method.recovery.adapter.dropout) == (4, 0.1)
    assert plain.method.recovery.adapter.dropout == 0
    assert (plain.also_before_recovery, changed.also_before_recovery) == (True, False)
    again = parse_config(parse_config(campaign, "c").model_dump(mode="json"), "stored")
    assert build_plan(again) == plan


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"recovery": {"dekay": 1}}, r"models\.1\.overrides\.recovery\.dekay: unknown key"),
        ({"scoring": {"max_sequences": "two"}}, r"models\.1\.overrides\.scoring\.max_sequences: .*integer"),
        ({"evaluation": {"limit": 0}}, r"models\.1\.overrides\.evaluation\.limit: "),
        ({"execution": {"backend": "ray"}}, r"models\.1\.overrides\.execution: unknown key"),
    ],
)
def test_wrong_overrides_are_reported_with_their_place(
    campaign: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    campaign["models"][1]["overrides"] = overrides
    with pytest.raises(ConfigError, match=message) as caught:
        _plan(campaign)
    assert len(str(caught.value).splitlines()) == 2


def _info(blocks: tuple[int, ...], rest: int) -> ModelInfo:
    return ModelInfo(ModelSpec("m"), "llama", len(blocks), sum(blocks) + rest, 10, "f", blocks)


@pytest.mark.parametrize(
    ("target", "depth"),
    [
        ({"parameters": 149}, 3),
        ({"parameters": 125}, 3),
        ({"parameters": 124.9}, 2),
        ({"parameter_fraction": 0.1}, 3),
        ({"parameter_fraction": 0.5}, 1),
    ],
)
def test_targets_by_parameters(target: dict[str, float], depth: int) -> None:
    info = _info((25, 25, 25, 25), rest=50)
    assert target_depth(TargetConfig(**target), info) == depth


def test_unequal_blocks_keep_the_bound_whichever_go() -> None:
    info = _info((10, 40, 10, 40), rest=0)
    # Two layers removed may leave 80 parameters; only three removed surely leave at most 70.
    assert target_depth(TargetConfig(parameters=70), info) == 1
    assert target_depth(TargetConfig(parameters=80), info) == 2


def test_targets_by_parameters_that_cannot_be_are_reported() -> None:
    info = _info((25, 25), rest=50)
    for target, asked in (
        ({"parameters": 49.0}, "parameters=49 leaves 0"),
        ({"parameters": 1e9}, "leaves 2"),
    ):
        with pytest.raises(RequestError, match=asked):
            target_depth(TargetConfig(**target), info)


def test_a_search_metric_that_nothing_measures_is_refused(place: Path) -> None:
    raw = tiny_campaign(place) | {"search": {"scheduler": "asha", "metric": "fox/perplexity"}}
    raw["execution"] |= {"backend": "ray"}
    with pytest.raises(
        RequestError, match=r"unknown search\.metric 'fox/perplexity'; did you mean fox/token_pe"
    ):
        build_plan(parse_config(raw, "campaign.yaml"))


@pytest.mark.parametrize("of_model", [False, True], ids=["of all", "of the model"])
def test_a_search_is_asked_for_its_metric_only_where_it_is_measured(place: Path, of_model: bool) -> None:
    raw = tiny_campaign(place) | {"search": {"scheduler": "asha", "metric": "fox/token_perplexity"}}
    raw["execution"] |= {"backend": "ray"}
    raw["targets"] = [{"layers": 2}]
    if of_model:
        raw["models"][0]["overrides"] = {"evaluation": {"at": "targets"}}
    else:
        raw["evaluation"]["at"] = "targets"
    plan = build_plan(parse_config(raw, "campaign.yaml"))
    (trajectory,) = plan.trajectories
    assert [iteration.is_measured for iteration in trajectory.iterations] == [False, True]
    (note,) = plan.notes
    assert "will give up no trajectory: none is measured before its last iteration" in note


def test_long_names_give_ids_whose_files_have_names_that_can_be(place: Path) -> None:
    campaign = tiny_campaign(place)
    campaign["name"], campaign["models"][0]["id"] = "c" * 60, "m" * 60
    method = campaign["methods"][0]
    others = {"n" * 99 + "1": {}, "n" * 99 + "2": {}, "d" * 100: {"schedule": {"mode": "direct"}}}
    campaign["methods"] = [method | {"name": name} | more for name, more in others.items()]
    campaign["seeds"] = [2**31 - 1]
    ids = [trajectory.id for trajectory in _plan(campaign).trajectories]
    assert len(set(ids)) == len(ids) == 2 + len(campaign["targets"])
    ledger = Ledger(str(place / "ledger"))
    for trajectory in ids:
        ledger.append(f"{trajectory}-001-evaluate-recovered-{'0' * 16}", [])
        assert len(ledger.parts(f"{trajectory}-")) == 1


def test_ids_of_runs_that_are_there_stay() -> None:
    assert shortened("x" * 160) == "x" * 160
    assert len(shortened("x" * 161)) == 160
    assert shortened("x" * 161) != shortened("x" * 162)
