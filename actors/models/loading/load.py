"""Loading and describing source models."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actors.artifacts import file_sha256
from actors.contracts import ModelDtype, ModelInfo, ModelSpec, digest
from actors.errors import RequestError, refusing
from actors.models.families import depth, find_layers, text_config
from actors.models.loading.checkpoint import (
    FLOATING,
    INDEX,
    Checkpoint,
    read_checkpoint,
    read_json,
)
from actors.models.loading.completeness import check_complete, check_layer_count
from actors.models.loading.positions import context_length, position_limit
from actors.models.loading.source import (
    MODEL_FILES,
    check_revision,
    has_weights,
    opening,
    resolve,
    snapshot,
)
from actors.models.loading.tokens import check_has_vocabulary, guard_token_ids
from actors.models.offloading.placement import Place, device_map

DTYPES: dict[ModelDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
AUTO = "auto"
GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
QUANTIZED = ("quantization_config", "compression_config")
"""Config fields by which transformers quantises a model as it loads it."""


Stamp = tuple[tuple[str, int, int, int, int], ...]

NO_LANGUAGE_MODEL = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|MaskedLM)$")
"""Architectures whose weights lack the head of a causal language model."""


def load_model(
    path: str,
    *,
    dtype: ModelDtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in eval mode, on the CPU.

    Args:
        path: hub id, local directory, `*.gguf` file, or `package://PACKAGE/FILE.gguf`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that the model's repository brings; off by default.

    Raises:
        RequestError: the model does not exist, is not readable as one, has only pickled
            weights (safetensors are the only weights ever read), or is quantised.
    """
    return open_model(ModelSpec(path, dtype, revision, trust_remote_code))


def open_model(
    spec: ModelSpec, over: Sequence[Place] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that `spec` names, and its tokenizer, as `load_model` does.

    Args:
        over: devices to load it onto, each weight from its file to its device (see `device_map`); none: the
            CPU.

    Raises:
        MemoryExhaustedError: they cannot hold the weights.
    """
    spec = with_dtype(spec)
    where = device_map(empty_model(spec, load_config(spec), dtype=DTYPES[spec.dtype]), over) if over else None
    directory = model_checkpoint(spec).directory
    tokenizer = load_tokenizer(spec)
    with opening(spec, "its weights"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[spec.dtype],
            device_map=where,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=spec.trust_remote_code,
        )
    if missing := loading["missing_keys"]:
        # transformers draws missing weights at random and continues.
        raise RequestError(
            f"model {spec.path!r}: its safetensors lack {len(missing)} weights, such as {min(missing)!r}; "
            "get the model again"
        )
    guard_token_ids(model, tokenizer)
    return model.eval(), tokenizer


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, without its weights."""
    load_config(spec)  # which transformers reads, too: what is wrong there is not the tokenizer's fault
    directory = snapshot(spec, weights=False)
    remedy = (
        f"Get it again if it is damaged; if the tokenizers {version('tokenizers')} installed here do not "
        "know what is in it, install another version of tokenizers"
    )
    with refusing(
        lambda: f"model {spec.path!r}: {_damaged_tokenizer_file(directory)} cannot be read", remedy
    ):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
        check_has_vocabulary(tokenizer, directory)
    return tokenizer


def _damaged_tokenizer_file(directory: Path) -> str:
    """Return the name of the damaged file: the one that is no JSON, or else tokenizer.json."""
    for name in TOKENIZER_FILES:
        try:
            read_json(directory / name)
        except RequestError:
            if (directory / name).exists():
                return name
    return TOKENIZER_FILES[0]


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Load the model's configuration, without its weights.

    Raises:
        RequestError: as `load_model`; names the field.
    """
    directory = snapshot(spec, weights=False)
    with opening(spec, "its config.json"):
        if (directory / GENERATION_CONFIG).exists():
            read_json(directory / GENERATION_CONFIG)  # transformers passes over one that is damaged
        config = AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
        for field in QUANTIZED:
            if any(getattr(part, field, None) is not None for part in (config, text_config(config))):
                raise RequestError(
                    f"model {spec.path!r} is quantised (config field {field!r}); score, prune and recover "
                    "the unquantised model, and quantise the result"
                )
        if getattr(config, "transformers_weights", None) is not None:
            raise RequestError(
                f"model {spec.path!r}: config field 'transformers_weights' names other weights than those of "
                f"model.safetensors or {INDEX}; rename the files and remove the field"
            )
        for name in config.architectures or ():
            if NO_LANGUAGE_MODEL.search(name):
                raise RequestError(
                    f"model {spec.path!r} is a {name} (config field 'architectures'), which is no causal "
                    "language model"
                )
    return config


def describe_model(spec: ModelSpec) -> ModelInfo:
    """Describe a source model from its configuration, its tokenizer and the headers of its weights.

    Of a hub model whose weights are not on this machine yet, they are not fetched for that.

    Raises:
        RequestError: as `load_model`, or the model is no decoder language model.
    """
    check_revision(spec)
    spec = with_dtype(spec)
    directory = snapshot(spec, weights=False)
    if has_weights(spec, directory):
        model_checkpoint(spec)
    load_tokenizer(spec)
    config = load_config(spec)
    model = empty_model(spec, config)
    contents = _contents(spec)
    commit = None if Path(resolve(spec)).is_dir() else directory.name
    with opening(spec, "its config.json"):
        blocks = find_layers(model).modules
        decoder = text_config(config)
        hidden_size, heads = _number(decoder, "hidden_size"), _number(decoder, "num_attention_heads") or 1
        return ModelInfo(
            spec=replace(spec, contents=digest(contents), commit=commit),
            model_type=config.model_type,
            num_layers=depth(config),
            num_parameters=model.num_parameters(),
            vocab_size=decoder.vocab_size,
            fingerprint=digest([*contents, spec.dtype]),
            block_parameters=tuple(sum(weight.numel() for weight in block.parameters()) for block in blocks),
            hidden_size=hidden_size,
            attention_width=heads * (_number(decoder, "head_dim") or hidden_size // heads),
            num_heads=heads,
            block_widths=sum(sum(w.shape) for w in blocks.parameters() if w.dim() == 2) // len(blocks),
            context_length=context_length(model),
            position_limit=position_limit(model),
        )


def _number(config: PretrainedConfig, name: str) -> int:
    """Return a field of the config; 0 where the family has none or one for each layer."""
    # Not by getattr, which fails where the layers differ.
    value = config.to_dict().get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else 0


def model_checkpoint(spec: ModelSpec) -> Checkpoint:
    """Return the headers of the model's weights, once they are checked against its config.json.

    Raises:
        RequestError: as `read_checkpoint` and `check_complete`, or the files are no longer
            those of `spec.contents`.
    """
    directory = snapshot(spec)
    if spec.contents is not None and digest(_contents(spec)) != spec.contents:
        raise RequestError(
            f"model {spec.path!r} was changed after this run had read it: its files are not those that the "
            "run's results are of; put them back and continue with --resume, or start another run"
        )
    return _checked_checkpoint(spec, directory, _stamp(spec, directory))


def _stamp(spec: ModelSpec, directory: Path) -> Stamp:
    """Return names, sizes and times of the model's files, which change when the model does."""
    with opening(spec, "its files"):
        files = [file for file in directory.iterdir() if file.suffix in MODEL_FILES and file.is_file()]
        states = [(file.name, file.stat()) for file in sorted(files)]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states)


