"""The single commands, and what all commands have in common."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.cli.evaluate import parse_num_fewshot
from orchestrator.cli.options import parse_layers
from orchestrator.errors import RequestError
from tests.support.object_store import loopback_s3
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import tiny_llama
from tests.unit.cli.command import iterabre


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    write_campaign(tiny_campaign(directory), directory / "campaign.yaml")
    return directory


def test_json_is_all_that_a_machine_is_given(place: Path) -> None:
    """In a process of its own, where libraries are imported for the first time."""
    command = [sys.executable, "-m", "orchestrator.cli", "plan", str(place / "campaign.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    (row,) = plan["trajectories"]
    assert (plan["stages"]["distinct"], plan["stages"]["to_run"]) == (13, 13)
    assert (row["trajectory"], row["targets"]) == ("llama--iterabre--seed0", [3, 2])
    assert done.stderr == ""


def test_plan_shows_trajectories_and_starts_nothing(place: Path) -> None:
    answer = iterabre("plan", place / "campaign.yaml", "--set", "targets=[{layers: 1}]")
    assert answer.exit_code == 0
    assert "llama--iterabre--seed0" in answer.out
    assert "4 → 1" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80
    assert not (place / "runs").exists()


def test_score_ranks_every_layer(place: Path) -> None:
    arguments = ("score", "--model", place / "model", "--calibration", place / "text.txt")
    scored = json.loads(iterabre(*arguments, "--json").out)
    layers = scored["layers"]
    assert scored["criterion"] == "hidden_cosine"
    assert [row["layer"] for row in layers] == [0, 1, 2, 3]
    by_score = sorted(layers, key=lambda row: -row["score"])
    assert [row["remove"] for row in by_score] == [1, 2, 3, 4]
    assert f"{layers[0]['score']:.6f}" in iterabre(*arguments).out


def test_score_marks_what_is_a_bound(place: Path) -> None:
    arguments = ("score", "--model", place / "model", "--calibration", place / "text.txt")
    every = json.loads(iterabre(*arguments, "--json").out)["layers"]
    table = iterabre(*arguments, "--eliminate").out
    layers = json.loads(iterabre(*arguments, "--eliminate", "--json").out)["layers"]
    assert {row["kind"] for row in every} == {"exact"}
    assert [row["layer"] for row in layers if row["remove"] == 1] == [
        row["layer"] for row in every if row["remove"] == 1
    ]
    assert {row["kind"] for row in layers} == {"exact", "bound"}
    for row in layers:
        mark = "≤ " if row["kind"] == "bound" else ""
        assert f"{mark}{row['score']:.6f}" in table
    screened = iterabre(*arguments, "--screen-dtype", "bfloat16", "--json")
    assert {row["kind"] for row in json.loads(screened.out)["layers"]} <= {"exact", "screened"}
    refused = iterabre(*arguments, "--screen-dtype", "float16")
    assert refused.exit_code == 2
    assert "unknown screening dtype 'float16'" in refused.err


@pytest.fixture(scope="module")
def own_code(place: Path) -> Path:
    """A model that transformers opens by code that lies beside it."""
    directory = place / "own-code"
    shutil.copytree(place / "model", directory)
    (directory / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (directory / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    names = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    return directory


SINGLE_COMMANDS = {
    "score": ("--criterion", "block_influence", "--json"),
    "prune": ("--drop", "1", "--output"),
    "evaluate": ("--probes", "arithmetic", "--limit", "2", "--json"),
    "sweep": ("--probes", "arithmetic", "--limit", "2", "--layers", "1", "--json", "--output"),
}


@pytest.mark.parametrize("command", SINGLE_COMMANDS)
def test_code_of_a_model_runs_only_where_it_is_trusted(
    own_code: Path, place: Path, tmp_path: Path, command: str
) -> None:
    options = SINGLE_COMMANDS[command]
    options = (*options, tmp_path / "out") if options[-1] == "--output" else options
    refused = iterabre(command, "--model", own_code, *options)
    assert refused.exit_code == 2, refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "out").exists()
    trusted = iterabre(command, "--model", own_code, "--trust-remote-code", *options)
    assert trusted.exit_code == 0, trusted.err
    # The same weights in a model that needs no code.
    again = (*options[:-1], tmp_path / "plain") if options[-1] == tmp_path / "out" else options
    plain = iterabre(command, "--model", place / "model", *again)
    assert trusted.out.replace("own-code", "model").replace("/out", "/plain") == plain.out


@pytest.mark.parametrize("command", SINGLE_COMMANDS)
def test_a_revision_of_what_is_no_hub_model_is_refused(place: Path, tmp_path: Path, command: str) -> None:
    options = SINGLE_COMMANDS[command]
    options = (*options, tmp_path / "out") if options[-1] == "--output" else options
    answer = iterabre(command, "--model", place / "model", "--revision", "v2", *options)
    assert answer.exit_code == 2
    assert f"model '{place / 'model'}' lies on this machine and has no revision 'v2'" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", SINGLE_COMMANDS)
def test_a_hub_model_is_asked_for_at_its_revision(tmp_path: Path, command: str) -> None:
    options = SINGLE_COMMANDS[command]
    options = (*options, tmp_path / "out") if options[-1] == "--output" else options
    answer = iterabre(command, "--model", "no-such-org/no-such-model", "--revision", "v2", *options)
    assert answer.exit_code == 2
    assert "model 'no-such-org/no-such-model' cannot be opened" in answer.err


def test_score_with_a_criterion_that_needs_no_text(place: Path) -> None:
    answer = iterabre("score", "--model", place / "model", "--criterion", "reverse", "--json")
    assert [row["remove"] for row in json.loads(answer.out)["layers"]] == [4, 3, 2, 1]


@pytest.mark.parametrize(("drop", "left"), [("1,2", [0, 3]), ("0-1", [2, 3])])
def test_prune_writes_the_model_without_those_layers(
    place: Path, tmp_path: Path, drop: str, left: list[int]
) -> None:
    output = tmp_path / "a/pruned"
    answer = iterabre("prune", "--model", place / "model", "--drop", drop, "--output", output)
    assert answer.exit_code == 0, answer.err
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert answer.out == f"{output}: 2 layers, {pruned.num_parameters():,} parameters\n"
    source, tokenizer = tiny_llama(4)
    source.model.layers = torch.nn.ModuleList(source.model.layers[i] for i in left)
    ids = torch.tensor([tokenizer("The quick brown fox").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, source(ids, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(output)("The fox").input_ids == tokenizer("The fox").input_ids


def test_evaluate_runs_tasks(place: Path) -> None:
    arguments = ("evaluate", "--model", place / "model", "--tasks", "blimp_sample", "--limit", 5)
    answer = iterabre(*arguments, "--json")
    assert answer.exit_code == 0, answer.err
    result = json.loads(answer.out)
    (metric,) = [metric for metric in result["metrics"] if metric["name"] == "blimp_sample/acc"]
    assert metric["value"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert dict(result["versions"])["torch"]


def test_evaluate_prints_the_columns_of_lm_eval_and_keeps_samples(place: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", "--model", place / "model", "--tasks", "blimp_sample", "--limit", 5)
    answer = iterabre(*arguments, "--log-samples", tmp_path / "samples", "--system-instruction", "Be brief.")
    assert answer.exit_code == 0, answer.err
    heading, row = (
        next(line for line in answer.out.splitlines() if line.lstrip().startswith(start)).split()
        for start in ("task", "blimp_sample")
    )
    assert heading == ["task", "version", "n-shot", "metric", "value", "±", "stderr"]
    assert (row[:4], row[5]) == (["blimp_sample", "1.1", "0", "acc"], "±")
    lines = (tmp_path / "samples/samples_blimp_sample.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3, 4]
    assert sum(sample["acc"] for sample in samples) / 5 == float(row[4])
    assert all(s["arguments"]["gen_args_0"]["arg_0"].startswith("Be brief.") for s in samples)
    answer = iterabre(*arguments, "--log-samples", tmp_path / "samples")
    assert (answer.exit_code, "already" in answer.err) == (2, True)


@pytest.mark.parametrize(
    ("given", "shots"),
    [
        ((), None),
        (("5",), 5),
        (("boolq=0", "mmlu=5"), (("boolq", 0), ("mmlu", 5))),
        (("boolq=0,mmlu=5",), (("boolq", 0), ("mmlu", 5))),
    ],
)
def test_examples_are_a_number_for_all_tasks_or_one_for_each(given: tuple[str, ...], shots: object) -> None:
    assert parse_num_fewshot(given) == shots


@pytest.mark.parametrize("given", [("five",), ("boolq=",), ("5", "boolq=0"), ("-1",)])
def test_other_examples_are_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="--num-fewshot"):
        parse_num_fewshot(given)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("3,4", [3, 4]), ("20-24", [20, 21, 22, 23, 24]), ("0-1, 5", [0, 1, 5]), ("7-7", [7])],
)
def test_layers_are_numbers_and_ranges(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


def test_debug_shows_the_traceback(place: Path) -> None:
    plain, debug = iterabre("status", place), iterabre("--debug", "status", place)
    assert plain.exit_code == debug.exit_code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err in debug.err


def test_help_lists_commands_and_debug() -> None:
    text = iterabre("--help").out
    assert "--debug" in text
    for command in (
        "plan", "compress", "campaign", "status", "report", "score", "prune", "evaluate", "export",
    ):  # fmt: skip
        assert f" {command} " in text
        assert iterabre(command, "--help").exit_code == 0


def test_a_run_in_an_object_store(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    with loopback_s3(monkeypatch) as uri:
        settings = ("--set", f"storage.path={uri}", "--set", "targets=[{layers: 3}]")
        answer = iterabre("campaign", place / "campaign.yaml", *settings)
        assert answer.exit_code == 0, answer.err
        lines = json.loads(iterabre("status", f"{uri}/tiny", "--json").out)["iterations"]
        assert [line["layers"] for line in lines] == [4, 3]
        assert iterabre("report", f"{uri}/tiny").out.strip() == f"{uri}/tiny/report"
        where = ("--trajectory", "llama--iterabre--seed0", "--iteration", 1, "--output", tmp_path / "out")
        assert iterabre("export", f"{uri}/tiny", *where).exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3
