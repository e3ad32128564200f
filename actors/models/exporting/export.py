"""Writing a model as an ordinary Hugging Face directory."""

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actors.artifacts import publish
from actors.contracts import ExportResult, ExportSpec
from actors.models.exporting.exported_config import (
    Json,
    decoder_part,
    exported_config,
    shifted_fields,
)
from actors.models.families import depth, text_config
from actors.models.loading.gguf_file import drop_quantization
from actors.models.loading.licence import licence_files
from actors.models.loading.source_files import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    SourceFiles,
    add_older_tokenizer_fields,
    copy_source_files,
    drop_code,
    source_files,
    write_json,
)
from actors.models.model_builder import build_model
from actors.models.pruning.surgery import pruned_config

log = logging.getLogger(__name__)

SHIFTED = (
    "the kinds of the layers ({fields} in config.json) no longer follow the rule by which the family "
    "({family}) computes them from a layer's index. transformers and vLLM read them from config.json; "
    "runtimes that compute them, such as llama.cpp, compute other ones"
)
"""Note on a removal that moves layers of one kind to places of another."""


def save_pretrained(
    model: PreTrainedModel, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save config, safetensors, generation config and tokenizer to `directory`.

    Where the files that the model was read from are still there, they are kept as they are, but for the
    fields of config.json that a removal changes.
    """
    directory = Path(directory)
    source = _files_of(model)
    if source is not None and directory.exists() and directory.samefile(source.directory):
        source = None
    save_weights_of(model, directory)
    write_config(model, directory, source, dtype=model.dtype, architecture=type(model).__name__)
    _write_generation_config(model, directory, source)
    if tokenizer is None:
        return
    if source is not None and _same_tokenizer(tokenizer, source):
        copy_source_files(source, directory)
        _write_generation_config(model, directory, source)
    else:
        tokenizer.save_pretrained(directory)
        add_older_tokenizer_fields(directory / TOKENIZER_CONFIG)


def export_model(spec: ExportSpec, uri: str) -> ExportResult:
    """Publish the model that `spec` describes, with its licence, at `uri`."""
    model, _ = build_model(spec.model)
    source = source_files(spec.model.source)
    with tempfile.TemporaryDirectory(prefix="iterabre-export-") as scratch:
        directory = Path(scratch)
        note = save_with_files(model, directory, source, spec.model.kept(depth(source.config)))
        for file in licence_files(spec.model.source):
            shutil.copy(file, directory)
        artifact = publish(directory, uri)
    return ExportResult(artifact, depth(model.config), model.num_parameters(), note)


def save_with_files(
    model: PreTrainedModel, directory: Path, source: SourceFiles, kept: Sequence[int]
) -> str | None:
    """Save a model of the layers `kept` of its source with the source's files; return as `write_config`."""
    save_weights_of(model, directory)
    copy_source_files(source, directory)
    return write_config(
        model, directory, source, kept=kept, dtype=model.dtype, architecture=type(model).__name__
    )


def save_weights_of(model: PreTrainedModel, directory: Path) -> None:
    """Save the safetensors, in shards if they are large, and a config.json that is still to be replaced."""
    drop_quantization(model.config)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # transformers refuses to save some that it reads: sampling settings without sampling.
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory)
    finally:
        if generation is not None:
            model.generation_config = generation
    (directory / GENERATION_CONFIG).unlink(missing_ok=True)


