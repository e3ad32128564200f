"""A small ledger with numbers that are easy to check by hand."""

import math

import pyarrow as pa

from orchestrator.storage.ledger import Ledger, Row

DENSE_PERPLEXITY, NUM_LAYERS = 29.0, 10
DROPPED = (7, 4, 8)


def sample_ledger(
    uri: str, trajectories: tuple[str, ...] = ("smol-iterabre-s0",), seed: int = 0, method: str = "iterabre"
) -> pa.Table:
    """Three iterations of each trajectory, one layer at a time, as the campaign writes them.

    The method of a trajectory called `MODEL--METHOD--…` is METHOD; others are of `method`.
    """
    ledger = Ledger(uri)
    for number, trajectory in enumerate(trajectories):
        names = trajectory.split("--")
        source = {"campaign": "demo", "trajectory": trajectory, "model": "smol"}
        source |= {"method": names[1] if len(names) > 1 else method, "seed": seed + number}
        ledger.append(f"{trajectory}-0", _evaluation(source, 0, "dense", DENSE_PERPLEXITY, 0.78))
        for iteration in range(1, len(DROPPED) + 1):
            ledger.append(f"{trajectory}-{iteration}", _iteration(source, iteration, number))
    return ledger.read()


def _iteration(source: dict, iteration: int, shift: int) -> list[Row]:
    layer = DROPPED[iteration - 1]
    remaining = [i for i in range(NUM_LAYERS) if i not in DROPPED[: iteration - 1]]

    def row(stage: str, metric: str, value: float, **more: object) -> Row:
        key = f"{stage}-{iteration}-{source['trajectory']}"
        return Row(**source, iteration=iteration, stage=stage, key=key, metric=metric, value=value, **more)  # type: ignore[arg-type]

    score = {i: 0.9 + 0.01 * i - 0.1 * (i in (0, 9)) - 0.01 * iteration for i in remaining}
    pruned, recovered = 29.0 * 1.6**iteration + shift, 29.0 * 1.25**iteration + shift
    return [
        *(row("score", "score", score[i], layer=i) for i in remaining),
        row("score", "seconds", 2.5, unit="s"),
        row("prune", "dropped", score[layer], layer=layer),
        row("prune", "layers", NUM_LAYERS - iteration),
        row("prune", "seconds", 0.01, unit="s"),
        *(row("recover", "loss", 3 / iteration * math.exp(-s / 40) + 1, step=s) for s in range(1, 81)),
        *(row("recover", "learning_rate", 1e-4 * (1 - s / 80), step=s) for s in range(1, 81)),
        row("recover", "tokens", 81920, unit="tokens"),
        row("recover", "seconds", 100.0, unit="s"),
        *_evaluation(source, iteration, "pruned", pruned, 0.6),
        *_evaluation(source, iteration, "recovered", recovered, 0.78 - 0.03 * iteration),
        row("export", "layers", NUM_LAYERS - iteration),
    ]


def _evaluation(source: dict, iteration: int, phase: str, perplexity: float, accuracy: float) -> list[Row]:
    measured = {
        "wikitext2/token_perplexity": (perplexity, None),
        "blimp_sample/acc": (accuracy, 0.012),
        "parameters": (134_515_008.0 - 3_540_096 * iteration, None),
        "seconds": (40.0, None),
    }
    # The unpruned model is evaluated once for all.
    key = f"evaluate-{phase}-{iteration}" + (f"-{source['trajectory']}" if iteration else "")
    return [
        Row(
            **source,
            iteration=iteration,
            stage="evaluate",
            phase=phase,
            key=key,
            metric=metric,
            value=value,
            stderr=err,
        )
        for metric, (value, err) in measured.items()
    ]
