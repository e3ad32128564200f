"""Options and arguments that several commands have in common."""

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.config import absolute_path

if TYPE_CHECKING:
    from actors.contracts import ModelSpec

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
    str | None, typer.Option(help="Directory with further lm-eval tasks.", callback=_absolute)
]
TaskSuffix = Annotated[str, typer.Option(help="Added to the names of suite members.")]
AllowCodeExecution = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run code that the model writes, in a sandbox.")
]
Probes = Annotated[
    str, typer.Option(help="degeneration, arithmetic, code_failures, or a plug-in's; separated by commas.")
]


def source_model(model: str, dtype: str, revision: str | None, trust_remote_code: bool) -> "ModelSpec":
    """Return the spec of the model that a command names.

    Raises:
        RequestError: a revision of what is no hub model.
    """
    from actors.contracts import ModelSpec
    from actors.models import check_revision

    spec = ModelSpec(model, dtype, revision, trust_remote_code)
    check_revision(spec)
    return spec
