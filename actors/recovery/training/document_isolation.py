"""A check that tokens of a row see their own document only (recovery.packing: documents)."""

from inspect import signature

import torch
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass, find_layers

PROBE_TOKENS = 8
TOLERANCE = 1e-2
REMEDY = "set recovery.packing to concatenated"


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let the model compute attention by an implementation of transformers.

    Raises:
        RequestError: there is none of that name, it is not installed, or the family does not have it.
    """
    try:
        model.set_attn_implementation(implementation)
        chosen = model.config._attn_implementation
    except (ImportError, ValueError) as error:
        chosen = str(error).strip().splitlines()[0]
    if chosen != implementation:
        raise RequestError(
            f"recovery.attention_implementation: model type {model.config.model_type!r} cannot use "
            f"{implementation!r} here ({chosen}); leave it out for the model's own"
        )


def wants_one_row(model: PreTrainedModel) -> bool:
    """Return whether the model's attention isolates documents only if all are in one row.

    So do the flash kernels: transformers gives them the documents' lengths for one row, and else no mask.
    """
    return "flash" in (model.config._attn_implementation or "")


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
    if wants_one_row(model):
        ids_BT, positions_BT = ids_BT.view(1, -1), positions_BT.view(1, -1)
    layerwise = LayerwisePass(model, ids_BT, position_ids_BT=positions_BT)
    hidden_BTD = layerwise.hidden_BTD
    for layer in range(len(find_layers(model).modules)):
        hidden_BTD = layerwise.block(layer, hidden_BTD)
    first, second = hidden_BTD.view(2, 2 * PROBE_TOKENS, -1)[:, PROBE_TOKENS:].float()
    if (first - second).norm() > TOLERANCE * first.norm():
        raise RequestError(
            f"model type {model.config.model_type!r} with attention implementation "
            f"{model.config._attn_implementation!r} lets tokens see other documents of their row; {REMEDY}"
        )
