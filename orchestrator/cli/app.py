"""The `iterabre` command: its subcommands, and the exit code of their errors.

Heavy modules are imported inside the subcommand that needs them.
"""

import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from actors.stage_output import quiet_libraries
from orchestrator.cli.cache import cache
from orchestrator.cli.campaign import campaign, compress
from orchestrator.cli.control import cancel, continue_, pause, prioritise
from orchestrator.cli.error_boundary import BoundedGroup, close_output
from orchestrator.cli.evaluate import evaluate
from orchestrator.cli.examples import epilog
from orchestrator.cli.export import export
from orchestrator.cli.listing import ls
from orchestrator.cli.logs import logs
from orchestrator.cli.output import err
from orchestrator.cli.plan import plan
from orchestrator.cli.prune import prune
from orchestrator.cli.runs import report, status
from orchestrator.cli.score import score
from orchestrator.cli.setup import doctor, init, schema
from orchestrator.cli.sweep import sweep
from orchestrator.errors import IterabreError

COMMANDS = (
    plan,
    compress,
    campaign,
    status,
    logs,
    cancel,
    pause,
    continue_,
    prioritise,
    report,
    score,
    prune,
    evaluate,
    export,
    sweep,
    ls,
    init,
    doctor,
    schema,
)
"""In the order of the help."""

app = typer.Typer(
    epilog="Errors are one message; with --debug anywhere on the line, the traceback too.",
    no_args_is_help=True,
    cls=BoundedGroup,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    name = command.__name__.rstrip("_")
    app.command(name, epilog=epilog(name))(command)
app.add_typer(cache, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        packages = ("iterabre", "torch", "transformers", "peft", "deepspeed", "ray", "lm_eval")
        typer.echo("\n".join(f"{package} {version(package)}" for package in packages))
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the versions that run, and exit."
        ),
    ] = False,
) -> None:
    """Make language models smaller: remove whole layers, heal each removal, repeat. On Ray."""


def main() -> None:
    """Run the command line; errors become one message and an exit code, `--debug` adds the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    quiet_libraries()
    try:
        app(args=arguments, prog_name="iterabre")
    except IterabreError as error:
        if debug:
            traceback.print_exc()
        err.print(f"iterabre: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    finally:
        close_output()
