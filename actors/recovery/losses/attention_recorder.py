"""Reading attention matrices while single blocks run."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from actors.errors import RequestError
from actors.models import find_layers

REMEDY = "set the weight of the loss term 'attention' to 0 (recovery.loss.attention)"
DEFAULT_IMPLEMENTATIONS = (None, "eager", "sdpa")
"""What transformers chooses by itself; anything else is the user's choice."""


class AttentionRecorder:
    """Records the attention matrix of one block at a time.

    Fused kernels never form the matrix, so the model is switched to eager attention.

    Args:
        model: a decoder language model of N blocks.

    Raises:
        RequestError: the family, or one of its layers, has no attention matrix, or
            the model was loaded for a kernel of its own choice.
    """

    def __init__(self, model: PreTrainedModel):
        self._model_type = model.config.model_type
        recorder = _output_recorder(model)
        _switch_to_eager(model)
        self._index = recorder.index
        wanted = (recorder.layer_name or "").strip(".")
        self._modules = []
        for layer, block in enumerate(find_layers(model).modules):
            found = (
                module
                for name, module in block.named_modules()
                if isinstance(module, recorder.target_class) and wanted in name
            )
            attention = next(found, None)
            if attention is None:
                raise RequestError(
                    f"layer {layer} of model type {self._model_type!r} has no attention matrix; {REMEDY}"
                )
            self._modules.append(attention)

    def read(self, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the result of `run`, and the attention matrix [B, H, T, T] that block `layer` then forms.

        Raises:
            RequestError: it formed none.
        """
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple) and isinstance(output[self._index], Tensor):
                caught.append(output[self._index])

        hook = self._modules[layer].register_forward_hook(catch)
        try:
            result = run()
        finally:
            hook.remove()
        if not caught:
            raise RequestError(f"model type {self._model_type!r} returns no attention matrix; {REMEDY}")
        return result, caught.pop()


def _switch_to_eager(model: PreTrainedModel) -> None:
    """Switch to eager attention, unless a kernel that forms no matrix was requested."""
    chosen = model.config._attn_implementation
    if chosen not in DEFAULT_IMPLEMENTATIONS:
        raise RequestError(
            f"the model is loaded with attention implementation {chosen!r}, which forms no attention matrix; "
            f"take that choice back, or {REMEDY}"
        )
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise RequestError(f"model type {model.config.model_type!r} has no eager attention; {REMEDY}")


def _output_recorder(model: PreTrainedModel) -> OutputRecorder:
    """Return how transformers itself would record this family's attention matrices."""
    recorded = (model.base_model._can_record_outputs or {}).get("attentions")
    first = recorded[0] if isinstance(recorded, list) and recorded else recorded
    if isinstance(first, OutputRecorder):
        return first
    if isinstance(first, type):
        return OutputRecorder(first, index=1)
    raise RequestError(f"model type {model.config.model_type!r} has no attention matrices; {REMEDY}")
