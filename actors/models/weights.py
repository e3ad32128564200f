"""Full weights that recovery left: safetensors, each tensor under the name that it has in the source model.

Only tensors that differ from the source's are stored, so that layers dropped
later shift nothing, and a change of a few weights takes little space.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.artifacts import fetch
from actors.contracts import ArtifactRef
from actors.errors import WorkError
from actors.models.loading.checkpoint import read_checkpoint

MAX_SHARD_SIZE = "5GB"


def save_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, by source name, as one safetensors file or as several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_torch_state_dict(whole, directory, max_shard_size=MAX_SHARD_SIZE)


def weight_shapes(weights: ArtifactRef) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the stored tensors; read no tensor."""
    return {name: tensor.shape for name, tensor in read_checkpoint(fetch(weights)).tensors.items()}


def read_weights(weights: ArtifactRef) -> dict[str, Tensor]:
    """Return every stored tensor by its source name."""
    return {name: tensor.read() for name, tensor in read_checkpoint(fetch(weights)).tensors.items()}


@torch.no_grad()
def put_weights(model: PreTrainedModel, weights: ArtifactRef) -> None:
    """Put the stored tensors in the place of the unpruned model's own, in its type.

    Raises:
        WorkError: the model has no tensor of such a name and shape.
    """
    own: dict[str, nn.Parameter] = dict(model.named_parameters())
    for name, tensor in read_weights(weights).items():
        if name not in own or own[name].shape != tensor.shape:
            raise WorkError(
                f"weights {weights.uri!r} do not belong to {model.name_or_path!r}: it has no {name!r} "
                f"of shape {tuple(tensor.shape)}"
            )
        own[name].copy_(tensor)
