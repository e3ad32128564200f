"""Options and arguments that several commands have in common."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from actors.contracts import names
from orchestrator.config import absolute_path
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from actors.contracts import ModelSpec

Config = Annotated[Path, typer.Argument(help="Campaign file, e.g. configs/demo.yaml.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: methods.0.recovery.max_tokens=4096. Repeatable."),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join: auto, or HOST:PORT. This machine alone if not given.")
]
Output = Annotated[Path, typer.Option("--output", help="Directory to write; must not exist or be empty.")]
Run = Annotated[
    str, typer.Argument(help="Where a run lies: runs/smollm2-demo, s3://bucket/runs/x.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def completing(*names: str) -> Callable[[str], list[str]]:
    """Return what completes the last name of a list that commas separate, for shells."""

    def complete(incomplete: str) -> list[str]:
        head, comma, last = incomplete.rpartition(",")
        return [f"{head}{comma}{name}" for name in names if name.startswith(last)]

    return complete


def complete_machines(incomplete: str) -> list[str]:
    """Complete `8xH1` to `8xH100-80G`, for shells."""
    from orchestrator.planning.cost_model import MACHINES

    count, separator, name = incomplete.partition("x") if incomplete[:1].isdecimal() else ("", "", incomplete)
    return [f"{count}{separator}{each}" for each in MACHINES if each.startswith(name)]


def absolute(path: str | None) -> str | None:
    """Return the path as workers of a cluster, which have directories of their own, find it, too."""
    return path and absolute_path(path)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Hub id, directory, GGUF file, or package://PACKAGE/FILE.gguf.",
        callback=absolute,
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model; what is newest if not given.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model, with all that you may do; for sources you trust.",
    ),
]
IncludePath = Annotated[
    str | None, typer.Option(help="Directory with further lm-eval tasks.", callback=absolute)
]
TaskSuffix = Annotated[str, typer.Option(help="Added to the names of suite members.")]
AllowCodeExecution = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run code that the model writes, in a sandbox.")
]
Probes = Annotated[
    str,
    typer.Option(
        help="degeneration, arithmetic, code_failures, speculative, or a plug-in's; separated by commas.",
        autocompletion=completing(*names.PROBES),
    ),
]


def source_model(model: str, dtype: str, revision: str | None, trust_remote_code: bool) -> "ModelSpec":
    """Return the spec of the model that a command names.

    Raises:
        RequestError: a revision of what is no hub model.
    """
    from actors.contracts import ModelSpec
    from actors.models import check_revision

    spec = ModelSpec(model, cast(Any, dtype), revision, trust_remote_code)
    check_revision(spec)
    return spec


def parse_layers(text: str, option: str = "--drop") -> list[int]:
    """Read `3,4` and `20-24` as layer indices; `option` is where they were given.

    Raises:
        RequestError: neither numbers nor ranges.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise RequestError(f"{option} {text!r}: write layers as 3,4 or 20-24")
        layers.extend(span)
    return layers


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in a list that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextmanager
def new_directory(path: Path, option: str = "--output") -> Iterator[None]:
    """Make a directory for output, and remove it again if nothing was written into it.

    `option` is where it was given.
    """
    from actors.artifacts import without_empty_directories

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{option} {str(path)!r} is there already and not empty; choose another directory")
    with without_empty_directories(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{option} {str(path)!r} cannot be made: {error.strerror}") from error
        yield
