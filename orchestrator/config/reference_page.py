"""Reference page of the campaign file: `python -m orchestrator.config.reference_page`."""

import re
import sys
from collections.abc import Iterator
from typing import get_args

from pydantic.fields import FieldInfo

from actors.contracts import Doc
from actors.contracts.settings import section_in
from orchestrator.config import CampaignConfig
from orchestrator.config.section import SECTIONS, fields_of

HEAD = """# Configuration

One YAML file describes a campaign. This page is written from the declarations of the settings
(`python -m orchestrator.config.reference_page > docs/configuration.md`); a test keeps it so.
Unknown keys are refused. Any field can be overridden on the command line:
`--set methods.0.recovery.max_tokens=4096`; lists are counted from 0.

Relative paths of models, texts, templates, tasks and the DeepSpeed file, in the file and in `--set`, are of
the current directory; what is not there is looked for beside the campaign file. They are made absolute once,
when the campaign is planned, and mean the same on every machine of a cluster. A hub id that is also a
directory here means the directory. `storage.path` is of the current directory, and has to be absolute or a
URI in a Ray job.
"""


def reference_page() -> str:
    """Return the whole page as Markdown."""
    return "\n".join([HEAD, *_sections(CampaignConfig, "", {})]).rstrip() + "\n"


def _sections(section: type, path: str, shown: dict[type, str]) -> Iterator[str]:
    """Yield a section and those inside it; a section that stands in several places is described once."""
    shown[section] = path
    title = f"`{path}`" if path else "Top level"
    yield f"## {title}\n\n{' '.join((section.__doc__ or '').split())}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[str, type]] = []
    for name, field in fields_of(section).items():
        nested = section_in(field.annotation, *SECTIONS)
        if nested:
            inner.append((f"{path}.{name}".lstrip("."), nested))
        described = (mark.text for mark in field.metadata if isinstance(mark, Doc))
        meaning = (
            field.description
            or next(described, "")
            or (f"See `{shown.get(nested) or inner[-1][0]}`." if nested else "")
        )
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        written = "" if nested and default and not isinstance(default, str) else f"`{default!r}`"
        if field.is_required():
            written = "required"
        yield f"| `{name}` | {_type_name(field)} | {written} | {meaning} |"
    yield ""
    for inner_path, nested in inner:
        if nested not in shown:
            yield from _sections(nested, inner_path, shown)


def _type_name(field: FieldInfo) -> str:
    annotation = field.annotation
    text = (
        annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    )
    text = re.sub(r"\b(typing|actors\.contracts\.\w+|orchestrator\.config\.\w+)\.", "", text)
    # As a user writes it: the check itself states bounds, and YAML has lists.
    text = re.sub(r"\bAnnotated\[(\w+), [^\]]*\]", r"\1", text)
    text = re.sub(r"\btuple\[(\w+), \.\.\.\]", r"list[\1]", text)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference_page())
