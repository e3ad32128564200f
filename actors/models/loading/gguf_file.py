"""GGUF files, converted once a machine to the safetensors directory that everything else reads."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from actors.artifacts import cache_entry, file_sha256
from actors.errors import RequestError, refusing


def converted(gguf: Path) -> Path:
    """Return the directory with the GGUF file's weights as float32 safetensors.

    Raises:
        RequestError: no such file, one that transformers does not read, or no cache to keep the weights in.
    """
    if not gguf.is_file():
        raise RequestError(f"GGUF file {str(gguf)!r} does not exist")
    target = cache_entry("gguf", file_sha256(gguf))
    if target.is_dir():
        return target
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with refusing(
            f"model {str(gguf)!r} cannot be opened as a causal language model",
            "Get the file again, or give the model as a directory of safetensors",
        ):
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
        drop_quantization(model.config)
        model.hf_quantizer = None
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
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


def drop_quantization(config: PretrainedConfig) -> None:
    """Delete the quantisation of the GGUF file from `config`: transformers refuses to save it otherwise."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
