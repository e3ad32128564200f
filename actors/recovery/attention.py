"""Reading attention matrices while single blocks run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from actors.errors import RequestError
from actors.models import find_layers

REMEDY = "set the weight of the loss term 'attention' to 0 (recovery.loss.attention)"


class AttentionTap:
    """Catches the attention matrix of one block at a time.

    Fused kernels never form the matrix, so the model is switched to eager attention.

    Args:
        model: a decoder language model of N blocks.

    Raises:
        RequestError: the family, or one of its layers, has no attention matrix.
    """

    def __init__(self, model: PreTrainedModel):
        self._model_type = model.config.model_type
        recorder = _recorder(model)
        model.set_attn_implementation("eager")
        self._index = recorder.index
        self._modules = [
            _attention_of(block, recorder, layer, self._model_type)
            for layer, block in enumerate(find_layers(model).modules)
        ]
        self._caught: Tensor | None = None

    @contextmanager
    def watching(self, layer: int) -> Iterator[None]:
        """Keep the attention matrix that block `layer` forms meanwhile."""
        hook = self._modules[layer].register_forward_hook(self._catch)
        try:
            yield
        finally:
            hook.remove()

    def take(self) -> Tensor:
        """The matrix caught last [B, H, T, T]; it is handed over, not kept."""
        caught, self._caught = self._caught, None
        if caught is None:
            raise RequestError(f"model type {self._model_type!r} returns no attention matrix; {REMEDY}")
        return caught

    def _catch(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._caught = output[self._index] if isinstance(output, tuple) else None


def _recorder(model: PreTrainedModel) -> OutputRecorder:
    """How transformers itself would record this family's attention matrices."""
    recorded = (model.base_model._can_record_outputs or {}).get("attentions")
    first = recorded[0] if isinstance(recorded, list) and recorded else recorded
    if isinstance(first, OutputRecorder):
        return first
    if isinstance(first, type):
        return OutputRecorder(first, index=1)
    raise RequestError(f"model type {model.config.model_type!r} has no attention matrices; {REMEDY}")


def _attention_of(block: nn.Module, recorder: OutputRecorder, layer: int, model_type: str) -> nn.Module:
    wanted = (recorder.layer_name or "").strip(".")
    for name, module in block.named_modules():
        if isinstance(module, recorder.target_class) and wanted in name:
            return module
    raise RequestError(f"layer {layer} of model type {model_type!r} has no attention matrix; {REMEDY}")
