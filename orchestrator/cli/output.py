"""The consoles of all commands, and the forms in which they print."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

out = Console()
err = Console(stderr=True)


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
