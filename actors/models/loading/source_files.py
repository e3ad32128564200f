"""The files of a source that an export keeps: tokenizer, chat templates, generation config, code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

from actors.contracts import ModelSpec
from actors.errors import RequestError
from actors.models.exporting.exported_config import Json
from actors.models.loading.load import GENERATION_CONFIG, load_config
from actors.models.loading.source import resolve

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

KEPT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.bpe",
    "bpe.codes",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    GENERATION_CONFIG,
)
"""Files that an export takes as they are."""

BACKENDS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Tokenizer classes that only transformers 5 has, and what earlier versions call the same."""

OF_BACKENDS = ("backend", "is_local", "local_files_only")
"""Fields of tokenizer_config.json that transformers 5 writes of how it came by the tokenizer."""


@dataclass(frozen=True)
class SourceFiles:
    """The directory that a model was read from, its configuration, and if the code in it may run."""

    directory: Path
    config: PretrainedConfig
    with_code: bool = False

    def config_json(self) -> Json:
        return json.loads((self.directory / CONFIG).read_text(encoding="utf-8"))

    def code(self) -> list[Path]:
        """Return the Python files that go along: those of the repository's own classes, if they may run."""
        described = [_json(self.directory / name) for name in (CONFIG, TOKENIZER_CONFIG)]
        if not self.with_code or not any(_has_code(fields) for fields in described):
            return []
        files = sorted(self.directory.glob("*.py"))
        imported = [Path(name) for file in files for name in get_relative_import_files(file)]
        return list(dict.fromkeys([*files, *(file for file in imported if file.is_file())]))


def source_files(spec: ModelSpec) -> SourceFiles:
    """Return the files beside the weights of `spec`; those of a hub model are downloaded.

    Raises:
        RequestError: the model cannot be opened, or its files are out of reach.
    """
    config, path = load_config(spec), resolve(spec)
    if Path(path).is_dir():
        return SourceFiles(Path(path), config, spec.trust_remote_code)
    revision = getattr(config, "_commit_hash", None) or spec.commit or spec.revision
    try:
        directory = snapshot_download(path, revision=revision, allow_patterns=[CONFIG, *KEPT_FILES, "*.py"])
    except (OSError, ValueError) as error:
        raise RequestError(
            f"model {spec.path!r}: its tokenizer and configuration are out of reach: {error}"
        ) from error
    return SourceFiles(Path(directory), config, spec.trust_remote_code)


def copy_source_files(source: SourceFiles, output: Path, *, tokenizer: bool = True) -> None:
    """Copy tokenizer, chat templates, generation config and code as they are.

    A configuration is changed only where it names code that does not go along, and that of the tokenizer
    where transformers 4 could not open it.

    Args:
        tokenizer: without it, only generation config and code are copied.
    """
    patterns = KEPT_FILES if tokenizer else (GENERATION_CONFIG,)
    named = [file for pattern in patterns for file in source.directory.glob(pattern) if file.is_file()]
    for file in dict.fromkeys([*named, *source.code()]):
        target = output / file.relative_to(source.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(file)):
            target.write_bytes(file.read_bytes())
        if file.name.endswith("_config.json") and not source.with_code and _has_code(fields := _json(target)):
            drop_code(fields)
            write_json(target, fields)
    if tokenizer:
        add_older_tokenizer_fields(output / TOKENIZER_CONFIG)


def add_older_tokenizer_fields(file: Path) -> None:
    """Write a tokenizer_config.json of transformers 5 so that transformers 4 opens it, too."""
    written = _json(file)
    fields = dict(written)
    if (name := fields.get("tokenizer_class")) in BACKENDS:
        fields["tokenizer_class"] = BACKENDS[name]
        fields = {key: value for key, value in fields.items() if key not in OF_BACKENDS}
    if isinstance(fields.get("extra_special_tokens"), list):
        # Earlier versions have a mapping under this name, and another name for the list.
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    if isinstance(fields.get("model_specific_special_tokens"), dict):
        fields["extra_special_tokens"] = fields.pop("model_specific_special_tokens")
    if fields != written:
        write_json(file, fields)


def write_json(file: Path, fields: Json) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def drop_code(fields: Json) -> None:
    """Remove from a configuration where the code of its classes is: it does not go along."""
    fields.pop("auto_map", None)
    for part in fields.values():
        if isinstance(part, dict):
            drop_code(part)


def _json(file: Path) -> Json:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _has_code(fields: Any) -> bool:
    return isinstance(fields, dict) and ("auto_map" in fields or any(map(_has_code, fields.values())))
