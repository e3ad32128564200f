"""Isolation of documents that share a row: which models keep it."""

from pathlib import Path

import pytest
import torch

from actors.contracts import AdapterSpec, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch, cut_into_blocks
from actors.errors import RequestError
from actors.recovery.distillation.teacher_student import load_teacher_student
from actors.recovery.objectives import find_objective
from actors.recovery.training.document_isolation import (
    check_document_isolation,
    set_attention,
    wants_one_row,
)
from tests.support.decoder_zoo import tiny_decoder
from tests.support.packed_data import packed
from tests.support.tiny_models import save_tiny, tiny_llama, tiny_model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "olmo3", "mixtral"])
def test_attention_goes_by_positions(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    check_document_isolation(model)


@pytest.mark.parametrize("family", ["bloom", "mamba", "rwkv"])
def test_a_family_that_would_carry_one_document_into_the_next_is_refused(family: str) -> None:
    with pytest.raises(RequestError, match=rf"'{family}'.*recovery\.packing"):
        check_document_isolation(tiny_decoder(family))


@pytest.mark.parametrize("objective", ["kd", "healing"])
def test_rows_put_end_to_end_give_the_same_loss_and_gradients(tmp_path: Path, objective: str) -> None:
    """Blocks of documents, and padded rows of unequal length, without any token of one seen by another."""
    path = save_tiny(tmp_path / "model")
    spec = RecoverySpec(
        model=ModelRef(ModelSpec(path), (1,)),
        data=TextSpec(),
        objective=objective,
        adapter=AdapterSpec(rank=4),
        loss=LossSpec(attention=0.0, logit_loss="forward_kl"),
        packing="documents",
    )
    documents = [[i + 5 for i in range(n)] for n in (7, 20, 3, 11, 9, 14)]
    batch = packed(cut_into_blocks(documents, 16, isolated=True)).batch(torch.tensor([0, 1, 3]))
    mask_BT = torch.ones_like(batch.input_ids_BT)
    mask_BT[1, 12:] = 0
    padded = TokenBatch(
        batch.input_ids_BT * mask_BT,
        mask_BT,
        batch.targets_BT * mask_BT,
        batch.position_ids_BT * mask_BT,
        30.0,
    )
    found = find_objective(objective)
    pair, _ = load_teacher_student(spec, found.has_teacher)
    module = found.build(pair, spec)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    results = []
    for form in (padded, padded.one_row()):
        module.zero_grad()
        loss = module(form)["loss"]
        loss.backward()
        gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        results.append((float(loss), gradients))
    assert padded.one_row().input_ids_BT.shape == (1, int(mask_BT.sum()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for of_rows, of_row in zip(results[0][1], results[1][1], strict=True):
        assert (of_row - of_rows).norm() < 1e-4 * of_rows.norm()


def test_an_implementation_is_set_or_refused() -> None:
    model, _ = tiny_llama()
    set_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    assert not wants_one_row(model)
    with pytest.raises(
        RequestError, match=r"attention_implementation: model type 'llama' cannot use 'flash_at"
    ):
        set_attention(model, "flash_attention_2")
    with pytest.raises(RequestError, match="cannot use 'fast'"):
        set_attention(model, "fast")
