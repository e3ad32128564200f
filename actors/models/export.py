"""Writing a model as an ordinary Hugging Face directory."""

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.artifacts import publish
from actors.contracts import ExportResult, ExportSpec, ModelRef
from actors.models.chain import emptied_layers, materialize
from actors.models.families import depth, find_layers
from actors.models.gguf_file import drop_quantization
from actors.models.licence import licence_files
from actors.models.subblocks import SUB_BLOCKS, sub_block_weights


def save_pretrained(
    model: PreTrainedModel, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save config, safetensors, generation config and tokenizer to `directory`."""
    drop_quantization(model.config)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def export_model(spec: ExportSpec, uri: str) -> ExportResult:
    """Publish the model that `spec` describes, with its card, licence and `iterabre.json`, at `uri`."""
    model, tokenizer = materialize(spec.model)
    with tempfile.TemporaryDirectory(prefix="iterabre-export-") as scratch:
        directory = Path(scratch)
        save_pretrained(model, directory, tokenizer=tokenizer)
        for file in licence_files(spec.model.source):
            shutil.copy(file, directory)
        (directory / "README.md").write_text(spec.card, encoding="utf-8")
        (directory / "iterabre.json").write_text(spec.provenance, encoding="utf-8")
        artifact = publish(directory, uri)
    num_layers = depth(model.config)
    return ExportResult(artifact, num_layers, model.num_parameters(), _num_emptied(spec.model, model))


def _num_emptied(ref: ModelRef, model: PreTrainedModel) -> int:
    """Parameters of the emptied sub-blocks."""
    blocks = find_layers(model).modules
    kept = ref.kept(len(blocks) + len(ref.dropped))
    emptied = (
        sub_block_weights(blocks[layer], kind).values()
        for kind in SUB_BLOCKS
        for layer in emptied_layers(ref, kind, kept)
    )
    return sum(parameter.numel() for weights in emptied for parameter in weights)
