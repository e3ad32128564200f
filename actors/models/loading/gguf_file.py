"""GGUF files, converted once a machine to the safetensors directory that everything else reads."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import gguf as gguf_package
import torch
from gguf import GGUFReader, get_tensor_name_map
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from actors.artifacts import cache_entry, file_sha256
from actors.errors import RequestError, refusing

HUB = "https://huggingface.co/"


def converted(gguf: Path) -> Path:
    """Return the directory with the GGUF file's weights as float32 safetensors.

    Its README.md has what the file says of its licence and of the model that it was made from.

    Raises:
        RequestError: no such file, one that transformers does not read, or no cache to keep the weights in.
    """
    if not gguf.is_file():
        raise RequestError(f"GGUF file {str(gguf)!r} does not exist")
    target = cache_entry("gguf-model", file_sha256(gguf))
    if target.is_dir():
        return target
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with (
            refusing(
                f"model {str(gguf)!r} cannot be opened as a causal language model",
                "Get the file again, or give the model as a directory of safetensors",
            ),
            _read_once() as reader,
        ):
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            card = _card(reader(str(gguf)))
        drop_quantization(model.config)
        model.hf_quantizer = None
        model.save_pretrained(scratch)
        # Whether the machine was offline is no part of the model, whose files' hashes are in stage keys.
        tokenizer.init_kwargs.pop("local_files_only", None)
        tokenizer.save_pretrained(scratch)
        card.save(scratch / "README.md")
        os.rename(scratch, target)
    except OSError as error:
        # Another process may have converted the same file meanwhile: its directory is as good.
        if not target.is_dir():
            raise RequestError(
                f"model {str(gguf)!r} cannot be converted to {str(target.parent)!r}: {error.strerror}; "
                "make room there, or set ITERABRE_CACHE to another directory"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _read_once() -> Iterator[Callable[[str], GGUFReader]]:
    """Have transformers parse each file once in the body, where it does so for every part; yield the reader.

    Parsing is slow: it makes an array of every token of the vocabulary. So is the table of tensors' names,
    which transformers makes anew for every module.
    """
    reader = cache(GGUFReader)
    kept = {GGUFReader.__name__: reader, get_tensor_name_map.__name__: cache(get_tensor_name_map)}
    with ExitStack() as changed:
        for name, function in kept.items():
            # transformers imports them anew in each of its functions.
            changed.callback(setattr, gguf_package, name, getattr(gguf_package, name))
            setattr(gguf_package, name, function)
        yield reader


def _card(file: GGUFReader) -> ModelCard:
    """Return a model card with what the metadata say of licence and origin."""

    def value(name: str) -> str | None:
        return str(file.fields[name].contents()) if name in file.fields else None

    url = value("general.base_model.0.repo_url") or value("general.source.huggingface.repository") or ""
    data = ModelCardData(
        base_model=url.removeprefix(HUB) or None,
        license=value("general.license"),
        license_name=value("general.license.name"),
        license_link=value("general.license.link"),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n")


def drop_quantization(config: PretrainedConfig) -> None:
    """Delete the quantisation of the GGUF file from `config`: transformers refuses to save it otherwise."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
