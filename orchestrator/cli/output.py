"""The consoles of all commands, and the forms in which they print."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Tell the user what goes on now, with the time of day."""
    line = f"{time.strftime('%H:%M:%S')} {text}"
    err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON, for machines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: dict[str, list[str]], title: str) -> None:
    """Print columns of text under their headings."""
    from orchestrator.reporting.tables.terminal import plain_table

    out.print(plain_table(columns, title))


def print_model(directory: Path, num_layers: int, num_parameters: int) -> None:
    """Print the size of a model that was written."""
    out.print(f"{directory}: {num_layers} layers, {num_parameters:,} parameters", soft_wrap=True)
