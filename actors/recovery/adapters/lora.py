"""LoRA adapters, named by source layer index so that a saved one opens on the source with plain PEFT.

Where the source is the teacher, too, adapters sit on its kept layers; a student by
itself is a pruned model, and its adapter's tensors are renamed when it is saved.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.contracts import AdapterSpec, BelowCut, RecoverySpec
from actors.errors import RequestError, unknown_name
from actors.models import Deltas, find_layers, join_deltas, read_deltas
from actors.models.model_builder import ADAPTER_WEIGHTS, rename_layers
from actors.recovery.adapters.nf4 import quantize_blocks
from actors.recovery.adapters.weight_deltas import weight_deltas

CURRENT = "current"
LORA_SETTINGS = frozenset({"rank", "alpha", "dropout", "targets", "layers", "rslora"})
SETTINGS = {
    "lora": LORA_SETTINGS | {"dora"},
    "qlora": LORA_SETTINGS | {"double_quantization"},
    "full": frozenset(),
}
"""Fields of `AdapterSpec` that each kind goes by."""

ADAPTER_KINDS = tuple(SETTINGS)


def check_adapter(spec: RecoverySpec) -> None:
    """Refuse adapter settings that contradict one another.

    Raises:
        RequestError: an unknown kind, a rank below 1, or a setting that this kind has no use for.
    """
    adapter = spec.adapter
    if adapter.kind not in ADAPTER_KINDS:
        raise unknown_name("adapter kind", adapter.kind, ADAPTER_KINDS)
    given = {f.name for f in fields(adapter) if getattr(adapter, f.name) != f.default}
    useless = sorted(given - {"kind"} - SETTINGS[adapter.kind])
    if useless:
        raise RequestError(
            f"recovery.adapter.{useless[0]} has no meaning with recovery.adapter.kind {adapter.kind!r}; "
            "leave it out or choose another kind"
        )
    if adapter.rank < 1:
        raise RequestError(f"adapter rank must be at least 1, not {adapter.rank}")


def attach_adapters(model: PreTrainedModel, spec: RecoverySpec, kept: tuple[int, ...]) -> PeftModel:
    """Put all differences between student and source, and a new adapter, on the source model.

    The chain of adapters becomes one frozen LoRA of their summed rank, weights in the
    place of the source's a frozen LoRA of full rank; only the new adapter trains.
    With all of them off, the model is the source.

    Args:
        model: the unpruned source model, changed in place. With QLoRA its blocks' linear
            layers are quantised, for the teacher as for the student.
        kept: source indices of the student's layers; only these are adapted, from
            `spec.first_trainable` on.

    Raises:
        RequestError: an unknown adapter kind, targets that name no linear layer, or no layer to adapt.
    """
    path = find_layers(model).path
    frozen = {"weights": weight_deltas(model, spec.model.weights, kept)} if spec.model.weights else {}
    if spec.model.adapters:
        chain = [read_deltas(ref, path, kept) for ref in spec.model.adapters]
        frozen["earlier"] = join_deltas(chain)
    adapted = new_adapter(model, spec, kept)
    present = {name: deltas for name, deltas in frozen.items() if deltas.factors}
    for name, deltas in present.items():
        _add_frozen(adapted, name, deltas, [f"{path}.{layer}" for layer in kept])
    adapted.base_model.set_adapter([*present, CURRENT])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(f".{CURRENT}." in name)
    return adapted


def new_adapter(model: PreTrainedModel, spec: RecoverySpec, layers: tuple[int, ...]) -> PeftModel:
    """Put a new, trainable adapter on those layers of `model`; all else is frozen.

    It is drawn from `stage_seed` alone: every worker draws the same.

    Args:
        layers: those of the student, of which those before `spec.first_trainable` get none.
    """
    check_adapter(spec)
    adapter, layers = spec.adapter, layers[spec.first_trainable :]
    if not layers:
        raise RequestError(
            f"recovery.adapter.layers {_layers_text(adapter)}: no block is left after the first removed one, "
            f"{min(spec.model.dropped)}; use {{below_cut: 3}}, or all"
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=target_paths(model, adapter.targets),
        layers_to_transform=list(layers),
        layers_pattern=find_layers(model).attribute,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )
    if adapter.kind == "qlora":
        quantize_blocks(model, adapter.double_quantization)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(spec))
        try:
            adapted = get_peft_model(model, config, adapter_name=CURRENT)
        except ValueError as error:
            raise RequestError(
                f"adapter targets do not suit model type {model.config.model_type!r}: {error}"
            ) from error
    adapted.peft_config[CURRENT].base_model_name_or_path = spec.model.source.path
    return adapted


def save_adapter(adapted: PeftModel, directory: Path, source_layers: tuple[int, ...] | None = None) -> None:
    """Write the trained adapter as an ordinary PEFT directory, named by source layer.

    Args:
        source_layers: source index of each layer of the model, if that is no longer whole.
    """
    tensors = get_peft_model_state_dict(adapted, adapter_name=CURRENT, save_embedding_layers=False)
    config = copy.copy(adapted.peft_config[CURRENT])
    if source_layers is not None:
        path = find_layers(adapted.get_base_model()).path
        tensors = rename_layers(tensors, path, dict(enumerate(source_layers)))
        config.layers_to_transform = [source_layers[i] for i in config.layers_to_transform]
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.inference_mode = True
    # PEFT keeps a set, whose order changes from process to process; the artifact's hash must not.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(directory))


def stage_seed(spec: RecoverySpec) -> int:
    """Return the seed of one recovery: each of a trajectory has other batches and another initialisation.

    With the same start, every adapter of a chain would see the same few directions.
    Full weights leave no chain, so there the layers dropped so far are counted.
    """
    stages = spec.model.dropped if spec.adapter.leaves_weights else spec.model.adapters
    return spec.seed + len(stages)


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training may change, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lora_layers(block: nn.Module) -> list[LoraLayer]:
    """Return the adapted layers inside one block."""
    return [module for module in block.modules() if isinstance(module, LoraLayer)]


@contextmanager
def adapters_disabled(layers: list[LoraLayer]) -> Iterator[None]:
    """Compute with the frozen base weights alone.

    PEFT's own switch visits the whole model and turns gradients off and on again,
    far too slow for two calls a block; this switches one block only.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def target_paths(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Return the paths of the linear layers to adapt, relative to their block.

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
        if _is_matrix(module)
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


def _layers_text(adapter: AdapterSpec) -> str:
    layers = adapter.layers
    return f"{{below_cut: {layers.below_cut}}}" if isinstance(layers, BelowCut) else layers


def _is_matrix(module: nn.Module) -> bool:
    """Return whether the module computes x Wᵀ + b, to which a low-rank product can be added."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    try:
        output = module(module.weight.new_zeros(1, 1, module.in_features))
    except RuntimeError:
        return False
    return isinstance(output, Tensor) and output.shape == (1, 1, module.out_features)


def _is_target(path: str, name: str) -> bool:
    in_attention = "attn" in path or "attention" in path
    groups = {"all-linear": True, "attention": in_attention, "ffn": not in_attention}
    return groups.get(name, path == name or path.endswith(f".{name}"))


def _add_frozen(adapted: PeftModel, name: str, deltas: Deltas, blocks: list[str]) -> None:
    """Put fixed low-rank updates on the blocks at those paths."""
    modules = {place: f"{blocks[place[0]]}.{place[1].removesuffix('.weight')}" for place in deltas.factors}
    config = LoraConfig(
        r=deltas.rank, lora_alpha=deltas.rank, target_modules=list(modules.values()), task_type="CAUSAL_LM"
    )
    # What PEFT draws is overwritten; the random state must not depend on the chain.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        adapted.add_adapter(name, config)
        for place, (a, b) in deltas.factors.items():
            layer = adapted.get_base_model().get_submodule(modules[place])
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(deltas.scale * b)
