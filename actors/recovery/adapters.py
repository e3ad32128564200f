"""LoRA adapters on the unpruned model, named by source layer index.

An adapter sits on the kept layers of the *source* model, so that its tensors are
named by source index natively and the saved directory opens with plain PEFT.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.artifacts import fetch
from actors.contracts import AdapterSpec, ArtifactRef, RecoverySpec
from actors.errors import RequestError, unknown_name
from actors.models import find_layers
from actors.models.chain import ADAPTER_WEIGHTS, rename_layers

CURRENT = "current"
ADAPTER_KINDS = ("lora",)


def attach_adapters(model: PreTrainedModel, spec: RecoverySpec, kept: tuple[int, ...]) -> PeftModel:
    """Put the adapter chain of `spec.model` (frozen) and a new adapter (trainable) on `model`.

    The new adapter is drawn from `stage_seed` alone: every worker draws the same.

    Args:
        model: the unpruned source model, changed in place.
        kept: source indices of the student's layers; only these are adapted.

    Raises:
        RequestError: an unknown adapter kind, or targets that name no linear layer.
    """
    if spec.adapter.kind not in ADAPTER_KINDS:
        raise unknown_name("adapter kind", spec.adapter.kind, ADAPTER_KINDS)
    config = _new_config(model, spec.adapter, kept)
    layers_path = find_layers(model).path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(spec))
        adapted = _with_adapter(model, config)
    adapted.peft_config[CURRENT].base_model_name_or_path = spec.model.source.path
    earlier = [_add_earlier(adapted, ref, i, kept, layers_path) for i, ref in enumerate(spec.model.adapters)]
    adapted.base_model.set_adapter([*earlier, CURRENT])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(f".{CURRENT}." in name)
    return adapted


def save_adapter(adapted: PeftModel, directory: Path) -> None:
    """Write the trained adapter as an ordinary PEFT directory."""
    tensors = get_peft_model_state_dict(adapted, adapter_name=CURRENT, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(adapted.peft_config[CURRENT])
    config.inference_mode = True
    # PEFT keeps a set, whose order changes from process to process; the artifact's hash must not.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(directory))


def stage_seed(spec: RecoverySpec) -> int:
    """Seed of one recovery: each of a trajectory draws other batches and another start.

    With the same start, every adapter of a chain would see the same few directions.
    """
    return spec.seed + len(spec.model.adapters)


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training may change, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lora_layers(block: nn.Module) -> list[LoraLayer]:
    """The adapted layers inside one block."""
    return [module for module in block.modules() if isinstance(module, LoraLayer)]


@contextmanager
def switched_off(layers: list[LoraLayer]) -> Iterator[None]:
    """Compute with the frozen base weights alone.

    PEFT's own switch walks the whole model and turns gradients off and on again,
    far too slow to be thrown twice a block; this throws it for one block only.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def target_paths(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers to adapt, relative to their block.

    Args:
        targets: `all-linear`, `attention`, `ffn`, or names of layers such as
            `("q_proj", "mlp.down_proj")`.

    Raises:
        RequestError: nothing of that name; the message lists what there is.
    """
    found = {
        path
        for block in find_layers(model).modules
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    names = (targets,) if isinstance(targets, str) else targets
    chosen = {path for path in found for name in names if _is_target(path, name)}
    unmatched = [name for name in names if not any(_is_target(path, name) for path in found)]
    if unmatched:
        raise RequestError(
            f"adapter target {unmatched[0]!r} names no linear layer of model type "
            f"{model.config.model_type!r}; there are all-linear, attention, ffn, {', '.join(sorted(found))}"
        )
    return sorted(chosen)


def _is_target(path: str, name: str) -> bool:
    in_attention = "attn" in path or "attention" in path
    groups = {"all-linear": True, "attention": in_attention, "ffn": not in_attention}
    return groups.get(name, path == name or path.endswith(f".{name}"))


def _new_config(model: PreTrainedModel, spec: AdapterSpec, kept: tuple[int, ...]) -> LoraConfig:
    if spec.rank < 1:
        raise RequestError(f"adapter rank must be at least 1, not {spec.rank}")
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank if spec.alpha is None else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=target_paths(model, spec.targets),
        layers_to_transform=list(kept),
        layers_pattern=find_layers(model).attribute,
        task_type="CAUSAL_LM",
    )


def _with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        return get_peft_model(model, config, adapter_name=CURRENT)
    except ValueError as error:
        raise RequestError(
            f"adapter targets do not suit model type {model.config.model_type!r}: {error}"
        ) from error


def _add_earlier(
    adapted: PeftModel, ref: ArtifactRef, position: int, kept: tuple[int, ...], layers_path: str
) -> str:
    """Load the chain's adapter number `position` onto the layers that remain; returns its name."""
    directory, name = fetch(ref), f"earlier_{position}"
    config = LoraConfig.from_pretrained(str(directory))
    config.layers_to_transform = [i for i in config.layers_to_transform if i in kept]
    adapted.add_adapter(name, config)
    tensors = rename_layers(load_file(directory / ADAPTER_WEIGHTS), layers_path, {i: i for i in kept})
    set_peft_model_state_dict(adapted, tensors, adapter_name=name)
    return name
