"""The help of every command ends with examples, and the examples are right."""

import shlex
from pathlib import Path

import pytest
import typer

from orchestrator.cli.app import app
from orchestrator.cli.config_template import Answers, campaign_file
from orchestrator.cli.examples import EXAMPLES
from orchestrator.cli.options import complete_machines, completing
from orchestrator.config import load_config
from tests.unit.cli.command import iterabre

COMMANDS = typer.main.get_command(app).commands
LINES = [(command, line) for command, examples in EXAMPLES.items() for _, line in examples]


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_fit_the_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = [line.strip() for line in iterabre(command, "--help").out.splitlines()]
    examples = shown[shown.index("Examples") + 1 :]
    expected = [part for why, line in EXAMPLES[command] for part in (f"# {why}", line)]
    assert [line for line in examples if line] == expected


@pytest.mark.parametrize("line", [line for _, line in LINES if "--set" in line])
def test_what_examples_set_suits_the_file_that_init_writes(line: str, tmp_path: Path) -> None:
    file = tmp_path / "campaign.yaml"
    file.write_text(campaign_file(Answers("meta-llama/Llama-3.2-1B"), "campaign.yaml"))
    words = shlex.split(line)
    load_config(file, [words[words.index("--set") + 1]])


@pytest.mark.parametrize(("command", "line"), LINES, ids=[line for _, line in LINES])
def test_examples_parse(command: str, line: str) -> None:
    program, name, *arguments = shlex.split(line.split(" > ")[0])
    assert (program, name) == ("iterabre", command)
    COMMANDS[name].make_context(name, arguments)


def test_shells_complete_names_in_lists_and_machines() -> None:
    assert completing("kd", "kl", "random")("kd,k") == ["kd,kd", "kd,kl"]
    assert complete_machines("8xH1") == ["8xH100-80G"]
    assert complete_machines("CPU") == ["CPU-core"]
