"""The command `export`: write the model of an iteration."""

from typing import Annotated

import typer

from orchestrator.cli.options import Output, Run, new_directory
from orchestrator.cli.output import out, print_model
from orchestrator.errors import unknown_name


def export(
    run: Run,
    trajectory: Annotated[str, typer.Option(help="Id of a trajectory, as `iterabre status` shows it.")],
    iteration: Annotated[int, typer.Option(help="Iteration whose recovered model is wanted.", min=1)],
    output: Output,
    format_: Annotated[
        str,
        typer.Option("--format", help="hf for a Hugging Face directory; gguf for a GGUF file in it, too."),
    ] = "hf",
    gguf_type: Annotated[
        str, typer.Option(help="Weights of the GGUF file: auto (as stored), bf16, f16, f32 or q8_0.")
    ] = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it, too: to USER/NAME on the hub, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see what is uploaded.")] = False,
) -> None:
    """Write the model of any finished iteration of a run, and upload it if requested."""
    from orchestrator.execution.resolvers import finished_model
    from orchestrator.export.exporter import export_iteration
    from orchestrator.export.gguf import GGUF_TYPES, check_converter, convert_to_gguf
    from orchestrator.export.hub import check_upload, upload
    from orchestrator.planning.recorded import recorded_trajectory
    from orchestrator.storage.run_manifest import recorded_store

    if format_ not in ("hf", "gguf"):
        raise unknown_name("format", format_, ["hf", "gguf"])
    if gguf_type not in GGUF_TYPES:
        raise unknown_name("GGUF type", gguf_type, GGUF_TYPES)
    if format_ == "gguf":
        check_converter()
    store = recorded_store(run, repr(run))
    if push_to_hub:
        check_upload(push_to_hub)
    with new_directory(output):
        plan = recorded_trajectory(store, trajectory)
        model = finished_model(plan, store, iteration)
        result = export_iteration(store, plan, iteration, model, output, push_to_hub)
    print_model(output, result.num_layers, result.num_parameters)
    if format_ == "gguf":
        out.print(str(convert_to_gguf(output, gguf_type)), soft_wrap=True, highlight=False)
    if push_to_hub:
        out.print(upload(output, push_to_hub, public=public), soft_wrap=True)
