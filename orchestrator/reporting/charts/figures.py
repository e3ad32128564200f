"""Draw figures as PNG and SVG files for documents (matplotlib)."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from orchestrator.reporting.charts.charts import Chart, Figure, HeatMap, Panel

# Mid-tones: each has a contrast of 3 at least with white and with near-black.
COLOURS = ("#4c8bc9", "#cf7420", "#3a9a5e", "#c25fb0", "#d9534f", "#9a8620", "#2f94a0", "#8f76d6",
           "#a9745b", "#d6608c")  # fmt: skip
GREY = "#8c8c8c"
SEQUENCE = ("#7b6fd0", "#5380cf", "#3590b0", "#2f9a83", "#549a45", "#938a22", "#c27a28", "#d9603f")
"""Of what comes one after another: the colours of a spectrum, all equally bright."""
CROSS = "#e5383b"
MOST_TICKS, SMALL_TICKS = 16, 4
DPI, POINTS_PER_INCH = 110, 72
MOST_COLUMNS = 3
FEW = 24
"""So many figures are drawn in this process; more are worth the start of others."""


def colours_of(figure: Figure) -> list[str]:
    """Return one colour for each entry of the legend."""
    count = len(figure.legend)
    if not figure.sequential:
        return [COLOURS[i % len(COLOURS)] for i in range(count)]
    return [SEQUENCE[round(i * (len(SEQUENCE) - 1) / max(count - 1, 1))] for i in range(count)]


def write_all(figures: Sequence[tuple[Figure, Path]], processes: int | None = None) -> None:
    """Write every figure to its stem; many of them in as many processes as there are cores.

    Of a program's own script that is started anew in each process, the main part must be guarded by
    `if __name__ == "__main__"`.
    """
    count = processes or len(os.sched_getaffinity(0))
    if len(figures) <= FEW or count == 1:
        for figure, stem in figures:
            write_files(figure, stem)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        list(pool.map(write_files, *zip(*figures, strict=True), chunksize=4))


def write_files(figure: Figure, stem: Path) -> None:
    """Draw for print as `stem`.png and `stem`.svg; text in the SVG stays text."""
    count = len(figure.panels)
    columns = min(count, MOST_COLUMNS)
    rows = -(-count // columns)
    size = (8, 4.5) if count == 1 else (3.6 * columns, 2.7 * rows + 0.8)
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    colours = dict(zip(figure.legend, colours_of(figure), strict=True))
    for panel, place in zip(figure.panels, axes, strict=False):
        _draw(panel, place, colours, small=count > 1)
    for place in axes[count:]:
        place.set_visible(False)
    canvas.suptitle(figure.title, fontsize=11)
    _legend(figure, canvas, colours)
    with rc_context({"svg.fonttype": "none"}):
        # `savefig` would draw twice for each file, and lay out again.
        canvas.set_dpi(DPI)
        FigureCanvasAgg(canvas).print_png(stem.with_name(f"{stem.name}.png"))
        canvas.set_layout_engine("none")
        canvas.set_dpi(POINTS_PER_INCH)
        FigureCanvasSVG(canvas).print_svg(stem.with_name(f"{stem.name}.svg"))


def _draw(panel: Panel, axes: Axes, colours: dict[str, str], small: bool) -> None:
    if isinstance(panel, HeatMap):
        _draw_map(panel, axes)
    elif panel.kind == "lines":
        for curve in panel.curves:
            few = len(curve.x) <= MOST_TICKS
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if few and not curve.dashed else {}
            style |= {"linestyle": "--" if curve.dashed else "-", "linewidth": 1.2}
            axes.errorbar(curve.x, curve.y, yerr=curve.stderr, color=colours[curve.legend], **style)
        axes.set_yscale("log" if panel.log_y else "linear")
        axes.grid(alpha=0.3)
        if small and not panel.log_y:
            axes.locator_params(nbins=SMALL_TICKS)
        if panel.whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(SMALL_TICKS if small else MOST_TICKS, integer=True))
    else:
        _draw_bars(panel, axes, colours)
    axes.set_title(panel.title if small else "", fontsize=9)
    axes.set_xlabel(panel.x_title, fontsize=8)
    axes.set_ylabel(panel.y_title, fontsize=8)
    axes.tick_params(labelsize=7)


def _legend(figure: Figure, canvas: Canvas, colours: dict[str, str]) -> None:
    shown = {
        curve.legend: curve for panel in figure.panels if isinstance(panel, Chart) for curve in panel.curves
    }
    if len(shown) < 2:
        return
    lines = [
        Line2D([], [], color=colours[name], linestyle=style, linewidth=2, label=name)
        for name in figure.legend
        if (curve := shown.get(name)) and (style := "--" if curve.dashed and not curve.group else "-")
    ]
    canvas.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 4), fontsize=8)


def _draw_bars(chart: Chart, axes: Axes, colours: dict[str, str]) -> None:
    places = chart.places
    stacked = chart.kind == "stacked"
    width = 0.8 if stacked else 0.8 / len(chart.curves)
    below = [0.0] * len(places)
    for number, curve in enumerate(chart.curves):
        heights = [dict(zip(curve.x, curve.y, strict=True)).get(place, 0.0) for place in places]
        shift = 0.0 if stacked else width * (number - (len(chart.curves) - 1) / 2)
        centres = [place + shift for place in range(len(places))]
        errors = curve.stderr and [dict(zip(curve.x, curve.stderr, strict=True)).get(p, 0.0) for p in places]
        axes.bar(
            centres,
            heights,
            width,
            bottom=below if stacked else None,
            yerr=errors,
            color=colours[curve.legend],
            error_kw={"elinewidth": 0.8},
        )
        below = [low + height for low, height in zip(below, heights, strict=True)]
    _name_ticks(axes, places, "x")
    if chart.log_y:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(value for curve in chart.curves for value in curve.y if value > 0) / 2)
    else:
        axes.axhline(0, color="grey", linewidth=0.8)


def _draw_map(heat_map: HeatMap, axes: Axes) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in heat_map.values]
    scale: dict[str, Any] = {"cmap": LinearSegmentedColormap.from_list("sequence", SEQUENCE)}
    if heat_map.around_zero:
        reach = max((abs(v) for row in heat_map.values for v in row if v is not None), default=0.0) or 1.0
        scale = {"cmap": "RdBu", "vmin": -reach, "vmax": reach}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
    if heat_map.marked:
        xs, ys = zip(*heat_map.marked, strict=True)
        across, down = [heat_map.x.index(x) for x in xs], [heat_map.y.index(y) for y in ys]
        axes.scatter(across, down, marker="x", color=CROSS, s=24)
    _name_ticks(axes, heat_map.x, "x")
    _name_ticks(axes, heat_map.y, "y")
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(heat_map.value_title, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _name_ticks(axes: Axes, names: Sequence[Any], which: str) -> None:
    """Label places 0, 1, ... along an axis with names; of many numbers only some."""
    texts = [str(name) for name in names]
    numbered = all(isinstance(name, int) for name in names)
    places = range(0, len(texts), -(-len(texts) // MOST_TICKS) if numbered else 1)
    if which == "y":
        axes.set_yticks(places, [texts[i] for i in places], fontsize=7)
        return
    tilted = sum(map(len, texts)) > 60 and not numbered
    axes.set_xticks(places, [texts[i] for i in places], fontsize=7, rotation=40 if tilted else 0)
    if tilted:
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
