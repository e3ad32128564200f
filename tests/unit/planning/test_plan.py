"""What is decided before work starts: depths, portions, trajectories, and what a stage's key depends on."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    ExportSpec,
    FileRef,
    ModelInfo,
    ModelRef,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TaskSpec,
    TextSpec,
    extend,
)
from actors.contracts.settings import AddedLater
from orchestrator.config import TargetConfig, parse_config
from orchestrator.errors import RequestError
from orchestrator.execution.dry_run import planned_stages
from orchestrator.planning.keys import key_inputs, stage_key
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.pruning_schedule import IterationPlan, iterative_schedule, target_depth
from tests.support.tiny_campaign import tiny_campaign
from tests.support.tiny_models import save_tiny

Change = Callable[[dict[str, Any]], Any]
ADAPTER = ArtifactRef("/somewhere/payload-1", (FileRef("adapter_model.safetensors", 10, "ab" * 32),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    tiny_campaign(directory)
    return directory


def _plan(campaign: dict[str, Any]) -> CampaignPlan:
    return build_plan(parse_config(campaign, "campaign.yaml"))


def _keys(trajectory: TrajectoryPlan) -> dict[str, str]:
    """Keys of the stages after layer 3 was dropped and the model recovered once."""
    model = trajectory.dense.without((3,)).adapted(ADAPTER)
    specs = {
        "score": trajectory.score_spec(model),
        "recover": trajectory.recovery_spec(model),
        "evaluate": trajectory.evaluation_spec(model),
        "prune": model,
    }
    return {kind: stage_key(kind, trajectory.key_inputs(spec)) for kind, spec in specs.items()}


def _info(num_layers: int) -> ModelInfo:
    return ModelInfo(ModelSpec("m"), "llama", num_layers, 10, 10, "f")


@pytest.mark.parametrize(
    ("num_layers", "depths", "portion", "expected"),
    [
        (5, [3], 1, [(1, 4, False), (1, 3, True)]),
        (10, [7, 3], 2, [(2, 8, False), (1, 7, True), (2, 5, False), (2, 3, True)]),
        (4, [1], 9, [(3, 1, True)]),
        (4, [3, 2, 1], 2, [(1, 3, True), (1, 2, True), (1, 1, True)]),
    ],
)
def test_portions_halt_at_every_target(
    num_layers: int, depths: list[int], portion: int, expected: list[tuple[int, int, bool]]
) -> None:
    schedule = iterative_schedule(num_layers, depths, portion)
    assert [(i.layers_to_drop, i.layers_left, i.is_target) for i in schedule] == expected
    assert [i.index for i in schedule] == list(range(1, len(expected) + 1))


def test_fractions_round_half_up() -> None:
    for num_layers in range(2, 81):
        for percent in (5, 10, 12.5, 25, 37.5, 50, 75):
            exact = Fraction(percent) / 100 * num_layers
            removed = int(exact) + (exact - int(exact) >= Fraction(1, 2))
            target = TargetConfig(fraction=percent / 100)
            if 0 < removed < num_layers:
                assert target_depth(target, _info(num_layers)) == num_layers - removed


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ({"layers": 5}, "layers=5 leaves 5"),
        ({"layers": 0}, "layers=0 leaves 0"),
        ({"layers": -1}, "layers=-1 leaves -1"),
        ({"fraction": 0.1}, r"fraction=0\.1 leaves 4"),
        ({"fraction": 0.9}, r"fraction=0\.9 leaves 0"),
    ],
)
def test_depths_that_cannot_be_are_reported(target: dict[str, Any], asked: str) -> None:
    with pytest.raises(RequestError, match=rf"{asked} of the 4 layers of 'm'; .* between 1 and [34]"):
        target_depth(TargetConfig(**target), _info(4))


def test_all_layers_stay_only_where_they_are_named() -> None:
    assert target_depth(TargetConfig(layers=4), _info(4)) == 4
    assert iterative_schedule(4, [4, 3], 1) == (
        IterationPlan(1, 0, 4, is_target=True),
        IterationPlan(2, 1, 3, is_target=True),
    )


def test_one_trajectory_for_every_model_method_and_seed(place: Path) -> None:
    campaign = tiny_campaign(place)
    method = campaign["methods"][0]
    campaign["models"].append({**campaign["models"][0], "id": "again"})
    campaign["methods"].append({**method, "name": "plain"})
    campaign["seeds"] = [0, 7]
    plan = _plan(campaign)
    assert [t.id for t in plan.trajectories] == [
        f"{model}--{method}--seed{seed}"
        for model in ("llama", "again")
        for method in ("iterabre", "plain")
        for seed in (0, 7)
    ]
    assert plan.find("again--plain--seed7").seed == 7
    stops = [(i.layers_left, i.is_target) for i in plan.trajectories[0].iterations]
    assert stops == [(3, True), (2, True)]


def test_direct_removal_is_one_trajectory_a_target(place: Path) -> None:
    campaign = tiny_campaign(place)
    campaign["methods"][0]["schedule"] = {"mode": "direct"}
    campaign["targets"] = [{"layers": 2}, {"layers": 3}, {"fraction": 0.5}]
    plan = _plan(campaign)
    assert [t.id for t in plan.trajectories] == ["llama--iterabre--seed0--3L", "llama--iterabre--seed0--2L"]
    assert [[(i.index, i.layers_to_drop, i.is_target) for i in t.iterations] for t in plan.trajectories] == [
        [(1, 1, True)],
        [(1, 2, True)],
    ]


def test_the_config_reaches_the_specs(place: Path) -> None:
    campaign = tiny_campaign(place)
    recovery = campaign["methods"][0]["recovery"]
    recovery |= {"loss": {"attention": 0.0}, "warmup_steps": 1, "lr_schedule": "cosine"}
    recovery["adapter"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    trajectory = _plan(campaign).trajectories[0]
    spec = trajectory.recovery_spec(trajectory.dense)
    assert (spec.loss.hidden, spec.loss.attention, spec.warmup_steps, spec.lr_schedule) == (1, 0, 1, "cosine")
    assert (spec.adapter.rank, spec.adapter.targets) == (2, ("q_proj", "v_proj"))
    assert spec.max_tokens == 96
    # Every field of the section has its field in the spec, so none is silently left out.
    stages_of_their_own = {"start", "start_tokens", "generation"}
    section = {field.name for field in fields(trajectory.method.recovery)} - stages_of_their_own
    assert section <= {field.name for field in fields(RecoverySpec)}


def test_keys_do_not_depend_on_the_place(place: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    shutil.copytree(place, there)
    here = _plan(tiny_campaign(place)).trajectories[0]
    moved = json.loads(json.dumps(tiny_campaign(place)).replace(str(place), str(there)))
    moved["name"] = "another"
    moved["storage"] = {"path": str(tmp_path / "x")}
    assert moved["models"][0]["path"] == str(there / "model")
    assert _keys(_plan(moved).trajectories[0]) == _keys(here)


def _set(path: str, value: Any) -> Change:
    def change(campaign: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = campaign
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[last] = value

    return change


SCORING, RECOVERY, PERPLEXITY = "methods.0.scoring", "methods.0.recovery", "evaluation.perplexity.0"


def test_layers_are_given_up_early_where_the_best_can_go(place: Path) -> None:
    campaign = tiny_campaign(place)
    _set(f"{SCORING}.eliminate", True)(campaign)
    trajectory = _plan(campaign).trajectories[0]
    spec = trajectory.score_spec(trajectory.dense, 2)
    assert (spec.eliminate, spec.num_remove) == (True, 2)
    held = replace(trajectory, any_layers=False).score_spec(trajectory.dense, 2)
    assert (held.eliminate, held.num_remove) == (False, 1)


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("models.0.dtype", "bfloat16", {"score", "prune", "recover", "evaluate"}),
        (f"{SCORING}.criterion", "block_influence", {"score"}),
        (f"{SCORING}.reference", "current", {"score"}),
        (f"{SCORING}.pooling", "last_token", {"score"}),
        (f"{SCORING}.max_sequences", 3, {"score"}),
        (f"{SCORING}.sequence_length", 31, {"score"}),
        (f"{SCORING}.eliminate", True, {"score"}),
        (f"{SCORING}.screen_dtype", "bfloat16", {"score"}),
        (f"{SCORING}.calibration", {"builtin": "iterabre-appendix-a"}, {"score"}),
        ("seeds", [1], {"recover", "evaluate"}),
        (f"{RECOVERY}.objective", "none", {"recover"}),
        (f"{RECOVERY}.loss", {"hidden": 0.5}, {"recover"}),
        (f"{RECOVERY}.adapter", {"rank": 4, "dropout": 0.1}, {"recover"}),
        (f"{RECOVERY}.adapter", {"rank": 4, "targets": "ffn"}, {"recover"}),
        (f"{RECOVERY}.sequence_length", 8, {"recover"}),
        (f"{RECOVERY}.batch_size", 4, {"recover"}),
        (f"{RECOVERY}.learning_rate", 2e-3, {"recover"}),
        (f"{RECOVERY}.lr_schedule", "constant", {"recover"}),
        (f"{RECOVERY}.warmup_steps", 1, {"recover"}),
        (f"{RECOVERY}.weight_decay", 0.1, {"recover"}),
        (f"{RECOVERY}.max_grad_norm", 0.5, {"recover"}),
        (f"{RECOVERY}.max_tokens", 128, {"recover"}),
        (f"{PERPLEXITY}.context", 64, {"evaluate"}),
        (f"{PERPLEXITY}.max_tokens", 128, {"evaluate"}),
        (f"{PERPLEXITY}.name", "dog", {"evaluate"}),
        ("evaluation.tasks", ["blimp_sample"], {"evaluate"}),
        ("evaluation.limit", 3, {"evaluate"}),
        ("evaluation.num_fewshot", 1, {"evaluate"}),
        ("evaluation.num_fewshot", {"blimp_sample": 1}, {"evaluate"}),
        ("evaluation.apply_chat_template", True, {"evaluate"}),
        ("evaluation.apply_chat_template", False, set()),
        ("evaluation.system_instruction", "Be brief.", {"evaluate"}),
        ("evaluation.log_samples", True, set()),
        # How it is computed, where, and how far the trajectory goes: nothing changes.
        (f"{RECOVERY}.micro_batch_size", 2, set()),
        (f"{RECOVERY}.checkpoint_steps", 7, set()),
        ("execution.max_concurrent_trajectories", 3, set()),
        ("execution.scoring", {"actors": 1}, set()),
        ("models.0.id", "other", set()),
        ("methods.0.name", "other", set()),
        ("targets", [{"layers": 1}], set()),
        ("evaluation.also_before_recovery", False, set()),
    ],
)
def test_keys_depend_on_what_changes_the_result(
    place: Path, path: str, value: Any, changed: set[str]
) -> None:
    campaign = tiny_campaign(place)
    before = _keys(_plan(campaign).trajectories[0])
    _set(path, value)(campaign)
    after = _keys(_plan(campaign).trajectories[0])
    assert {kind for kind in before if before[kind] != after[kind]} == changed


def test_keys_depend_on_the_weights(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    campaign = tiny_campaign(place)
    before = _keys(_plan(campaign).trajectories[0])
    weights = tmp_path / "copy/model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    campaign["models"][0]["path"] = str(tmp_path / "copy/model")
    after = _keys(_plan(campaign).trajectories[0])
    assert all(before[kind] != after[kind] for kind in before)


def test_keys_depend_on_the_tokenizer(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    campaign = tiny_campaign(place)
    before = _keys(_plan(campaign).trajectories[0])
    tokenizer = tmp_path / "copy/model/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(content))
    campaign["models"][0]["path"] = str(tmp_path / "copy/model")
    after = _keys(_plan(campaign).trajectories[0])
    assert all(before[kind] != after[kind] for kind in before)


def test_keys_depend_on_the_text(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place)
    before = _keys(_plan(campaign).trajectories[0])
    other = tmp_path / "other.txt"
    other.write_bytes(Path(place / "text.txt").read_bytes() + b"!")
    campaign["methods"][0]["recovery"]["data"]["path"] = str(other)
    after = _keys(_plan(campaign).trajectories[0])
    assert {kind for kind in before if before[kind] != after[kind]} == {"recover"}


def test_keys_depend_on_the_users_tasks(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place)
    task = {"task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "doc_to_text": "x"}
    keys = []
    for folder, content in (("a", task), ("b", task), ("c", task | {"doc_to_text": "y"})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(yaml.safe_dump(content))
        campaign["evaluation"] |= {"tasks": ["mine"], "include_path": str(tmp_path / folder)}
        keys.append(_keys(_plan(campaign).trajectories[0])["evaluate"])
    assert keys[0] == keys[1] != keys[2]


def test_keys_depend_on_what_became_of_the_model(place: Path) -> None:
    trajectory = _plan(tiny_campaign(place)).trajectories[0]
    dense, dropped = trajectory.dense, trajectory.dense.without((3,))
    other = replace(ADAPTER, files=(FileRef("adapter_model.safetensors", 10, "cd" * 32),))
    moved = replace(ADAPTER, uri="s3://bucket/elsewhere")
    variants = [dense, dropped, dense.without((2,)), dropped.adapted(ADAPTER), dropped.adapted(other)]
    keys = {stage_key("score", trajectory.key_inputs(trajectory.score_spec(m))) for m in variants}
    assert len(keys) == len(variants)
    assert stage_key(
        "score", trajectory.key_inputs(trajectory.score_spec(dropped.adapted(moved)))
    ) == stage_key("score", trajectory.key_inputs(trajectory.score_spec(dropped.adapted(ADAPTER))))


def test_a_trajectorys_stages_and_bytes(place: Path) -> None:
    plan = _plan(tiny_campaign(place))
    # Dense evaluation; then score, prune, evaluate, recover, evaluate, export, twice.
    assert len(planned_stages(plan.trajectories[0])) == 1 + 2 * 6
    weights_bytes = 4 * plan.trajectories[0].model.num_parameters
    assert 2 * weights_bytes <= plan.needed_bytes() <= 3 * weights_bytes


def test_full_fine_tuning_needs_space_for_full_weights(place: Path) -> None:
    adapters, full = tiny_campaign(place), tiny_campaign(place)
    full["methods"][0]["recovery"]["adapter"] = {"kind": "full"}
    plan = _plan(full)
    parameters = plan.trajectories[0].model.num_parameters
    assert plan.needed_bytes() == _plan(adapters).needed_bytes() + 2 * 4 * parameters + 2 * 12 * parameters


def test_deeper_model_needs_its_own_depths(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    deep = save_tiny(tmp_path / "deep", num_layers=6)
    campaign["models"].append({"id": "deep", "path": deep})
    campaign["targets"] = [{"fraction": 0.5}]
    depths = [[i.layers_left for i in t.iterations] for t in _plan(campaign).trajectories]
    assert depths == [[3, 2], [5, 4, 3]]


def test_only_targets_recover_and_are_measured_on_request() -> None:
    every = iterative_schedule(6, [5, 3], 1)
    assert all(iteration.recovers and iteration.is_measured for iteration in every)
    schedule = iterative_schedule(6, [5, 3], 1, recover_at="targets", measure_at="targets")
    assert [i.layers_left for i in schedule if i.recovers] == [5, 3]
    assert [i.is_measured for i in schedule] == [True, False, True]


MODEL_FIELDS = "model.adapters model.dropped model.emptied model.merges model.source model.weights"
KEY_FIELDS = {
    "score": f"""calibration confidence criterion granularity max_sequences merge {MODEL_FIELDS} num_remove
        pooling reference seed sequence_length task""",
    "recover": f"""adapter.alpha adapter.double_quantization adapter.dropout adapter.kind adapter.rank
        adapter.targets batch_size data last_hidden_state learning_rate loss.attention loss.auxiliary
        loss.hidden loss.logit_loss loss.logits loss.temperature lr_schedule max_grad_norm max_tokens
        {MODEL_FIELDS} objective packing precision seed sequence_length teacher teacher_layers
        warmup_steps weight_decay""",
    "evaluate": f"""allow_code_execution include_path limit max_length max_new_tokens {MODEL_FIELDS}
        num_fewshot perplexity.context perplexity.data perplexity.max_tokens perplexity.name probes seed
        suites task_suffix tasks throughput""",
}


def _field_paths(inputs: Any, path: str = "") -> set[str]:
    """Where the values of a key's inputs are; all items of a list are at one place."""
    if isinstance(inputs, dict):
        parts = ((f"{path}.{name}".strip("."), value) for name, value in inputs.items())
        return {found for part, value in parts for found in _field_paths(value, part)}
    if isinstance(inputs, (list, tuple)) and any(isinstance(value, dict) for value in inputs):
        return {found for value in inputs for found in _field_paths(value, path)}
    return {path}