def write_config(
    model: PreTrainedModel,
    directory: Path,
    source: SourceFiles | None,
    *,
    kept: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
) -> str | None:
    """Write config.json: the source's, changed where the model differs, or the model's own without a source.

    Args:
        kept: the source's layers that the model has; found from the two configurations if not given.
        dtype: of the floating-point weights; as the source says if not given.
        architecture: the class that wrote the weights, if they are not the source's own tensors.

    Returns:
        A note for users of runtimes that compute the layers' kinds by themselves, None if there is none.
    """
    fields, before, after = _descriptions(model, source, kept)
    exported = exported_config(fields, before, after, kept)
    for name in ("quantization_config", "transformers_weights"):
        exported.pop(name, None)
    if not (_is_custom(model) if source is None else source.with_code):
        drop_code(exported)
    if dtype is not None:
        _set_dtype(exported, str(dtype).removeprefix("torch."))
    if architecture is not None and architecture not in (exported.get("architectures") or ()):
        exported["architectures"] = [architecture]
    if source is not None and exported == source.config_json():
        (directory / CONFIG).write_bytes((source.directory / CONFIG).read_bytes())
    else:
        write_json(directory / CONFIG, exported)
    shifted = shifted_fields(fields, exported, before, after)
    if not shifted:
        return None
    note = SHIFTED.format(fields=", ".join(shifted), family=after.model_type)
    log.warning("%s: %s", directory, note)
    return note


def _descriptions(
    model: PreTrainedModel, source: SourceFiles | None, kept: Sequence[int] | None
) -> tuple[Json, PretrainedConfig, PretrainedConfig]:
    """Return config.json as written, how transformers reads it, and the exported model's configuration."""
    if source is not None:
        fields, before = source.config_json(), source.config
        if type(before) is not type(model.config):
            # Of a model of text and images only the decoder was read.
            fields = {"model_type": model.config.model_type} | decoder_part(fields, before)
            before = text_config(before)
        if type(before) is type(model.config):
            return fields, before, model.config if kept is None else pruned_config(before, kept)
    return json.loads(model.config.to_json_string()), model.config, model.config


def _set_dtype(fields: Json, dtype: str) -> None:
    """Name the weights' type wherever the file names one; float32 is what readers take for granted."""
    named = [name for name in ("dtype", "torch_dtype") if name in fields]
    if not named and dtype != "float32":
        named = ["torch_dtype"]
    fields |= dict.fromkeys(named, dtype)
    for part in fields.values():
        if isinstance(part, dict) and "model_type" in part and {"dtype", "torch_dtype"} & part.keys():
            _set_dtype(part, dtype)


def _files_of(model: PreTrainedModel) -> SourceFiles | None:
    """Return the files that `model` was read from, None if they are not on this machine."""
    if not (name := model.name_or_path):
        return None
    with_code = _is_custom(model)
    try:
        directory = Path(name if Path(name).is_dir() else snapshot_download(name, local_files_only=True))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=with_code)
    except (OSError, ValueError):
        return None
    return SourceFiles(directory, config, with_code)


def _is_custom(model: PreTrainedModel) -> bool:
    """Return true if the model's class comes from code that its repository brought."""
    return type(model).__module__.startswith("transformers_modules.")


def _write_generation_config(model: PreTrainedModel, directory: Path, source: SourceFiles | None) -> None:
    """Write the model's generation config: the source's file if it still says the same."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    target = directory / GENERATION_CONFIG
    written = source.directory / GENERATION_CONFIG if source is not None else None
    if written is not None and written.is_file():
        same = GenerationConfig.from_pretrained(written.parent)
    else:
        same = GenerationConfig.from_model_config(source.config) if source is not None else None
    if same is None or _settings(generation) != _settings(same):
        generation.to_json_file(target)
    elif written is not None and written.is_file():
        target.write_bytes(written.read_bytes())


def _settings(generation: GenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in generation.to_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }


def _same_tokenizer(tokenizer: PreTrainedTokenizerBase, source: SourceFiles) -> bool:
    """Return true if the tokenizer still is as the source's files have it."""
    try:
        written = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.with_code)
    except (OSError, ValueError):
        return False
    return all(
        getattr(tokenizer, name, None) == getattr(written, name, None)
        for name in ("special_tokens_map", "chat_template", "added_tokens_decoder", "model_max_length")
    ) and _vocabulary(tokenizer) == _vocabulary(written)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return all by which a tokenizer splits text; its last padding is no part of it."""
    if not tokenizer.is_fast:
        return tokenizer.get_vocab()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in described.items() if name not in ("padding", "truncation")}
