"""Draw charts: interactive for the page (plotly), as PNG files for documents (matplotlib)."""

import math
from pathlib import Path

import plotly.graph_objects as go
from matplotlib.figure import Figure

from orchestrator.report.charts import Chart, HeatMap

# Mid-tones that can be told apart on white and on near-black.
COLOURS = ("#4c8bc9", "#e08a3c", "#4aa96c", "#c25fb0", "#d9534f", "#8c8c8c", "#b59a2b", "#3fa9b5", "#8f76d6")
COLOUR_SCALE = "Viridis"
CLEAR = "rgba(0,0,0,0)"


def interactive(chart: Chart | HeatMap) -> str:
    """An HTML fragment; the page must carry plotly.js and gives text and grid their colours."""
    figure = _plotly_map(chart) if isinstance(chart, HeatMap) else _plotly_lines(chart)
    figure.update_layout(
        height=360,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest" if isinstance(chart, HeatMap) else "x unified",
    )
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )


def write_png(chart: Chart | HeatMap, path: Path) -> None:
    """Draw a chart for print, 1600 × 900 pixels."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if isinstance(chart, HeatMap):
        values = [[math.nan if value is None else value for value in row] for row in chart.values]
        image = axes.imshow(values, aspect="auto", cmap=COLOUR_SCALE.lower())
        axes.set_xticks(range(len(chart.x)), chart.x, fontsize=7)
        axes.set_yticks(range(len(chart.y)), chart.y)
        crosses = [(chart.x.index(x), chart.y.index(y)) for x, y in chart.marked]
        if crosses:
            axes.scatter(*zip(*crosses, strict=True), marker="x", color="red")
        figure.colorbar(image, label="score")
    else:
        for curve, colour in zip(chart.curves, _colours(len(chart.curves)), strict=True):
            style = {"linestyle": "--"} if curve.dashed else {"marker": "o", "markersize": 3}
            axes.errorbar(curve.x, curve.y, yerr=curve.stderr, label=curve.name, color=colour, **style)
        axes.set_yscale("log" if chart.log_y else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes.set(title=chart.title, xlabel=chart.x_title, ylabel=chart.y_title)
    figure.savefig(path, dpi=200)


def _plotly_lines(chart: Chart) -> go.Figure:
    figure = go.Figure()
    for curve, colour in zip(chart.curves, _colours(len(chart.curves)), strict=True):
        many = len(curve.x) > 50
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name=curve.name,
            mode="lines" if curve.dashed or many else "lines+markers",
            line={"color": colour, "width": 2, "dash": "dash" if curve.dashed else "solid"},
            error_y=None if curve.stderr is None else {"type": "data", "array": curve.stderr},
        )
    few = len({x for curve in chart.curves for x in curve.x}) <= 40 and chart.x_title != "optimizer step"
    figure.update_xaxes(title=chart.x_title, dtick=1 if few else None)
    figure.update_yaxes(title=chart.y_title, type="log" if chart.log_y else "linear")
    return figure


def _plotly_map(chart: HeatMap) -> go.Figure:
    figure = go.Figure()
    hover = "layer %{x}, iteration %{y}: %{z:.5g}<extra></extra>"
    figure.add_heatmap(
        x=chart.x,
        y=chart.y,
        z=chart.values,
        colorscale=COLOUR_SCALE,
        hovertemplate=hover,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar={"title": "score"},
    )
    xs, ys = zip(*chart.marked, strict=True) if chart.marked else ((), ())
    cross = {"symbol": "x", "size": 10, "color": "#e5383b", "line": {"color": "white", "width": 1}}
    figure.add_scatter(x=xs, y=ys, mode="markers", marker=cross, name="dropped", hoverinfo="skip")
    figure.update_xaxes(title=chart.x_title, dtick=1 if len(chart.x) <= 40 else None, showgrid=False)
    figure.update_yaxes(title=chart.y_title, dtick=1, autorange="reversed", showgrid=False)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
