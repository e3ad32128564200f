"""Removals that a family can express at all, found from its config before anything is computed."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedModel

from actors.contracts import ModelSpec
from actors.errors import RequestError
from actors.models.families import depth
from actors.models.loading.load import empty_model, load_config
from actors.models.pruning.surgery import blocks_alike, check_removal


def check_prunable(spec: ModelSpec, count: int) -> None:
    """Check that `count` blocks of the model can be removed in some way.

    Raises:
        RequestError: they cannot; names the config field.
    """
    model = _skeleton(spec)
    # Rules that go by a layer's index let the last layers go if any.
    _choose(model, (), range(depth(model.config) - 1, -1, -1), count)


def any_layers(spec: ModelSpec) -> bool:
    """Return true if any layers can be removed where as many others can: blocks differ in weights alone."""
    return blocks_alike(_skeleton(spec))


def choose_removable(
    spec: ModelSpec, dropped: Sequence[int], order: Sequence[int], count: int
) -> tuple[int, ...]:
    """Return the first `count` layers of `order` that the config lets go together with those dropped before.

    These are simply the first, unless the family's config cannot express that. Then
    they are taken one by one, each the first in order that can go by then.

    Args:
        dropped, order: source layer indices.

    Raises:
        RequestError: so many cannot go; names the config field.
    """
    return _choose(_skeleton(spec), dropped, order, count)


def removable_layers(spec: ModelSpec, dropped: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    """Return those of the source layers that the config lets go, one alone, after those dropped before."""
    model = _skeleton(spec)
    return tuple(layer for layer in layers if _refusal(model, (*dropped, layer)) is None)


@lru_cache(maxsize=8)
def _skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return the model without its weights; cached, since every iteration of every trajectory needs it."""
    return empty_model(spec, load_config(spec))


def _choose(
    model: PreTrainedModel, dropped: Sequence[int], order: Sequence[int], count: int
) -> tuple[int, ...]:
    reason = _refusal(model, (*dropped, *order[:count]))
    if reason is None:
        return tuple(order[:count])
    chosen: list[int] = []
    while len(chosen) < count:
        gone = (*dropped, *chosen)
        can_go = (layer for layer in order if layer not in chosen and _refusal(model, (*gone, layer)) is None)
        if (layer := next(can_go, None)) is None:
            raise RequestError(f"{reason}; {len(chosen)} of {count} layers can go" if chosen else str(reason))
        chosen.append(layer)
    return tuple(chosen)


def _refusal(model: PreTrainedModel, layers: Sequence[int]) -> RequestError | None:
    """Return the reason why these layers cannot be removed, None if they can."""
    try:
        check_removal(model, layers)
    except RequestError as error:
        return error
    return None
