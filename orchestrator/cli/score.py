"""The command `score`: rank the layers of a model."""

from typing import Annotated, Any, cast

import typer

from actors.contracts import names
from orchestrator.cli.options import (
    Dtype,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    completing,
    source_model,
)
from orchestrator.cli.output import print_json, print_table


def score(
    model: Model,
    criterion: Annotated[
        str,
        typer.Option(
            help="How layers are judged; `iterabre ls criteria` lists the ways.",
            autocompletion=completing(*names.CRITERIA),
        ),
    ] = "hidden_cosine",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text file, or the name of a built-in text.", autocompletion=completing(*names.TEXTS)
        ),
    ] = "iterabre-appendix-a",
    remove: Annotated[
        int,
        typer.Option(min=1, help="Layers that will go: their choice stays exact with --eliminate."),
    ] = 1,
    eliminate: Annotated[
        bool, typer.Option("--eliminate", help="Give up layers that bounds prove not to be the next to go.")
    ] = False,
    screen_dtype: Annotated[
        str | None, typer.Option(help="bfloat16: score in it first, then in float32 what is near the best.")
    ] = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score every layer of a model as a candidate for removal."""
    from actors.contracts import ModelRef, ScoreSpec, TextSpec
    from actors.data import BUILTIN_TEXTS, describe_text
    from actors.errors import unknown_name
    from actors.models import describe_model, load_tokenizer
    from actors.scoring import find_criterion, score_locally
    from orchestrator.planning.checks import check_calibration

    judged = find_criterion(criterion)
    if screen_dtype not in (None, "bfloat16"):
        raise unknown_name("screening dtype", str(screen_dtype), ["bfloat16"])
    text = TextSpec(builtin=calibration) if calibration in BUILTIN_TEXTS else TextSpec(path=calibration)
    text = describe_text(text).spec
    info = describe_model(source_model(model, dtype, revision, trust_remote_code))
    spec = ScoreSpec(
        model=ModelRef(info.spec),
        calibration=text,
        criterion=criterion,
        num_remove=remove,
        eliminate=eliminate,
        screen_dtype=cast(Any, screen_dtype),
    )
    check_calibration(spec, info, load_tokenizer(info.spec))
    result = score_locally(spec)
    order = {layer: rank for rank, layer in enumerate(result.removal_order, start=1)}
    rows: list[dict[str, Any]] = [
        {"layer": layer, "score": value, "kind": kind, "remove": order[layer]}
        for layer, value, kind in zip(result.source_layers, result.scores, result.kind_of_each, strict=True)
    ]
    at_best = "≤" if judged.highest_first else "≥"
    marks = {"exact": "", "bound": f"{at_best} ", "screened": "~ ", "screened_bound": f"~{at_best} "}
    if as_json:
        print_json({"criterion": criterion, "layers": rows})
    else:
        columns = {
            "layer": [str(row["layer"]) for row in rows],
            "score": [f"{marks[row['kind']]}{row['score']:.6f}" for row in rows],
            "remove": [str(row["remove"]) for row in rows],
        }
        title = f"{result.num_sequences} sequences; remove 1 first"
        if result.kinds:
            title += f"; {at_best} what a score can be at best, ~ seen in the screening dtype"
        print_table(columns, f"{criterion}, {title}")
