"""The command `score`: rank the layers of a model."""

from typing import Annotated

import typer

from orchestrator.cli.options import (
    Dtype,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    source_model,
)
from orchestrator.cli.output import print_json, print_table


def score(
    model: Model,
    criterion: Annotated[str, typer.Option(help="How layers are judged.")] = "hidden_cosine",
    calibration: Annotated[
        str, typer.Option(help="Text file, or the name of a built-in text.")
    ] = "iterabre-appendix-a",
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score every layer of a model as a candidate for removal."""
    from actors.contracts import ModelRef, ScoreSpec, TextSpec
    from actors.data import BUILTIN_TEXTS, describe_text
    from actors.models import describe_model, load_tokenizer
    from actors.scoring import find_criterion, score_locally
    from orchestrator.planning.checks import check_calibration

    find_criterion(criterion)
    text = TextSpec(builtin=calibration) if calibration in BUILTIN_TEXTS else TextSpec(path=calibration)
    text = describe_text(text).spec
    info = describe_model(source_model(model, dtype, revision, trust_remote_code))
    spec = ScoreSpec(model=ModelRef(info.spec), calibration=text, criterion=criterion)
    check_calibration(spec, info, load_tokenizer(info.spec))
    result = score_locally(spec)
    order = {layer: rank for rank, layer in enumerate(result.removal_order, start=1)}
    rows = [
        {"layer": layer, "score": value, "remove": order[layer]}
        for layer, value in zip(result.source_layers, result.scores, strict=True)
    ]
    if as_json:
        print_json({"criterion": criterion, "layers": rows})
    else:
        columns = {
            "layer": [str(row["layer"]) for row in rows],
            "score": [f"{row['score']:.6f}" for row in rows],
            "remove": [str(row["remove"]) for row in rows],
        }
        print_table(columns, f"{criterion}, {result.num_sequences} sequences; remove 1 first")
