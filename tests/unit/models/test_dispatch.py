"""Models that accelerate has dispatched compute the same scores and numbers, and stay dispatched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.evaluation.lm_eval.harness import evaluate_tasks
from actors.evaluation.lm_eval.language_models import local_responder
from actors.evaluation.lm_eval.loglikelihood import LikelihoodModel, Scored
from actors.evaluation.perplexity import token_perplexity
from actors.evaluation.probes.decoding import respond
from actors.models import LayerwisePass, find_layers
from actors.models.head import LogitHead
from actors.models.offloading.dispatch import input_device, loaded_weights
from actors.scoring import score_layers
from tests.support.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SEQUENCES = list(tiny_ids(3))
Dispatch = Callable[[PreTrainedModel, Path], PreTrainedModel]


def _device_map(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """As transformers reads it with `device_map`: some blocks on disk."""
    model.save_pretrained(directory / "saved")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    where |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    return AutoModelForCausalLM.from_pretrained(
        directory / "saved", device_map=where, offload_folder=directory / "offload"
    ).eval()


DISPATCHES: dict[str, Dispatch] = {
    "cpu_offload": lambda model, _: cpu_offload(model, CPU),
    "disk_offload": lambda model, directory: disk_offload(model, directory / "offload", CPU),
    "hooks_alone": lambda model, _: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "device_map": _device_map,
}


@pytest.fixture(params=DISPATCHES)
def dispatched(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return DISPATCHES[request.param](tiny_model("llama"), tmp_path)


def _state(model: nn.Module) -> list[tuple[object, ...]]:
    """What accelerate put into each module, and where its weights are."""
    return [
        (id(getattr(m, "_hf_hook", None)), id(vars(m).get("forward")), getattr(m._hf_hook, "offload", None))
        if hasattr(m, "_hf_hook")
        else ()
        for m in model.modules()
    ] + [(name, parameter.device) for name, parameter in model.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize(
    "criterion",
    [
        "hidden_cosine",
        "perplexity",
        "kl",
        "block_influence",
        "angular_block",
        "bridge_residual",
        "taylor",
        "magnitude_l1",
    ],
)
def test_scores_are_those_of_the_plain_model(criterion: str, dispatched: PreTrainedModel) -> None:
    plain, before = tiny_model("llama"), _state(dispatched)
    expected = score_layers(plain, SEQUENCES, criterion)
    found = score_layers(dispatched, SEQUENCES, criterion)
    assert found == pytest.approx(expected, rel=1e-6)
    assert _state(dispatched) == before
    assert dispatched(tiny_ids()).logits.equal(plain(tiny_ids()).logits)


def test_evaluation_is_that_of_the_plain_model(dispatched: PreTrainedModel) -> None:
    plain, before = tiny_model("llama"), _state(dispatched)
    requests = [Scored(ids.tolist(), ids[-3:].tolist()) for ids in SEQUENCES]
    expected = LikelihoodModel(plain).loglikelihoods(requests)
    assert LikelihoodModel(dispatched).loglikelihoods(requests) == expected
    ids = tiny_ids(1, 60)[0]
    assert token_perplexity(dispatched, ids, 16) == token_perplexity(plain, ids, 16)
    assert _state(dispatched) == before


def test_texts_and_tasks_are_those_of_the_plain_model(dispatched: PreTrainedModel) -> None:
    plain, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ["The quick brown fox", "Ancient"]
    expected = respond(plain, tokenizer, prompts, 6)
    before = _state(dispatched)
    assert respond(dispatched, tokenizer, prompts, 6) == expected
    tasks = {"tasks": ["blimp_sample"], "limit": 6}
    assert evaluate_tasks(dispatched, tokenizer, **tasks) == evaluate_tasks(plain, tokenizer, **tasks)
    requests = [("The lazy dog", {"until": ["."], "max_gen_toks": 4})]
    answers = [local_responder(model, tokenizer)("generate_until", requests) for model in (dispatched, plain)]
    assert answers[0] == answers[1]
    assert _state(dispatched) == before


@torch.no_grad()
def test_hooks_outlive_a_failure(dispatched: PreTrainedModel) -> None:
    before, want = _state(dispatched), dispatched(tiny_ids()).logits
    handle = find_layers(dispatched).modules[3].register_forward_hook(_fail)
    for criterion in ("hidden_cosine", "taylor"):
        with pytest.raises(torch.OutOfMemoryError):
            score_layers(dispatched, SEQUENCES, criterion)
    handle.remove()
    handle = dispatched.lm_head.register_forward_hook(_fail)
    layerwise = LayerwisePass(dispatched, tiny_ids())
    with pytest.raises(torch.OutOfMemoryError):
        LogitHead(dispatched)(layerwise.hidden_BTD)
    handle.remove()
    assert _state(dispatched) == before
    assert dispatched(tiny_ids()).logits.equal(want)


def _fail(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_a_forward_of_the_modules_own_stays() -> None:
    """Whatever replaced it: a hook, a compiled or a faster version."""
    model = tiny_model("llama")
    block, backbone = find_layers(model).modules[2], model.model
    own = {module: module.forward for module in (block, backbone)}
    for module, forward in own.items():
        module.forward = forward
    LogitHead(model)(LayerwisePass(model, tiny_ids()).hidden_BTD)
    assert all(vars(module)["forward"] == forward for module, forward in own.items())


def test_weights_are_there_while_they_are_needed(tmp_path: Path) -> None:
    plain, model = tiny_model("llama"), cpu_offload(tiny_model("llama"), CPU)
    assert (model.device.type, input_device(model), input_device(plain)) == ("meta", CPU, CPU)
    block = find_layers(model).modules[1]
    with loaded_weights(block):
        for found, expected in zip(
            block.parameters(), find_layers(plain).modules[1].parameters(), strict=True
        ):
            assert found.equal(expected)
    assert all(parameter.is_meta for parameter in model.parameters())
