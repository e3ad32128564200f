"""The help of every command ends with examples, and the examples are right."""

import shlex

import pytest
import typer

from orchestrator.cli.app import app
from orchestrator.cli.examples import EXAMPLES
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


@pytest.mark.parametrize(("command", "line"), LINES, ids=[line for _, line in LINES])
def test_examples_parse(command: str, line: str) -> None:
    program, name, *arguments = shlex.split(line.split(" > ")[0])
    assert (program, name) == ("iterabre", command)
    COMMANDS[name].make_context(name, arguments)
