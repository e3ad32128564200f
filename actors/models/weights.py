"""Full weights that recovery left: safetensors, each tensor under the name that it has in the source model.

Only tensors that differ from the source's are stored, so that layers dropped
later shift nothing, and a change of a few weights takes little space.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.artifacts import fetch
from actors.contracts import ArtifactRef
from actors.errors import WorkError
from actors.models.loading.checkpoint import INDEX, read_checkpoint

MAX_SHARD_SIZE = "5GB"


def save_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, by source name, as one safetensors file or as several with an index."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    save_weights_as_read(shapes, tensors.__getitem__, directory)


def save_weights_as_read(
    shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], directory: Path | None
) -> None:
    """Write what `save_weights` writes, with no more than one file's tensors in memory.

    Args:
        shapes: by source name, a tensor on the meta device of the shape and type to be written.
        read: gives the tensor of a name; called once for each, in the same order in all processes.
        directory: None in a process that only takes part in `read`.
    """
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(
        dict(sorted(shapes.items())), filename_pattern=pattern, max_shard_size=MAX_SHARD_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = read(name)
            if directory is not None:
                tensors[name] = tensor.detach().to("cpu", shapes[name].dtype).contiguous()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, directory / file, metadata={"format": "pt"})
    if directory is not None and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2))


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
