"""A check that tokens of a row see their own document only (recovery.packing: documents)."""

from inspect import signature

import torch
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass, find_layers

PROBE_TOKENS = 8
TOLERANCE = 1e-2
REMEDY = "set recovery.packing to concatenated"


@torch.no_grad()
def check_document_isolation(model: PreTrainedModel) -> None:
    """Run two rows of two short documents that differ in the first one only, and look at the second.

    Recurrent families, and kernels without support for documents, carry the first into it.

    Raises:
        RequestError: the model does not go by positions, or a token saw another document.
    """
    if "position_ids" not in signature(find_layers(model).parent.forward).parameters:
        raise RequestError(f"model type {model.config.model_type!r} takes no positions; {REMEDY}")
    ids_BT = torch.arange(3, 3 + 2 * PROBE_TOKENS, device=model.device).repeat(2, 1)
    ids_BT[1, :PROBE_TOKENS] = ids_BT[1, :PROBE_TOKENS].flip(0)
    positions_BT = torch.arange(PROBE_TOKENS, device=model.device).repeat(2, 2)
    layerwise = LayerwisePass(model, ids_BT, position_ids_BT=positions_BT)
    hidden_BTD = layerwise.hidden_BTD
    for layer in range(len(find_layers(model).modules)):
        hidden_BTD = layerwise.block(layer, hidden_BTD)
    first, second = hidden_BTD[:, PROBE_TOKENS:].float()
    if (first - second).norm() > TOLERANCE * first.norm():
        raise RequestError(
            f"model type {model.config.model_type!r} with attention implementation "
            f"{model.config._attn_implementation!r} lets tokens see other documents of their row; {REMEDY}"
        )
