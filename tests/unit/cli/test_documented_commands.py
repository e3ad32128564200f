"""Every `iterabre` command that a page shows is one that the command line takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.cli.app import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of the page's fenced blocks that call `iterabre`, from its name on, without comments."""
    blocks = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?(?:.*-- )?(iterabre .*)$", blocks, re.MULTILINE)
    return [re.split(r"\s#|\s>|'? --tmux", line)[0] for line in found]


def unknown_words(line: str) -> list[str]:
    """The command and options of the line that there are none of."""
    words = shlex.split(line.replace("[", "").replace("]", ""))[1:]
    node: Any = typer.main.get_command(app)
    while hasattr(node, "commands") and words and not words[0].startswith("-"):
        if words[0] not in node.commands:
            return [words[0]]
        node = node.commands[words.pop(0)]
    known = {option for each in node.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    wrong = {line: unknown for line in commands(page) if (unknown := unknown_words(line))}
    assert not wrong


def test_commands_are_found() -> None:
    assert len(commands(ROOT / "README.md")) > 10
    assert unknown_words("iterabre plan x.yaml --machin 1xA100") == ["--machin"]
    assert unknown_words("iterabre plann x.yaml") == ["plann"]
