"""How a file's tensors become a model's parameters, by transformers' own rules: renamed, joined or divided.

Most files hold each parameter under its name. Experts are mostly apart in the file and joined in the model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from actors.models.loading.checkpoint import FLOATING, StoredTensor


@dataclass(frozen=True)
class StoredPart:
    """Parameters that come from the same tensors of a file; mostly one from one.

    Attributes:
        names: of the parameters, without `prefix`.
        prefix: the first part of their names.
        stored: the tensors, in order.
        convert: makes the parameters, by whole name, of the read tensors; None where one is the other.
    """

    names: tuple[str, ...]
    prefix: str
    stored: tuple[StoredTensor, ...]
    convert: Callable[[Iterable[Tensor]], dict[str, Tensor]] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.stored)

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parameters by name, without the prefix."""
        tensors = (tensor.read().to(dtype) for tensor in self.stored)
        if self.convert is None:
            return dict(zip(self.names, tensors, strict=True))
        return {name.removeprefix(self.prefix): tensor for name, tensor in self.convert(tensors).items()}


class Conversion:
    """The rules by which transformers makes the parameters of `model` from the tensors of a file.

    Args:
        model: with all its layers; without weights.
    """

    def __init__(self, model: PreTrainedModel):
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._rules = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix, self._config = model.base_model_prefix, model.config
        self._parameters = model.state_dict()
        # All that a rule asks a model for; the model itself may lose layers.
        self._shapes: Any = SimpleNamespace(get_parameter=self._parameters.__getitem__)

    def parameter_of(self, name: str) -> str:
        """Return the parameter that a tensor becomes, or the first of those that it is a part of."""
        return self._target(name)[0]

    def part_of(self, parameter: str, prefix: str, tensors: Iterable[StoredTensor]) -> StoredPart:
        """Return the part that tensors become of which `parameter` is the first parameter."""
        ordered = tuple(sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)))
        patterns = [self._target(tensor.name)[1] for tensor in ordered]
        if patterns[0] is None:
            return StoredPart((parameter.removeprefix(prefix),), prefix, ordered[:1])
        rule = self._rules[patterns[0]]

        def convert(read: Iterable[Tensor]) -> dict[str, Tensor]:
            converter = deepcopy(rule)
            for pattern, stored, tensor in zip(patterns, ordered, read, strict=True):
                converter.add_tensor(parameter, stored.name, pattern, tensor)
            made: dict[str, Any] = converter.convert(parameter, model=self._shapes, config=self._config)
            return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}

        # Seen from tensors without data: which parameters there are depends on the rule.
        shapes = convert(torch.empty(t.shape, dtype=FLOATING[t.dtype], device="meta") for t in ordered)
        return StoredPart(tuple(name.removeprefix(prefix) for name in shapes), prefix, ordered, convert)

    def by_parameter(self, tensors: Iterable[StoredTensor]) -> dict[str, list[StoredTensor]]:
        """Return the tensors by the first parameter that they become; those of other types are left out."""
        found: dict[str, list[StoredTensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.dtype in FLOATING:
                found[self.parameter_of(tensor.name)].append(tensor)
        return found

    def _target(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._parameters)
