"""Draw charts: interactive for the page (plotly), as PNG and SVG files for documents (matplotlib)."""

import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from orchestrator.report.charts import Chart, Figure, HeatMap

# Mid-tones that can be told apart on white and on near-black.
COLOURS = ("#4c8bc9", "#e08a3c", "#4aa96c", "#c25fb0", "#d9534f", "#8c8c8c", "#b59a2b", "#3fa9b5", "#8f76d6")
COLOUR_SCALE = "Viridis"
CLEAR = "rgba(0,0,0,0)"
FORMATS = ("png", "svg")
MOST_TICKS = 40


def interactive(figure: Figure) -> str:
    """An HTML fragment; the page must carry plotly.js and gives text and grid their colours."""
    drawn = _plotly_map(figure) if isinstance(figure, HeatMap) else _plotly_chart(figure)
    drawn.update_layout(
        height=360,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest" if isinstance(figure, HeatMap) else "x unified",
        barmode="stack" if isinstance(figure, Chart) and figure.kind == "stacked" else "group",
    )
    return drawn.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )


def write_files(figure: Figure, stem: Path) -> None:
    """Draw for print, 8 × 4.5 inches, as `stem`.png and `stem`.svg."""
    canvas = Canvas(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    if isinstance(figure, HeatMap):
        _draw_map(figure, axes)
    elif figure.kind == "lines":
        _draw_lines(figure, axes)
    else:
        _draw_bars(figure, axes)
    axes.set(title=figure.title, xlabel=figure.x_title, ylabel=figure.y_title)
    for ending in FORMATS:
        canvas.savefig(stem.with_name(f"{stem.name}.{ending}"), dpi=150)
        # The layout, the slowest part, is good for all formats.
        canvas.set_layout_engine("none")


def _draw_lines(chart: Chart, axes: Axes) -> None:
    for curve, colour in zip(chart.curves, _colours(chart), strict=True):
        style: dict[str, Any] = {"linestyle": "--"} if curve.dashed else {"marker": "o", "markersize": 3}
        axes.errorbar(curve.x, curve.y, yerr=curve.stderr, label=curve.name, color=colour, **style)
    axes.set_yscale("log" if chart.log_y else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_bars(chart: Chart, axes: Axes) -> None:
    places = list(dict.fromkeys(x for curve in chart.curves for x in curve.x))
    stacked = chart.kind == "stacked"
    width = 0.8 if stacked else 0.8 / len(chart.curves)
    below = [0.0] * len(places)
    for number, (curve, colour) in enumerate(zip(chart.curves, _colours(chart), strict=True)):
        heights = [dict(zip(curve.x, curve.y, strict=True)).get(place, 0.0) for place in places]
        shift = 0.0 if stacked else width * (number - (len(chart.curves) - 1) / 2)
        centres = [place + shift for place in range(len(places))]
        axes.bar(centres, heights, width, bottom=below if stacked else None, label=curve.name, color=colour)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(places)), [str(place) for place in places], fontsize=7)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.legend(fontsize=8)


def _draw_map(heat_map: HeatMap, axes: Axes) -> None:
    values = [[math.nan if value is None else value for value in row] for row in heat_map.values]
    image = axes.imshow(values, aspect="auto", cmap=COLOUR_SCALE.lower())
    axes.set_xticks(range(len(heat_map.x)), heat_map.x, fontsize=7)
    axes.set_yticks(range(len(heat_map.y)), heat_map.y)
    crosses = [(heat_map.x.index(x), heat_map.y.index(y)) for x, y in heat_map.marked]
    if crosses:
        axes.scatter(*zip(*crosses, strict=True), marker="x", color="red")
    axes.figure.colorbar(image, label="score", ax=axes)


def _plotly_chart(chart: Chart) -> go.Figure:
    figure = go.Figure()
    for curve, colour in zip(chart.curves, _colours(chart), strict=True):
        if chart.kind != "lines":
            figure.add_bar(x=curve.x, y=curve.y, name=curve.name, marker={"color": colour})
            continue
        many = len(curve.x) > MOST_TICKS
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name=curve.name,
            mode="lines" if curve.dashed or many else "lines+markers",
            line={"color": colour, "width": 2, "dash": "dash" if curve.dashed else "solid"},
            error_y=None if curve.stderr is None else {"type": "data", "array": curve.stderr},
        )
    whole = all(isinstance(x, int) for curve in chart.curves for x in curve.x)
    few = len({x for curve in chart.curves for x in curve.x}) <= MOST_TICKS and chart.x_title == "iteration"
    labelled = any(isinstance(x, str) for curve in chart.curves for x in curve.x)
    figure.update_xaxes(
        title=chart.x_title, dtick=1 if few and whole else None, type="category" if labelled else None
    )
    figure.update_yaxes(title=chart.y_title, type="log" if chart.log_y else "linear")
    return figure


def _plotly_map(heat_map: HeatMap) -> go.Figure:
    figure = go.Figure()
    hover = "layer %{x}, iteration %{y}: %{z:.5g}<extra></extra>"
    figure.add_heatmap(
        x=heat_map.x,
        y=heat_map.y,
        z=heat_map.values,
        colorscale=COLOUR_SCALE,
        hovertemplate=hover,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar={"title": "score"},
    )
    xs, ys = zip(*heat_map.marked, strict=True) if heat_map.marked else ((), ())
    cross = {"symbol": "x", "size": 10, "color": "#e5383b", "line": {"color": "white", "width": 1}}
    figure.add_scatter(x=xs, y=ys, mode="markers", marker=cross, name="dropped", hoverinfo="skip")
    figure.update_xaxes(
        title=heat_map.x_title, dtick=1 if len(heat_map.x) <= MOST_TICKS else None, showgrid=False
    )
    figure.update_yaxes(title=heat_map.y_title, dtick=1, autorange="reversed", showgrid=False)
    return figure


def _colours(chart: Chart) -> list[str]:
    """A colour a curve; the dashed curve of a method has that of its solid one."""
    names = list(dict.fromkeys(curve.name.split(", before")[0] for curve in chart.curves))
    return [COLOURS[names.index(curve.name.split(", before")[0]) % len(COLOURS)] for curve in chart.curves]