@pytest.mark.parametrize("kind", KEY_FIELDS)
def test_the_fields_of_a_key_are_those_that_stored_results_have(kind: str, place: Path) -> None:
    trajectory = _plan(tiny_campaign(place)).trajectories[0]
    model = trajectory.dense.without((3,)).adapted(ADAPTER)
    spec = {
        "score": trajectory.score_spec(model),
        "recover": trajectory.recovery_spec(model),
        "evaluate": trajectory.evaluation_spec(model),
    }[kind]
    assert _field_paths(trajectory.key_inputs(spec)) == set(KEY_FIELDS[kind].split()), (
        "with another field, results that users have are not found any more: mark a new one with "
        "`AddedLater(what was done before)`, or raise STAGE_VERSION, and then change this list"
    )


def test_a_key_has_this_form() -> None:
    written = '{"inputs":{"layer":3},"kind":"score","version":1}'
    assert stage_key("score", {"layer": 3}) == hashlib.sha256(written.encode()).hexdigest()


def test_a_field_added_later_is_in_the_key_when_it_is_used(place: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Newer(ScoreSpec):
        more: Annotated[int, AddedLater(0)] = 5

    trajectory = _plan(tiny_campaign(place)).trajectories[0]
    spec = trajectory.score_spec(trajectory.dense)
    before = trajectory.key_inputs(spec)
    assert trajectory.key_inputs(extend(Newer, spec, more=0)) == before
    assert trajectory.key_inputs(extend(Newer, spec)) == {**before, "more": 5}


def test_only_results_that_have_changed_have_another_key() -> None:
    """Sums over tokens and adapters in half precision, and texts of probes; float32 numbers are as stored."""
    text = TextSpec(builtin="iterabre-appendix-a")
    sources = {dtype: ModelSpec("m", dtype) for dtype in ("float32", "bfloat16", "float16")}
    fingerprints = {**dict.fromkeys(sources.values(), "m"), text: "t"}

    def added(dtype: str, *adapters: ArtifactRef) -> dict[str, set[str]]:
        model = ModelRef(sources[dtype], adapters=adapters)
        specs = {
            "tasks": EvaluationSpec(model=model, tasks=("blimp",)),
            "texts": EvaluationSpec(model=model, probes=("arithmetic",)),
            "probes": EvaluationSpec(model=model, probes=("degeneration",)),
            "score": ScoreSpec(model=model, calibration=text),
            "task_metric": ScoreSpec(model=model, calibration=text, task=TaskSpec("blimp")),
            "export": ExportSpec(model),
        }
        new = {"softmax", "adapters_summed_in", "decoding"}
        return {name: new & key_inputs(spec, fingerprints).keys() for name, spec in specs.items()}

    nothing: dict[str, set[str]] = {name: set() for name in added("float32")}
    assert added("float32", ADAPTER) == added("float32") == nothing | {"probes": {"decoding"}}
    for dtype in ("bfloat16", "float16"):
        softmax = {"tasks": {"softmax"}, "task_metric": {"softmax"}}
        assert added(dtype) == nothing | softmax | {"probes": {"decoding"}}
        assert all("adapters_summed_in" in names for names in added(dtype, ADAPTER).values())
