"""How the page's template shows cells, names of metrics and figures."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.reporting.data.measured import Number
from orchestrator.reporting.data.provenance import Stage
from orchestrator.reporting.tables.metric_names import heading, hint
from orchestrator.reporting.tables.summary import format_count
from orchestrator.reporting.tables.tables import show, show_error


def environment(stages: Mapping[str, Stage]) -> Environment:
    """Return the environment of the report's template; numbers lead to the stages that measured them."""
    made = Environment(
        loader=PackageLoader("orchestrator.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def cell(value: Any, column: str = "") -> str | Markup:
        if column == "parameters" and value is not None:
            return Markup('<span title="{:,}">{}</span>').format(value, format_count(value))
        if not isinstance(value, Number):
            return show(value)
        text, stage = show(value.value), stages.get(value.key)
        error = "" if value.stderr is None else Markup(" <small>±{}</small>").format(show_error(value.stderr))
        if stage is None:
            return Markup("{}{}").format(text, error)
        shown = Markup('<a href="#{}" title="{}">{}</a>').format(stage.anchor, stage.hint, text)
        return shown + error

    made.filters["cell"] = cell
    made.filters["title"] = title
    made.filters["heading"] = heading
    made.filters["file_name"] = file_name
    made.filters["enumerated"] = enumerate
    made.filters["height"] = _height
    made.filters["json"] = lambda value: Markup(
        json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    )
    return made


def title(metric: str) -> Markup:
    """Return a metric's name in words, with its raw name and meaning where one points at it."""
    name, explained = heading(metric), hint(metric)
    return Markup('<abbr title="{}">{}</abbr>').format(explained, name) if explained else Markup.escape(name)


def file_name(name: str) -> str:
    """Return `name` with nothing in it that a path could trip over."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _height(panel: Mapping[str, Any], panels: int) -> int:
    """Return a panel's height in pixels: a heat map's rows stay legible."""
    rows = len(panel.get("ys", ()))
    return max(240 if panels > 1 else 340, min(18 * rows + 90, 900))
