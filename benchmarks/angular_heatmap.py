"""Angular distances of all runs of layers of a model, as JSON and as a heat map (Gromov et al., Fig. 4).

    python benchmarks/angular_heatmap.py MODEL --output angular

Rows are run lengths n, columns the first layer of the run. Each row is rescaled to
0..1, so that its darkest square is the run of n layers that goes first.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from torch import Tensor

from actors.contracts import TextSpec
from actors.data import calibration_sequences, load_texts
from actors.models import device, load_model
from actors.scoring.measures.angular import angular_distances


def run_rows(distances: Tensor) -> list[list[float]]:
    """Row n - 1 holds the distances over runs of n layers, by their first layer: N+1-n of them."""
    return [distances.diagonal(size).tolist() for size in range(1, len(distances))]


def draw(rows: list[list[float]], title: str, file: Path) -> None:
    """The heat map of the rescaled rows; the run that goes first is marked in each."""
    grid = np.full((len(rows), len(rows)), np.nan)
    for row, values in zip(grid, rows, strict=True):
        low, high = min(values), max(values)
        row[: len(values)] = [(value - low) / ((high - low) or 1.0) for value in values]
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(
        grid, cmap="viridis", origin="lower", extent=(-0.5, len(rows) - 0.5, 0.5, len(rows) + 0.5)
    )
    best = [int(np.nanargmin(row)) for row in grid]
    axes.plot(best, range(1, len(rows) + 1), "r.", markersize=3, label="least distance")
    axes.set(xlabel="first layer of the run", ylabel="layers in the run", title=title)
    axes.legend(loc="upper right")
    figure.colorbar(image, label="angular distance, each row from 0 to 1")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub id, directory, GGUF file or package://PACKAGE/FILE.gguf")
    parser.add_argument("--calibration", default="iterabre-appendix-a", help="built-in text or file")
    parser.add_argument("--max-sequences", type=int)
    parser.add_argument("--output", type=Path, default=Path("angular"), help="file name without suffix")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    model.to(device())
    is_file = Path(arguments.calibration).exists()
    text = TextSpec(path=arguments.calibration) if is_file else TextSpec(builtin=arguments.calibration)
    sequences = calibration_sequences(load_texts(text), tokenizer, 512, arguments.max_sequences)
    distances = angular_distances(model, [sequence.to(model.device) for sequence in sequences])
    rows = run_rows(distances)
    best = [min(range(len(row)), key=row.__getitem__) for row in rows]
    report = {"model": arguments.model, "sequences": len(sequences), "distances": rows, "best_start": best}
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    draw(rows, arguments.model.rsplit("/", 1)[-1], arguments.output.with_suffix(".png"))
    print(f"wrote {arguments.output}.json and .png; runs of 1 to {len(rows)} layers begin at {best}")


if __name__ == "__main__":
    main()
