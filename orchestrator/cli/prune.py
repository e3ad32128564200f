"""The command `prune`: write a model without some of its layers."""

from typing import Annotated, Any, cast

import typer

from orchestrator.cli.options import (
    Model,
    Output,
    Revision,
    TrustRemoteCode,
    new_directory,
    parse_layers,
    source_model,
)
from orchestrator.cli.output import print_model


def prune(
    model: Model,
    drop: Annotated[str, typer.Option(help="Layers to drop, from 0, e.g. 3,4 or 20-24.")],
    output: Output,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as stored if not given.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model without some of its layers, with no recovery; models larger than memory too."""
    from actors.models import prune_checkpoint

    layers = parse_layers(drop)
    source_model(model, dtype or "float32", revision, trust_remote_code)
    with new_directory(output):
        num_layers, num_parameters = prune_checkpoint(
            model,
            layers,
            output,
            dtype=cast(Any, None if dtype == "auto" else dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    print_model(output, num_layers, num_parameters)
