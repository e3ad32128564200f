"""The commands that come before a run: `init`, `doctor`, `schema`."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from actors.contracts import names
from orchestrator.cli.options import completing
from orchestrator.cli.output import out, print_json
from orchestrator.config import campaign_schema
from orchestrator.errors import RequestError

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]–[/]", "fail": "[red]✗[/]"}


def init(
    output: Annotated[Path, typer.Argument(help="File to write.")] = Path("campaign.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id, directory or GGUF file.")] = None,
    fractions: Annotated[
        str | None, typer.Option(help="Shares of the layers to remove, e.g. 0.1,0.25.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to use; 0 for CPUs.", min=0)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to recover on: a file, or a built-in text by name; WikiText-2 if absent.",
            autocompletion=completing(*names.TEXTS),
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each recovery.", min=1)] = 2_500_000,
    name: Annotated[
        str | None, typer.Option(help="What paths call campaign and model; made from --model if absent.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented campaign file; prompts for what no option says, in a terminal."""
    from actors.data import BUILTIN_TEXTS
    from orchestrator.cli.config_template import Answers, campaign_file

    if output.exists() and not force:
        raise RequestError(f"{str(output)!r} is there already; choose another name, or give --force")
    if not output.parent.is_dir():
        raise RequestError(f"{str(output)!r} cannot be written: there is no directory {str(output.parent)!r}")
    asked = sys.stdin.isatty()
    if model is None and not asked:
        raise RequestError("--model says which model to compress; e.g. --model meta-llama/Llama-3.2-1B")
    model = model or typer.prompt("Model (hub id, directory or GGUF file)", value_proc=_asked_model)
    if fractions is None and asked:
        shares = typer.prompt("Shares of the layers to remove", "0.1,0.25", value_proc=_asked_shares)
    else:
        shares = _given_shares(fractions or "0.1,0.25")
    if gpus is None and asked:
        gpus = typer.prompt("GPUs to use, 0 for CPUs", 1, value_proc=partial(_asked_gpus, max_tokens))
    gpus = 1 if gpus is None else gpus
    answers = Answers(
        model=str(model),
        fractions=shares,
        gpus=int(gpus),
        dtype="auto" if gpus else "float32",
        data=data,
        builtin=data in BUILTIN_TEXTS,
        max_tokens=max_tokens,
        name=name,
    )
    output.write_text(campaign_file(answers, str(output)), encoding="utf-8")
    out.print(f"{output} written. Next: iterabre plan {output}", soft_wrap=True)


def _given_shares(text: str) -> tuple[float, ...]:
    from orchestrator.cli.config_template import layer_shares

    try:
        return layer_shares(text)
    except RequestError as error:
        raise RequestError(f"--fractions {text!r}: {error}") from error


def _asked_model(answer: str) -> str:
    """Read an answer; a path that is not there is said, and asked again."""
    text = answer.strip()
    is_path = text.startswith(("/", "./", "../", "~")) or (text.endswith(".gguf") and "://" not in text)
    if not text or (is_path and not Path(text).expanduser().exists()):
        raise typer.BadParameter(f"there is no file or directory {text!r}")
    return text


def _asked_shares(answer: str) -> tuple[float, ...]:
    """Read an answer; what is no share is said, and asked again."""
    from orchestrator.cli.config_template import layer_shares

    try:
        return layer_shares(answer)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error


def _asked_gpus(max_tokens: int, answer: str) -> int:
    """Read an answer; no number, or more than a recovery has sequences for, is said, and asked again."""
    from orchestrator.cli.config_template import batch_for

    if not str(answer).isdecimal():
        raise typer.BadParameter(f"{answer!r} is no number of GPUs")
    try:
        batch_for(max_tokens, max(1, int(answer)))
    except RequestError as error:
        raise typer.BadParameter(f"{answer} GPUs are too many: {error}") from error
    return int(answer)


def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at: auto, or HOST:PORT.")] = None,
    storage: Annotated[str, typer.Option(help="Where runs will be kept.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check Python, packages, disk, GPUs, hub and cluster, and say what to mend.

    The exit code is 1 if something will not work.
    """
    from orchestrator.cli.doctor import Place, examine

    findings = list(examine(Place(address, storage)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table("", "", "found", "what to do", box=None)
        for finding in findings:
            table.add_row(MARKS[finding.state], finding.name, finding.found, finding.remedy)
        out.print(table)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


def schema() -> None:
    """Print the JSON Schema of campaign files, for editors that complete and check YAML."""
    print_json(campaign_schema())
