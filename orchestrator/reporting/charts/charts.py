"""What a figure shows, as data; `figures` draws it for print and the page's script for the screen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.reporting.data.measured import direction
from orchestrator.reporting.tables.metric_names import heading, hint, named

LOG_SCALE_FROM_RATIO = {"lines": 8.0, "bars": 50.0}
"""Ratio of the largest value to the smallest that it begins at; bars keep their length if all can be seen."""
MOST_POINTS = 120
"""Longer curves are thinned out by means: more than that is not seen, and makes the page slow."""
DIGITS = 5
"""Significant digits of a number in the page; the ledger has all."""

Kind = Literal["lines", "bars", "stacked"]


@dataclass(frozen=True)
class Curve:
    """One line of a chart, or one colour of bars; `stderr`, if any, has one value per point.

    Curves of one `group` have one colour and one place in the legend.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    dashed: bool = False
    stderr: tuple[float, ...] | None = None
    group: str = ""

    @property
    def legend(self) -> str:
        """Name in the legend."""
        return self.group or self.name


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis; a panel of a figure. `metric` is the raw name of what it shows."""

    title: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]
    log_y: bool = False
    kind: Kind = "lines"
    metric: str = ""

    @property
    def whole_x(self) -> bool:
        """True for an axis of counts, such as layers: half of one is no tick."""
        return all(isinstance(x, int) for curve in self.curves for x in curve.x)

    @property
    def places(self) -> Sequence[float | str]:
        """Positions of bars: numbers in order, names as they come."""
        found = list(dict.fromkeys(x for curve in self.curves for x in curve.x))
        numbers = [x for x in found if not isinstance(x, str)]
        return sorted(numbers) if len(numbers) == len(found) else found


@dataclass(frozen=True)
class HeatMap:
    """A panel of `values[row][column]`, None where there is nothing; `marked` holds (x, y) of crossed cells.

    With `around_zero`, losses and gains have colours of their own.
    """

    title: str
    x_title: str
    y_title: str
    x: tuple[int | str, ...]
    y: tuple[int | str, ...]
    values: tuple[tuple[float | None, ...], ...]
    value_title: str
    marked: tuple[tuple[int | str, int | str], ...] = ()
    around_zero: bool = False


Panel = Chart | HeatMap


@dataclass(frozen=True)
class Figure:
    """Panels side by side with one legend. `name` is used for the file, `note` says how to read it.

    `sequential` says that the legend's entries are stages of one development, as iterations are.
    """

    name: str
    title: str
    note: str
    panels: tuple[Panel, ...]
    palette: tuple[str, ...] = ()
    sequential: bool = False

    @property
    def legend(self) -> list[str]:
        """Names in the legend, in the order of their colours."""
        drawn = (curve.legend for panel in self.panels for curve in curves_of(panel))
        return list(dict.fromkeys((*self.palette, *drawn)))


def curves_of(panel: Panel) -> tuple[Curve, ...]:
    """Return the curves of a chart; a heat map has none."""
    return panel.curves if isinstance(panel, Chart) else ()


def figure(
    name: str,
    title: str,
    note: str,
    panels: Iterable[Panel | None],
    palette: Sequence[str] = (),
    sequential: bool = False,
) -> Figure | None:
    """Return a figure of the panels that there are, None if there is none."""
    drawn = tuple(panel for panel in panels if panel is not None)
    return Figure(name, title, note, drawn, tuple(palette), sequential) if drawn else None


def chart(
    title: str,
    x_title: str,
    y_title: str,
    curves: Iterable[Curve | None],
    kind: Kind = "lines",
    metric: str = "",
) -> Chart | None:
    """Return a chart of the curves that have points, None if none has; a wide range gets a log axis.

    Of a `metric`, the title is its name in words.
    """
    drawn = tuple(thinned(curve) for curve in curves if curve is not None and curve.x)
    if not drawn:
        return None
    values = [value for curve in drawn for value in curve.y if value > 0]
    # Scores from 0 to 1 are compared on a linear scale, whatever their range.
    wide = kind in LOG_SCALE_FROM_RATIO and direction(metric) != "higher" and bool(values)
    log_y = wide and max(values) > LOG_SCALE_FROM_RATIO[kind] * min(values)
    return Chart(title or heading(metric), x_title, y_title or named(metric), drawn, log_y, kind, metric)


def thinned(curve: Curve) -> Curve:
    """Thin a curve to at most `MOST_POINTS` points, each the mean of those that it stands for."""
    step = -(-len(curve.x) // MOST_POINTS)
    if step <= 1 or curve.stderr is not None:
        return curve
    starts = range(0, len(curve.x), step)
    return Curve(
        curve.name,
        tuple(curve.x[i] for i in starts),
        tuple(sum(part) / len(part) for i in starts if (part := curve.y[i : i + step])),
        curve.dashed,
        group=curve.group,
    )


def described(drawn: Figure, colours: Sequence[str]) -> dict[str, Any]:
    """Return a figure as JSON-able data for the page's script: short names, numbers of few digits."""
    legend = drawn.legend
    return {
        "legend": [[name, colour] for name, colour in zip(legend, colours, strict=True)],
        "panels": [
            _map(panel) if isinstance(panel, HeatMap) else _chart(panel, legend) for panel in drawn.panels
        ],
    }


def _chart(panel: Chart, legend: Sequence[str]) -> dict[str, Any]:
    return {
        "title": panel.title,
        "hint": hint(panel.metric),
        "x": panel.x_title,
        "y": panel.y_title,
        "kind": panel.kind,
        "whole": panel.whole_x,
        "log": panel.log_y,
        "places": [] if panel.kind == "lines" else panel.places,
        "curves": [
            {"n": curve.name, "g": legend.index(curve.legend), "x": curve.x, "y": _all_short(curve.y)}
            | ({"d": 1} if curve.dashed else {})
            | ({"e": _all_short(curve.stderr)} if curve.stderr else {})
            for curve in panel.curves
        ],
    }


def _map(panel: HeatMap) -> dict[str, Any]:
    return {
        "title": panel.title,
        "hint": "",
        "x": panel.x_title,
        "y": panel.y_title,
        "kind": "map",
        "xs": panel.x,
        "ys": panel.y,
        "z": [_all_short(row) for row in panel.values],
        "value": panel.value_title,
        "marked": panel.marked,
        "zero": panel.around_zero,
    }


def _all_short(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else short(value) for value in values]


def short(value: float) -> float | None:
    """Round a number as a page shows it; what is not finite cannot stand in JSON."""
    return None if value - value != 0 else float(f"{value:.{DIGITS}g}")
