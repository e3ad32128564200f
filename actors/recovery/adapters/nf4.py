"""QLoRA's base: the blocks' linear weights as 4-bit NormalFloat (arXiv 2305.14314 §3)."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.errors import RequestError
from actors.models import device, find_layers


def quantize_blocks(model: PreTrainedModel, double_quantization: bool) -> None:
    """Replace every linear layer of the blocks by its NF4 counterpart, in place, on the device.

    The model may be on the CPU: its weights go to the device one by one, and no more than one
    of them is there unquantised.

    Embeddings, norms and head stay as they are. The adapter is trained on these
    weights but later merged into the unquantised ones, as QLoRA does; the
    quantisation error is then absent from the base and not compensated.

    Args:
        double_quantization: quantise the blocks' scales, too (0.37 bits a weight less).

    Raises:
        RequestError: bitsandbytes is not installed, or the family's linear layers are
            not of the kind that it can hold.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise RequestError(
            "recovery.adapter.kind 'qlora' needs bitsandbytes; get it by `pip install 'bitsandbytes>=0.49'`"
        ) from error
    for block in find_layers(model).modules:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, Conv1D):
                raise RequestError(
                    f"model type {model.config.model_type!r} keeps {path!r} as a Conv1D, which NF4 cannot "
                    "hold; use recovery.adapter.kind: lora"
                )
            if type(layer) is nn.Linear:
                block.set_submodule(path, _quantized(layer, Linear4bit, double_quantization))
    # PEFT goes by this mark.
    model.is_loaded_in_4bit = True


def _quantized(layer: nn.Linear, kind: type[nn.Linear], double_quantization: bool) -> nn.Linear:
    quantized = kind(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=double_quantization,
        quant_type="nf4",
        device=layer.weight.device,
    )
    weight = layer.weight.detach()
    # The original must stay where it was if it is quantised there.
    quantized.weight.data = weight.clone() if weight.device == device() else weight
    if layer.bias is not None:
        quantized.bias = layer.bias.requires_grad_(False)
    # On CPUs with AVX-512 it would repack weights for inference, which have no backward pass.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to(device())
