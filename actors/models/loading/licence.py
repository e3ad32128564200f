"""Licence and origin of a source model."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, RepoCard, hf_hub_download

from actors.contracts import ModelSpec, Origin
from actors.errors import RequestError
from actors.models.loading.gguf_file import converted
from actors.models.loading.source import source_path

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that go with a model wherever it goes."""

TITLES = {
    "Apache License": "apache-2.0",
    "MIT License": "mit",
    "LLAMA 2 COMMUNITY": "llama2",
    "LLAMA 3.1 COMMUNITY": "llama3.1",
    "LLAMA 3.2 COMMUNITY": "llama3.2",
}
"""Titles at the head of a licence, and the hub's names for them."""

HEAD = 400
"""Characters of a licence's text that its title is looked for in."""


def origin(spec: ModelSpec) -> Origin:
    """Return the source's own statement: in its README.md, its licence file, or its GGUF metadata.

    A hub model's README.md is read from the hub or, where that is out of reach, from the cache.
    """
    try:
        source = source_path(spec)
    except RequestError:  # the package or file was removed since the model was read
        return Origin()
    if source.suffix == ".gguf":
        source = converted(source)
    if source.is_dir():
        return _of_directory(source)
    try:
        readme = Path(hf_hub_download(spec.path, "README.md", revision=spec.commit or spec.revision))
    except (OSError, ValueError):  # no such file, no way to the hub, or no name that a hub could have
        return Origin(base_model=spec.path)
    return _of_readme(readme, base_model=spec.path)


def licence_files(spec: ModelSpec) -> list[Path]:
    """Return the licence texts of a model directory; what lies beside a single file may be another's."""
    source = source_path(spec)
    if not source.is_dir():
        return []
    return sorted(file for pattern in LICENCE_FILES for file in source.glob(pattern) if file.is_file())


def _of_directory(directory: Path) -> Origin:
    readme = directory / "README.md"
    found = _of_readme(readme) if readme.is_file() else Origin()
    if found.licence is not None:
        return found
    texts = sorted(file for pattern in LICENCE_FILES[:2] for file in directory.glob(pattern))
    if not texts:
        return found
    head = texts[0].read_text(encoding="utf-8", errors="replace")[:HEAD]
    known = next((name for title, name in TITLES.items() if title.lower() in head.lower()), None)
    if known is None:
        return Origin(found.base_model, "other", texts[0].stem.lower(), texts[0].name)
    return Origin(found.base_model, known)


def _of_readme(readme: Path, base_model: str | None = None) -> Origin:
    try:
        data: ModelCardData = RepoCard.load(readme, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # its front matter is no mapping, or no YAML
        return Origin(base_model)
    said: dict[str, Any] = data.to_dict()
    parent = base_model or said.get("base_model")
    return Origin(
        parent if isinstance(parent, str) else None,
        said.get("license"),
        said.get("license_name"),
        said.get("license_link"),
    )
