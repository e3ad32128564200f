"""The lockstep distiller against two separate models, all hidden states and full logits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from actors.contracts import AdapterSpec, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import find_layers
from actors.recovery.adapters import attach_adapters
from actors.recovery.distillation import LockstepDistiller
from actors.recovery.pair import shared_pair
from tests.tiny_models import tiny_llama

KEPT = (0, 1, 3)
WEIGHTS = LossSpec(hidden=0.5, attention=3.0, logits=2.0)
SIZES = {"vocab_size": 300, "initializer_range": 0.2}
DECODER = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _from_config(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(4)[0],
    "llama-tied": lambda: tiny_llama(4, tie_word_embeddings=True)[0],
    "qwen2": lambda: _from_config(Qwen2Config(**DECODER)),
    "gpt2": lambda: _from_config(GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    # Soft-caps its logits, scales embeddings, alternates attention windows.
    "gemma2": lambda: _from_config(Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=2.0)),
}


def _spec(**adapter: object) -> RecoverySpec:
    return RecoverySpec(
        ModelRef(ModelSpec("source"), dropped=(2,)), TextSpec(), adapter=AdapterSpec(rank=4, **adapter)
    )


def _distiller(model: PreTrainedModel, weights: LossSpec = WEIGHTS, **adapter: object) -> LockstepDistiller:
    """A distiller whose adapters are no longer at zero, as after some training."""
    adapted = attach_adapters(model, _spec(**adapter), KEPT)
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return LockstepDistiller(shared_pair(adapted, KEPT), weights)


def _plain_terms(teacher: PreTrainedModel, student: PreTrainedModel, ids_BT: Tensor) -> dict[str, Tensor]:
    """The three terms by definition: two models, hooks on every block, eager attention, full logits."""
    runs = []
    for model in (teacher, student):
        hidden: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda _m, _i, out, into=hidden: into.append(out[0] if isinstance(out, tuple) else out)
            )
            for block in find_layers(model).modules
        ]
        output = model(ids_BT, output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        runs.append((hidden, output.attentions, output.logits))
    (t_hidden, t_attention, t_logits), (s_hidden, s_attention, s_logits) = runs
    mse = nn.functional.mse_loss
    return {
        "hidden": sum(mse(s_hidden[i], t_hidden[k].detach()) for i, k in enumerate(KEPT)),
        "attention": sum(mse(s_attention[i], t_attention[k].detach()) for i, k in enumerate(KEPT)),
        "logits": mse(s_logits, t_logits.detach()),
    }


def _separate_student(distiller: LockstepDistiller) -> PreTrainedModel:
    """A copy of the adapted model that simply has no block 2."""
    student = copy.deepcopy(distiller.pair.adapted).get_base_model()
    layers = find_layers(student)
    setattr(layers.parent, layers.attribute, nn.ModuleList(layers.modules[i] for i in KEPT))
    student.config.num_hidden_layers = len(KEPT)
    return student


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_those_of_two_separate_models(family: str) -> None:
    teacher = FAMILIES[family]()
    teacher.set_attn_implementation("eager")
    distiller = _distiller(copy.deepcopy(teacher))
    student = _separate_student(distiller)
    ids_BT = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(3))

    want = _plain_terms(teacher, student, ids_BT)
    loss = 0.5 * want["hidden"] + 3.0 * want["attention"] + 2.0 * want["logits"]
    loss.backward()
    got = distiller(TokenBatch(ids_BT))
    got["loss"].backward()

    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=0)
    torch.testing.assert_close(got["loss"], loss, rtol=1e-5, atol=0)
    assert (distiller._gram_DD is None) == (family == "gemma2")
    _assert_same_gradients(distiller, student)


def _assert_same_gradients(distiller: LockstepDistiller, student: PreTrainedModel) -> None:
    blocks = find_layers(distiller.pair.adapted.get_base_model()).modules
    compared = 0
    for position, source in enumerate(KEPT):
        mine = dict(blocks[source].named_parameters())
        for name, parameter in find_layers(student).modules[position].named_parameters():
            if not parameter.requires_grad:
                continue
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * scale)
            compared += 1
    assert compared == sum(p.requires_grad for p in distiller.parameters())


def test_an_untrained_adapter_leaves_the_student_to_the_frozen_weights() -> None:
    model, _ = tiny_llama(4)
    distiller = LockstepDistiller(
        shared_pair(attach_adapters(model, _spec(), (0, 1, 2, 3)), (0, 1, 2, 3)), WEIGHTS
    )
    terms = distiller(TokenBatch(torch.randint(0, 300, (2, 12))))
    assert {name: float(value) for name, value in terms.items()} == {
        "hidden": 0.0,
        "attention": 0.0,
        "logits": 0.0,
        "loss": 0.0,
    }


def test_terms_without_weight_are_not_computed_and_attention_stays_fused() -> None:
    model, _ = tiny_llama(4)
    distiller = _distiller(model, LossSpec(hidden=0, attention=0, logits=1))
    assert set(distiller(TokenBatch(torch.randint(0, 300, (1, 8))))) == {"logits", "loss"}
    assert model.config._attn_implementation == "sdpa"


def test_padding_changes_nothing() -> None:
    distiller = _distiller(tiny_llama(4)[0])
    ids_BT = torch.randint(3, 300, (1, 10))
    alone = distiller(TokenBatch(ids_BT))
    padded_BT = torch.cat([ids_BT, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask_BT = torch.tensor([[1] * 10 + [0] * 4])
    for name, value in distiller(TokenBatch(padded_BT, mask_BT)).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=0)


def test_dropout_is_the_students_alone() -> None:
    model = _from_config(
        GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    )
    distiller = _distiller(model, dropout=0.5)
    ids_BT = torch.randint(0, 300, (1, 8))
    still = distiller.eval()(TokenBatch(ids_BT))["loss"]
    assert float(distiller(TokenBatch(ids_BT))["loss"]) == float(still)
    assert float(distiller.train()(TokenBatch(ids_BT))["loss"]) != float(still)
    assert not model.base_model.drop.training


def test_a_family_without_attention_matrices_is_refused_by_the_terms_name() -> None:
    model = _from_config(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=4, state_size=4))
    adapted = attach_adapters(model, _spec(targets=("in_proj",)), KEPT)
    with pytest.raises(RequestError, match="attention"):
        LockstepDistiller(shared_pair(adapted, KEPT), LossSpec())


def test_no_term_at_all_is_refused() -> None:
    adapted = attach_adapters(tiny_llama(4)[0], _spec(), KEPT)
    with pytest.raises(RequestError, match="weight"):
        LockstepDistiller(shared_pair(adapted, KEPT), LossSpec(0, 0, 0))