@lru_cache(maxsize=16)
def _checked_checkpoint(spec: ModelSpec, directory: Path, _stamp: Stamp) -> Checkpoint:
    """Read and check headers, once for as long as no file changes."""
    config = load_config(spec)
    with opening(spec, "its weights"):
        checkpoint = read_checkpoint(directory)
        check_layer_count(checkpoint, config)
        check_complete(checkpoint, empty_model(spec, config))
    return checkpoint


def empty_model(spec: ModelSpec, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build the model without weights: modules, computed buffers, and parameters on the meta device.

    Args:
        options: of transformers' `from_config`, such as `dtype`.
    """
    with opening(spec, "its config.json"):
        try:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=spec.trust_remote_code, **options
                )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise RequestError(
                f"model {spec.path!r} ({config.model_type}) is no causal language model"
            ) from error
        # Each parameter was moved by itself, so that tied ones are no longer one.
        model.tie_weights()
    return model


def check_dtype(spec: ModelSpec) -> None:
    """Refuse a type of weights that is neither in `DTYPES` nor `auto`."""
    if spec.dtype not in (*DTYPES, AUTO):
        known = ", ".join((*DTYPES, AUTO))
        raise RequestError(f"model {spec.path!r}: unknown dtype {spec.dtype!r}; known: {known}")


def with_dtype(spec: ModelSpec) -> ModelSpec:
    """Return `spec` with the checkpoint's type of weights in the place of `auto`.

    That is the type in its config.json or, without one, of its largest tensors; float32 if it is none of
    `DTYPES`, or not known because the weights are not on this machine.
    """
    check_dtype(spec)
    if spec.dtype != AUTO:
        return spec
    config = load_config(spec)
    named = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None)
    if named is None and has_weights(spec, directory := snapshot(spec, weights=False)):
        with opening(spec, "its weights"):
            stored = list(read_checkpoint(directory).tensors.values())
        largest = max(stored, key=lambda tensor: tensor.end - tensor.start, default=None)
        named = largest and FLOATING.get(largest.dtype)
    found: ModelDtype = next((name for name, dtype in DTYPES.items() if named in (dtype, name)), "float32")
    return replace(spec, dtype=found)


def _contents(spec: ModelSpec) -> list[Any]:
    """Return the hashes of weights, configuration and tokenizer files, or a hub model's commit."""
    directory = snapshot(spec, weights=False)
    if not Path(resolve(spec)).is_dir():
        return ["hub", spec.path, directory.name]
    return ["files", _hashes(spec, directory, _stamp(spec, directory))]


@lru_cache(maxsize=16)
def _hashes(spec: ModelSpec, directory: Path, stamp: Stamp) -> list[tuple[str, str]]:
    """Hash the model's files, once for as long as none changes."""
    with opening(spec, "its files"):
        return [(name, file_sha256(directory / name)) for name, *_ in stamp]
