"""What a figure shows, as data; `figures` draws it for the browser or for print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.report.measured import direction

LOG_SCALE_FROM_RATIO = 8.0
MOST_POINTS = 300
"""Longer curves are thinned out by means: more than that is not seen, and makes the page slow."""

Kind = Literal["lines", "bars", "stacked"]


@dataclass(frozen=True)
class Curve:
    """One line of a chart, or one colour of bars; `stderr`, if any, has one value per point."""

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    dashed: bool = False
    stderr: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis. `name` is used for the file, `note` tells how to read it."""

    name: str
    title: str
    note: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]
    log_y: bool = False
    kind: Kind = "lines"


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`, None where there is nothing; `marked` holds (x, y) of crossed cells."""

    name: str
    title: str
    note: str
    x_title: str
    y_title: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    marked: tuple[tuple[int, int], ...] = ()


Figure = Chart | HeatMap


def chart(
    name: str,
    title: str,
    note: str,
    x_title: str,
    y_title: str,
    curves: Sequence[Curve | None],
    kind: Kind = "lines",
) -> Chart | None:
    """A chart of the curves that have points, None if none has; a wide range gets a logarithmic axis."""
    drawn = tuple(thinned(curve) for curve in curves if curve is not None and curve.x)
    if not drawn:
        return None
    values = [value for curve in drawn for value in curve.y if value > 0]
    # Scores from 0 to 1 are compared on a linear scale, whatever their range.
    wide = kind == "lines" and direction(name) != "higher" and bool(values)
    log_y = wide and max(values) > LOG_SCALE_FROM_RATIO * min(values)
    return Chart(name, title, note, x_title, y_title, drawn, log_y, kind)


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points, each the mean of those that it stands for."""
    step = -(-len(curve.x) // MOST_POINTS)
    if step <= 1 or curve.stderr is not None:
        return curve
    starts = range(0, len(curve.x), step)
    return Curve(
        curve.name,
        tuple(curve.x[i] for i in starts),
        tuple(sum(part) / len(part) for i in starts if (part := curve.y[i : i + step])),
        curve.dashed,
    )
