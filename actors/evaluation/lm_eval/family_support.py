"""Savings that a family of models allows in evaluation, tried out on a copy without its weights.

The copy computes in float32 whatever the model's own type is: in bfloat16, rounding would
hide that a recurrent layer mixes the branches of a tree.

Shape letters: Q tokens of a row, D hidden, V vocabulary.
"""

import inspect
import json
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.evaluation.lm_eval.prefix_tree import build_trees, run_rows
from actors.models import text_config
from actors.models.head import LogitHead
from actors.models.loading.dummy_weights import dummy_model, keep_one_of_each_kind, overlapping_draws

BOUNDING = ("window", "chunk")
"""Words in the names of config fields that say how far a token sees."""

PROBE = [[3, 5, 7, 9, 4, 6, 8], [3, 5, 7, 9, 4, 6, 10, 12], [3, 5, 7, 9, 6, 3], [3, 5, 8, 4, 9, 7, 3]]
"""Token sequences that branch at several depths; a model that mixes branches up gives itself away."""

TOLERANCE = torch.finfo(torch.float32).eps ** 0.5
"""Difference, relative to the norm, up to which two results are the same but for rounding."""

MASKABLE = (None, "eager", "sdpa")
"""Attention implementations that go by the mask they are given; None where a family has but its own."""

REFUSALS = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""Errors of a family that cannot be built from its config alone, or makes its own masks."""


@dataclass(frozen=True)
class FamilySupport:
    """Ways in which the family's models can be run.

    Attributes:
        head_stands_alone: the logits are those of the head on the backbone's last hidden states.
        most_nodes: nodes that a prefix tree may have: 0 if none can be run, None if without bound.
    """

    head_stands_alone: bool
    most_nodes: int | None


_KNOWN: dict[tuple[type[PreTrainedModel], str], FamilySupport] = {}
"""Results of `family_support` by class and config, found once a process."""


def family_support(model: PreTrainedModel) -> FamilySupport:
    """Return what the family of `model` supports; its weights and their type do not matter."""
    described = {k: v for k, v in model.config.to_dict().items() if k not in ("dtype", "_name_or_path")}
    key = (type(model), json.dumps(described, sort_keys=True, default=str))
    if key not in _KNOWN:
        _KNOWN[key] = _try_out(model)
    if model.config._attn_implementation not in MASKABLE:
        return replace(_KNOWN[key], most_nodes=0)
    return _KNOWN[key]


@torch.inference_mode()
def _try_out(model: PreTrainedModel) -> FamilySupport:
    try:
        dummy = keep_one_of_each_kind(dummy_model(model, overlapping_draws()))
        alone = [_last_hidden(dummy, torch.tensor([sequence])) for sequence in PROBE]
        logits = dummy(torch.tensor(PROBE[:1]), use_cache=False).logits
        head_stands_alone = dummy.base_model is not dummy and _agree(LogitHead(dummy)(alone[0]), logits)
    except REFUSALS:
        return FamilySupport(False, 0)
    # The smallest number of tokens that the config lets a token see.
    bounds = [
        value
        for name, value in vars(text_config(model.config)).items()
        if any(word in name for word in BOUNDING) and not name.endswith("layers")  # Qwen2 counts layers so
        if type(value) is int and value > 0
    ]
    bound = min(bounds, default=None)
    return FamilySupport(head_stands_alone, bound if _runs_trees(dummy, alone, bound) else 0)


def _runs_trees(model: PreTrainedModel, alone: list[Tensor], bound: int | None) -> bool:
    """Check that the probes, in one tree, have the hidden states [1, Q, D] that each has `alone`.

    A sliding window is counted in rows by some families and in depths by others; in a row no longer than
    the window, it makes no difference.
    """
    (tree,) = build_trees(PROBE, None)
    accepted = inspect.signature(type(model.base_model).forward).parameters
    if not {"attention_mask", "position_ids"} <= accepted.keys() or (bound is not None and bound < len(tree)):
        return False
    try:
        tree_QD = run_rows(partial(_last_hidden, model), [tree], torch.device("cpu"), torch.float32)[0]
    except REFUSALS:
        return False
    paths = dict(zip(tree.members, tree.paths, strict=True))
    return all(_agree(tree_QD[paths[i]], hidden_1QD[0]) for i, hidden_1QD in enumerate(alone))


def _last_hidden(model: PreTrainedModel, ids_BQ: Tensor, **options: Tensor) -> Tensor:
    """Return the last hidden states, or the logits of a family whose backbone cannot be run by itself."""
    output = model.base_model(ids_BQ, use_cache=False, **options)
    return output.logits if model.base_model is model else output.last_hidden_state


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < TOLERANCE * expected.norm())
