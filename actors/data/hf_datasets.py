"""Data sets that `datasets` loads: of the hub, of a directory of files, or saved by `save_to_disk`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import (
    Dataset,
    DatasetBuilder,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.utils import logging

from actors.artifacts import file_sha256
from actors.contracts import TextSpec, digest
from actors.data.files import READERS, one_line_reason, read_rows, suffix_of
from actors.errors import IterabreError, RequestError

SAVED_SPLITS, SAVED_STATE = "dataset_dict.json", "state.json"
"""Files that `DatasetDict.save_to_disk` and `Dataset.save_to_disk` leave."""

COMMIT = re.compile(r"[0-9a-f]{40}")

METADATA = ("dataset_info.json", "dataset_infos.json", SAVED_SPLITS, SAVED_STATE)


def open_dataset(spec: TextSpec) -> tuple[Dataset, str]:
    """Return the whole split, mapped from disk, and its fingerprint.

    Raises:
        RequestError: it cannot be loaded; names the reason, and the file of a directory that is at fault.
    """
    with dataset_errors(spec):
        if _saved_to_disk(spec):
            return _load_saved(spec), _saved_fingerprint(spec)
        dataset = load_dataset(_dataset_path(spec), spec.config, split=spec.split, revision=_revision(spec))
        return dataset, dataset._fingerprint


def stream_dataset(spec: TextSpec) -> IterableDataset:
    """Return the split, read as its records are taken. Raises RequestError as `open_dataset`."""
    with dataset_errors(spec):
        if _saved_to_disk(spec):
            saved = _load_saved(spec)
            shards = min(len(saved.cache_files), len(saved))
            return saved.to_iterable_dataset(num_shards=max(1, shards))
        return load_dataset(
            _dataset_path(spec), spec.config, split=spec.split, revision=_revision(spec), streaming=True
        )


def dataset_fingerprint(spec: TextSpec) -> str:
    """Return the fingerprint that `open_dataset` returns, without reading the split."""
    with dataset_errors(spec):
        if _saved_to_disk(spec):
            return _saved_fingerprint(spec)
        return _builder(spec)._get_dataset_fingerprint(spec.split)


def dataset_commit(spec: TextSpec) -> str | None:
    """Return the commit of the hub that the data set is of; None for a directory.

    Out of reach of the hub, it is that of what lies in the cache.
    """
    if Path(_dataset_path(spec)).is_dir():
        return None
    with dataset_errors(spec):
        found = _builder(spec).hash
    return found if found is not None and COMMIT.fullmatch(found) else None


@contextmanager
def dataset_errors(spec: TextSpec) -> Iterator[None]:
    """Turn what `datasets` raises while it loads or reads into one RequestError that names the remedy."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it logs of an error is in its exception
    try:
        yield
    except (IterabreError, MemoryError):
        raise
    except Exception as error:
        where = f"config {spec.config!r}, split {spec.split!r}"
        wraps = type(error).__name__.startswith("DatasetGeneration") and error.__cause__
        reason = one_line_reason(wraps or error).rstrip(".")
        raise RequestError(
            f"cannot load the data set {spec.path!r} ({where}): {reason}. {_remedy(spec, reason)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _remedy(spec: TextSpec, message: str) -> str:
    """Return the remedy for a data set that cannot be loaded: for a directory, what is wrong in it."""
    directory = Path(_dataset_path(spec))
    if not directory.is_dir():
        return (
            "If a local file was meant, it does not exist here; give its path with a known ending "
            f"({', '.join(READERS)})"
        )
    if "split" in message:
        return "Name a split that it has"
    files = [f for f in sorted(directory.rglob("*")) if suffix_of(f.name) in READERS and f.is_file()]
    files = [file for file in files if file.name not in METADATA]
    if (directory / SAVED_STATE).is_file() or (directory / SAVED_SPLITS).is_file():
        return "Files of it are missing or damaged; write it again with save_to_disk"
    scripts = sorted(file.name for file in directory.glob("*.py"))
    if scripts and ("script" in message or not files):
        return f"Scripts that load data ({', '.join(scripts)}) are not run; leave only files of data there"
    columns: dict[Path, list[str]] = {}
    for file in files:
        try:
            columns[file] = sorted({name for _, record in read_rows(str(file)) for name in record})
        except RequestError as error:
            return f"{str(error)[0].upper()}{str(error)[1:]}"
    if len(set(map(tuple, columns.values()))) > 1:
        each = "; ".join(f"{file.name}: {', '.join(names)}" for file, names in columns.items())
        return f"All files of a split need the same columns. Theirs are {each[:500]}"
    return f"Of the files that it may hold ({', '.join(READERS)}), it has {len(files)}"


def _dataset_path(spec: TextSpec) -> str:
    directory = Path(spec.path or "").expanduser()
    return str(directory) if directory.is_dir() else str(spec.path)


def _builder(spec: TextSpec) -> DatasetBuilder:
    return load_dataset_builder(_dataset_path(spec), spec.config, revision=_revision(spec))


def _revision(spec: TextSpec) -> str | None:
    return spec.commit or spec.revision


def _saved_to_disk(spec: TextSpec) -> bool:
    """Return whether only `load_from_disk` reads the split as it was saved.

    `load_dataset` reads a saved `DatasetDict`, too, but guesses its splits from the
    names of directories, and makes one split of all names without a meaning.
    """
    directory = Path(_dataset_path(spec))
    if (directory / SAVED_STATE).is_file():
        return True
    if not (directory / SAVED_SPLITS).is_file():
        return False
    guessed = {str(split): files for split, files in (_builder(spec).config.data_files or {}).items()}
    asked = re.sub(r"\[.*?\]", "", spec.split).split("+")
    right = all(Path(file).parent.name == split for split, files in guessed.items() for file in files)
    return not right or not set(asked) <= set(guessed)


def _load_saved(spec: TextSpec) -> Dataset:
    loaded = load_from_disk(_dataset_path(spec))
    splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, Dataset) else dict(loaded)
    sizes = {name: len(split) for name, split in splits.items()}
    parts = ReadInstruction.from_spec(spec.split).to_absolute(sizes)
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]


def _saved_fingerprint(spec: TextSpec) -> str:
    directory = Path(_dataset_path(spec))
    files = sorted(file for file in directory.rglob("*") if file.suffix in (".arrow", ".json"))
    return digest(["saved", [[file.relative_to(directory).as_posix(), file_sha256(file)] for file in files]])
