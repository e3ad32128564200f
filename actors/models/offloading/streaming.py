"""A model whose blocks stay on disk: each is read from safetensors when it is due, the next one ahead.

Tensors are read rather than mapped, so that no more than two blocks are in memory,
whatever the operating system would keep of the file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.artifacts import fetch
from actors.contracts import ModelRef, ModelSpec
from actors.errors import RequestError
from actors.models.adapter_deltas import Deltas, add_deltas, read_deltas
from actors.models.families import depth, find_layers
from actors.models.loading.checkpoint import StoredTensor, read_checkpoint
from actors.models.loading.completeness import stored_as
from actors.models.loading.conversion import Conversion, StoredPart
from actors.models.loading.load import DTYPES, empty_model, load_config, model_checkpoint, with_dtype
from actors.models.offloading.dispatch import loaded_weights
from actors.models.pruning.surgery import remove_layers


class LayerStream:
    """Brings the blocks of a model into memory one at a time.

    Attributes:
        bytes_read: of weights, since it was made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Sequence[Sequence[StoredPart]],
        deltas: Sequence[Deltas],
        device: torch.device,
    ):
        self._blocks = find_layers(model).modules
        self._weights, self._deltas = weights, deltas
        self._device, self._dtype = device, model.dtype
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-stream")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self.bytes_read = 0

    @contextmanager
    def resident(self, index: int, then: int) -> Iterator[None]:
        """Hold the weights of block `index` inside this context; read block `then`, if any, meanwhile."""
        block = self._blocks[index]
        names = {name for part in self._weights[index] for name in part.names}
        absent = {name: p for name, p in block.named_parameters() if name in names}
        reading = self._ahead.pop(index, None) or self._reader.submit(self._read, index)
        block.load_state_dict(reading.result(), strict=False, assign=True)
        del reading
        self._ahead.clear()
        if 0 <= then < len(self._blocks):
            self._ahead[then] = self._reader.submit(self._read, then)
        try:
            yield
        finally:
            block.load_state_dict(absent, strict=False, assign=True)

    def _read(self, index: int) -> dict[str, Tensor]:
        tensors = {}
        for part in self._weights[index]:
            for name, tensor in part.read(self._dtype).items():
                tensors[name] = tensor.to(self._device)
                add_deltas(tensors[name], self._deltas, index, name)
            self.bytes_read += part.num_bytes
        return tensors


def resident(model: PreTrainedModel, index: int, then: int | None = None) -> AbstractContextManager[None]:
    """Return a context that holds the weights of block `index`, if they are streamed or offloaded.

    Block `then`, the one after `index` if None, is the next to be asked for; it is read ahead.
    """
    stream: LayerStream | None = getattr(model, "layer_stream", None)
    if stream is None:
        return loaded_weights(find_layers(model).modules[index])
    return stream.resident(index, index + 1 if then is None else then)


def load_streamed(ref: ModelRef, device: torch.device) -> PreTrainedModel:
    """Load the model that `ref` describes, with everything but its blocks in memory, on `device`.

    Its blocks compute only inside `resident(model, index)`; `model.layer_stream`
    is its `LayerStream`.

    Raises:
        RequestError: as `load_model`, or weights of a block are not to be found in the files.
    """
    if ref.merges:
        raise RequestError("a model with merged layers cannot be streamed; turn scoring.stream_weights off")
    spec = with_dtype(ref.source)
    stored = dict(model_checkpoint(spec).tensors)
    if ref.weights is not None:
        stored |= read_checkpoint(fetch(ref.weights)).tensors
    model = empty_model(spec, load_config(spec), dtype=DTYPES[spec.dtype]).eval()
    kept = ref.kept(depth(model.config))
    path = find_layers(model).path
    files = _Files(model, stored, spec)
    weights = []
    for index in kept:
        names = [name for name, _ in model.get_submodule(f"{path}.{index}").named_parameters()]
        weights.append(files.parts(names, f"{path}.{index}."))
    _load_outside(model, path, files)
    if ref.dropped:
        remove_layers(model, ref.dropped)
    # What is in memory: the blocks' absent weights cannot be moved.
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
    deltas = [read_deltas(adapter, path, kept) for adapter in ref.adapters]
    model.layer_stream = LayerStream(model, weights, deltas, device)
    return model


class _Files:
    """Where the parameters of a model are in its files."""

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, StoredTensor], spec: ModelSpec):
        self._model, self._stored, self._spec = model, stored, spec

    def find(self, name: str) -> StoredTensor | None:
        """Return the tensor that holds a parameter as it is."""
        return stored_as(name, self._model, self._stored)

    def parts(self, names: Iterable[str], prefix: str) -> list[StoredPart]:
        """Return what the parameters `prefix` + name are to be read from.

        Raises:
            RequestError: one is neither there nor made of what is there.
        """
        parts: list[StoredPart] = []
        made: set[str] = set()
        for name in names:
            if (stored := self.find(f"{prefix}{name}")) is not None:
                parts.append(StoredPart((name,), prefix, (stored,)))
            elif name not in made and (sources := self._sources.get(f"{prefix}{name}")):
                parts.append(self._conversion.part_of(f"{prefix}{name}", prefix, sources))
            made.update(*(part.names for part in parts[-1:]))
            if name not in made:
                raise RequestError(
                    f"model {self._spec.path!r}: its safetensors have no weight {prefix + name!r}, so its "
                    "layers cannot be read one at a time; set scoring.stream_weights to false"
                )
        return parts

    @cached_property
    def _conversion(self) -> Conversion:
        return Conversion(self._model)

    @cached_property
    def _sources(self) -> Mapping[str, Sequence[StoredTensor]]:
        return self._conversion.by_parameter(self._stored.values())


def _load_outside(model: PreTrainedModel, path: str, files: _Files) -> None:
    """Load embeddings, final norm, head and stored buffers: all but the blocks' weights."""
    inside = re.compile(rf"{re.escape(path)}\.\d+\.")
    twins: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or (name in parameters and inside.match(name)):
            continue
        # Of two tied weights a file may hold either.
        names = (name, *(twin for twin, source in twins.items() if source == name))
        held = next((held for held in map(files.find, names) if held), None)
        if held is not None:
            found[name] = held.read().to(tensor.dtype)
        elif name not in twins:
            for part in files.parts([name], ""):
                found |= part.read(tensor.dtype)
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
