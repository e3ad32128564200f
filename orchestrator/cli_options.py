"""Options and arguments that several commands have in common."""

from typing import Annotated

import typer

from orchestrator.config import absolute_path

Run = Annotated[
    str, typer.Argument(help="Where a run lies: runs/smollm2-demo, s3://bucket/runs/x.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def _absolute(path: str | None) -> str | None:
    """Return the path as workers of a cluster, which have directories of their own, find it, too."""
    return path and absolute_path(path)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Hub id, directory, GGUF file, or package://PACKAGE/FILE.gguf.",
        callback=_absolute,
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
IncludePath = Annotated[
    str | None, typer.Option(help="Directory with further lm-eval tasks.", callback=_absolute)
]
TaskSuffix = Annotated[str, typer.Option(help="Added to the names of suite members.")]
AllowCodeExecution = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run code that the model writes, in a sandbox.")
]
Probes = Annotated[
    str, typer.Option(help="degeneration, arithmetic, code_failures, or a plug-in's; separated by commas.")
]
