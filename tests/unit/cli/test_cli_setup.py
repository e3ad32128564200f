"""`iterabre init`, `doctor` and `schema`."""

import json
import os
import pty
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import doctor
from orchestrator.cli.config_template import batch_for, short_name
from orchestrator.config import CampaignConfig, load_config
from tests.unit.cli.command import iterabre


def test_init_writes_a_file_that_the_campaign_reads(tmp_path: Path) -> None:
    file = tmp_path / "llama.yaml"
    answer = iterabre(
        "init", file, "--model", "meta-llama/Llama-3.2-1B", "--fractions", "0.1,0.5", "--gpus", "8"
    )
    assert answer.exit_code == 0
    config = load_config(file)
    (model,) = config.models
    assert (model.id, model.path, model.dtype) == ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "auto")
    assert [target.fraction for target in config.targets] == [0.1, 0.5]
    assert (config.execution.training.workers, config.execution.training.gpus) == (8, 1)
    assert "# " in file.read_text()


def test_init_starts_from_the_recipe_best(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    iterabre("init", file, "--model", "m")
    (method,) = load_config(file).methods
    (best,) = load_config(Path(__file__).parents[3] / "configs/recipes/best.yaml").methods
    fields = ("data", "batch_size", "micro_batch_size", "learning_rate", "warmup_steps", "max_tokens")
    sizes = {field: getattr(method.recovery, field) for field in (*fields, "start_tokens")}
    assert method.recovery == replace(best.recovery, **sizes)
    assert method.recovery.start_tokens == 500_000
    assert (method.name, method.scoring, method.schedule) == (best.name, best.scoring, best.schedule)
    assert method.recovery.warmup_steps == 8  # of 152


def test_init_without_gpus_asks_for_none(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    iterabre("init", file, "--model", "m", "--gpus", "0", "--data", "a: b, {c}.txt")
    config = load_config(file)
    assert (config.models[0].dtype, config.execution.training.gpus) == ("float32", 0)
    assert config.methods[0].recovery.data.path == "a: b, {c}.txt"


def test_init_takes_a_name_a_budget_and_a_built_in_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = "wikitext-2-raw-validation"
    iterabre("init", file, "--model", "m", "--name", "mine", "--max-tokens", "512", "--data", text)
    config = load_config(file)
    recovery = config.methods[0].recovery
    assert (config.name, config.models[0].id, recovery.max_tokens) == ("mine", "mine", 512)
    assert (recovery.data.builtin, recovery.data.path) == (text, None)


@pytest.mark.parametrize(
    ("gpus", "tokens"), [(0, 512), (0, 1024), (1, 2_500_000), (3, 5000), (64, 2_500_000)]
)
def test_init_writes_a_batch_that_workers_and_budget_can_do(tmp_path: Path, gpus: int, tokens: int) -> None:
    file = tmp_path / "c.yaml"
    iterabre("init", file, "--model", "m", "--gpus", str(gpus), "--max-tokens", str(tokens))
    config = load_config(file)
    recovery, workers = config.methods[0].recovery, config.execution.training.workers
    assert recovery.batch_size % (recovery.micro_batch_size * workers) == 0
    assert recovery.batch_size * recovery.sequence_length <= tokens
    part = config.evaluation.perplexity[0].max_tokens
    assert part == (None if gpus else 16_384)


def test_the_batch_is_the_papers_where_it_fits() -> None:
    assert batch_for(2_500_000, 1) == batch_for(2_500_000, 8) == (32, 4)
    assert batch_for(2_500_000, 3) == (30, 2)  # ten each
    assert batch_for(1024, 1) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--gpus", "8", "--max-tokens", "4000"], "give 4096 or more"),
        ([], "--model says which model"),
        (["--model", "m", "--fractions", "banana"], "--fractions 'banana': 'banana' is no share"),
        (["--model", "m", "--fractions", "0.1,a"], "'a' is no share"),
        (["--model", "m", "--fractions", "1.5"], "'1.5' is no share"),
        (["--model", "m", "--fractions", "nan"], "'nan' is no share"),
    ],
)
def test_init_refuses_and_writes_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "c.yaml"
    answer = iterabre("init", file, *arguments)
    assert (answer.exit_code, file.exists()) == (2, False)
    assert message in answer.err


def test_init_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mine")
    answer = iterabre("init", file, "--model", "m")
    assert answer.exit_code == 2
    assert "--force" in answer.err
    assert file.read_text() == "mine"
    assert iterabre("init", file, "--model", "m", "--force").exit_code == 0
    assert load_config(file).name == "m"


def test_init_asks_again_for_an_answer_that_is_none(tmp_path: Path) -> None:
    """In a terminal; the answers before it are kept."""
    file = tmp_path / "c.yaml"
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "orchestrator.cli", "init", str(file)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        os.write(master, b"/not/there\nO/M\nbanana\n10%, 0.25\n-1\n9999\n2\n")
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert b"'banana' is no share" in said
    assert b"'-1' is no number of GPUs" in said
    assert b"no file or directory '/not/there'" in said
    assert b"9999 GPUs are too many" in said
    assert b"--fractions" not in said
    config = load_config(file)
    assert config.models[0].path == "O/M"
    assert [target.fraction for target in config.targets] == [0.1, 0.25]
    assert config.execution.training.workers == 2


@pytest.mark.parametrize(
    ("model", "name"),
    [("meta-llama/Llama-3.2-1B", "llama-3.2-1b"), ("/x/My Model/", "my-model"), ("../..", "model")],
)
def test_models_get_names_fit_for_paths(model: str, name: str) -> None:
    assert short_name(model) == name


def test_doctor_says_of_storage_that_is_away_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 1)
    answer = iterabre("doctor", "--json", "--storage", "s3://bucket/runs")
    assert answer.exit_code == 1
    (storage,) = [each for each in json.loads(answer.out) if each["name"] == "storage"]
    assert storage["state"] == "fail"
    assert "s3://bucket/runs" in storage["found"]
    assert "AWS_ENDPOINT_URL" in storage["remedy"]


def test_the_schema_knows_every_section_and_field() -> None:
    described = json.loads(iterabre("schema").out)
    assert set(described["properties"]) == set(CampaignConfig.model_fields)
    assert described["additionalProperties"] is False
    recovery = described["$defs"]["RecoveryConfig"]["properties"]
    assert recovery["learning_rate"]["description"]
    yaml.safe_dump(described)


def test_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    answer = iterabre("doctor", "--json", "--storage", tmp_path)
    found = {finding["name"]: finding for finding in json.loads(answer.out)}
    assert answer.exit_code == 0
    assert found["Python"]["state"] == found["packages"]["state"] == "ok"
    assert str(tmp_path) in found["storage"]["found"]


def test_doctor_says_what_to_mend_when_no_cluster_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    answer = iterabre("doctor", "--json", "--address", address)
    cluster = json.loads(answer.out)[-1]
    assert (answer.exit_code, cluster["state"]) == (1, "fail")
    assert "ray start --head" in cluster["remedy"]
