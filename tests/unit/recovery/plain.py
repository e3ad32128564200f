"""Recovery by definition: two separate models, all hidden states, attentions and logits, plain PEFT."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.contracts import AdapterSpec, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.models import find_layers, remove_layers
from actors.recovery.adapters.lora import attach_adapters
from actors.recovery.distillation.teacher_student import TeacherStudent, shared_teacher_student


def adapted_teacher_student(model: PreTrainedModel, kept: Sequence[int], **adapter: Any) -> TeacherStudent:
    """A shared pair whose adapters are no longer at zero, as after some training."""
    depth = len(find_layers(model).modules)
    dropped = tuple(i for i in range(depth) if i not in kept)
    spec = RecoverySpec(
        model=ModelRef(ModelSpec("source"), dropped),
        data=TextSpec(),
        adapter=AdapterSpec(**{"rank": 4} | adapter),
    )
    adapted = attach_adapters(model, spec, tuple(kept))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return shared_teacher_student(adapted, tuple(kept))


def separate_student(model: PreTrainedModel, pair: TeacherStudent, **adapter: Any) -> PreTrainedModel:
    """A pruned copy of `model` with the adapters of the pair's student, and PEFT's own forward.

    Raises:
        RequestError: surgery refuses the family.
    """
    kept = pair.student_layers
    dropped = [i for i in range(len(find_layers(model).modules)) if i not in kept]
    student = adapted_teacher_student(
        remove_layers(copy.deepcopy(model), dropped), range(len(kept)), **adapter
    ).student
    for layer, block in zip(kept, find_layers(student).modules, strict=True):
        block.load_state_dict(find_layers(pair.student).modules[layer].state_dict())
    return student


def run(model: PreTrainedModel, ids_BT: Tensor, **inputs: Any) -> tuple[list[Tensor], Any]:
    """Hidden states after each block, caught by hooks, and the family's output."""
    hidden: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, out: hidden.append(out[0] if isinstance(out, (tuple, list)) else out)
        )
        for block in find_layers(model).modules
    ]
    output = model(ids_BT, use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    return hidden, output


def logit_value(name: str, z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of a logit loss, from full logits, with torch's own losses, in fp64."""
    z_s, z_t = z_s.double(), z_t.double()
    if name == "mse":
        return nn.functional.mse_loss(z_s, z_t)
    log_s, log_t = ((z / temperature).log_softmax(-1).flatten(0, 1) for z in (z_s, z_t))
    kl = lambda q, p: nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")  # noqa: E731
    middle = ((log_s.exp() + log_t.exp()) / 2).log()
    mix = lambda p, q: (0.1 * p.exp() + 0.9 * q.exp()).log()  # noqa: E731
    values = {
        "forward_kl": lambda: kl(log_s, log_t),
        "reverse_kl": lambda: kl(log_t, log_s),
        "jsd": lambda: (kl(middle, log_t) + kl(middle, log_s)) / 2,
        "skew_kl": lambda: kl(mix(log_s, log_t), log_t),
        "skew_reverse_kl": lambda: kl(mix(log_t, log_s), log_s),
        "cross_entropy": lambda: nn.functional.cross_entropy(z_s.flatten(0, 1) / temperature, log_t.exp()),
    }
    return temperature**2 * values[name]()


def distillation(
    teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int], ids_BT: Tensor, loss: LossSpec
) -> dict[str, Tensor]:
    """The terms of IteRABRe §3.2 with a weight, the next token's cross-entropy, and their sum as `loss`.

    H of the student's last block is `output_hidden_states[-1]`; the teacher's goes through its final norm.
    """
    inputs = {"output_attentions": True} if loss.attention else {}
    with torch.no_grad():
        hidden_t, out_t = run(teacher, ids_BT, output_hidden_states=True, **inputs)
    hidden_s, out_s = run(student, ids_BT, output_hidden_states=True, **inputs)
    compared_t = [hidden_t[k] for k in kept] if loss.hidden else []
    if loss.hidden and loss.last_hidden_state == "after_norm":
        hidden_s[-1] = out_s.hidden_states[-1]
        ends_alike = kept[-1] == len(hidden_t) - 1
        compared_t[-1] = out_t.hidden_states[-1] if ends_alike else _normed(teacher, compared_t[-1])
    if loss.hidden_layers == "last":
        hidden_s, compared_t = [out_s.hidden_states[-1]], [out_t.hidden_states[-1]]
    mse, terms = nn.functional.mse_loss, {}
    if loss.hidden:
        scale = lambda h: h.square().mean(-1) if loss.hidden_scale == "normalised" else 1.0  # noqa: E731
        pairs = zip(hidden_s, compared_t, strict=True)
        terms["hidden"] = sum(((s - t).square().mean(-1) / scale(t)).mean() for s, t in pairs)
    if loss.attention:
        terms["attention"] = sum(mse(out_s.attentions[i], out_t.attentions[k]) for i, k in enumerate(kept))
    if loss.logits:
        terms["logits"] = logit_value(loss.logit_loss, out_s.logits, out_t.logits, loss.temperature)
    if loss.next_token:
        logits_NV, next_N = out_s.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
        # Divided by all tokens, as the other terms are, though the last of a row has none to predict.
        terms["next_token"] = nn.functional.cross_entropy(logits_NV, next_N, reduction="sum") / ids_BT.numel()
    terms = {name: value.float() for name, value in terms.items()}
    terms["loss"] = sum(getattr(loss, name) * value for name, value in terms.items())
    return terms


def _normed(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """The final norm of a Llama or its like."""
    return model.model.norm(hidden_BTD)


def assert_same_gradients(pair: TeacherStudent, student: PreTrainedModel, tolerance: float = 1e-5) -> None:
    """Every trained parameter of the student's blocks: |g − g'| ≤ tolerance |g'|."""
    blocks, compared = find_layers(pair.student).modules, 0
    for layer, block in zip(pair.student_layers, find_layers(student).modules, strict=True):
        mine = dict(blocks[layer].named_parameters())
        for name, parameter in block.named_parameters():
            if parameter.requires_grad and (parameter.grad is not None or mine[name].grad is not None):
                apart = (mine[name].grad - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-30)
                assert float(apart) <= tolerance, (layer, name, float(apart))
                compared += 1
    assert compared
