"""Writing a model as an ordinary Hugging Face directory."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.artifacts import publish
from actors.contracts import ExportResult, ExportSpec
from actors.models.chain import materialize
from actors.models.families import depth
from actors.models.load import drop_quantization


def save_pretrained(
    model: PreTrainedModel, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save config, safetensors, generation config and tokenizer to `directory`."""
    drop_quantization(model.config)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def export_model(spec: ExportSpec, uri: str) -> ExportResult:
    """Publish the model that `spec` describes, with its card and `iterabre.json`, at `uri`."""
    model, tokenizer = materialize(spec.model)
    with tempfile.TemporaryDirectory(prefix="iterabre-export-") as scratch:
        directory = Path(scratch)
        save_pretrained(model, directory, tokenizer=tokenizer)
        (directory / "README.md").write_text(spec.card, encoding="utf-8")
        (directory / "iterabre.json").write_text(spec.provenance, encoding="utf-8")
        artifact = publish(directory, uri)
    return ExportResult(artifact, depth(model.config), model.num_parameters())
