"""Reference page of the campaign file: `python -m orchestrator.config.reference`."""

import re
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from orchestrator.config import CampaignConfig, Section

HEAD = """# Configuration

One YAML file describes a campaign. This page is written from the config models
(`python -m orchestrator.config.reference > docs/configuration.md`); a test keeps it so.
Unknown keys are refused. Any field can be overridden on the command line:
`--set methods.0.recovery.max_tokens=4096`; lists are counted from 0.

Relative paths of models, texts, templates, tasks and the DeepSpeed file, in the file and in `--set`, are of
the current directory; what is not there is looked for beside the campaign file. They are made absolute once,
when the campaign is planned, and mean the same on every machine of a cluster. A hub id that is also a
directory here means the directory. `storage.path` is of the current directory, and has to be absolute or a
URI in a Ray job.
"""


def reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_sections(CampaignConfig, "", {})]).rstrip() + "\n"


def _sections(section: type[Section], path: str, shown: dict[type[Section], str]) -> Iterator[str]:
    """A section and those inside it; a section that stands in several places is described once."""
    shown[section] = path
    title = f"`{path}`" if path else "Top level"
    yield f"## {title}\n\n{' '.join((section.__doc__ or '').split())}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[str, type[Section]]] = []
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        if nested:
            inner.append((f"{path}.{name}".lstrip("."), nested))
        meaning = field.description or (f"See `{shown.get(nested) or inner[-1][0]}`." if nested else "")
        yield f"| `{name}` | {_type_name(field)} | {_default(field, nested)} | {meaning} |"
    yield ""
    for inner_path, nested in inner:
        if nested not in shown:
            yield from _sections(nested, inner_path, shown)


def _nested(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as `list[ModelConfig]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part))), None)


def _type_name(field: FieldInfo) -> str:
    annotation = field.annotation
    text = (
        annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    )
    return re.sub(r"\b(typing|orchestrator\.config\.\w+)\.", "", text).replace("|", "\\|")


def _default(field: FieldInfo, nested: type[Section] | None) -> str:
    if field.is_required():
        return "required"
    return "" if nested and field.default else f"`{field.default!r}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
