"""All candidates in one walk, against running the whole model once for each."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.models import LayerwisePass
from actors.scoring.wavefront import candidate_hidden, last_hidden, layer_forwards
from tests.tiny_models import blocks_of, skipped, tiny_ids, tiny_model


@torch.no_grad()
def _whole_model(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    return model(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "qwen3_moe", "smollm3"])
def test_every_candidate_equals_a_run_of_its_own(family: str) -> None:
    model, ids_T = tiny_model(family), tiny_ids(1)[0]
    hidden = candidate_hidden(model, ids_T)
    assert hidden.shape == (7, 12, 32)
    torch.testing.assert_close(hidden[0], _whole_model(model, ids_T))
    for layer in range(6):
        with skipped(model, [layer]):
            torch.testing.assert_close(hidden[1 + layer], _whole_model(model, ids_T))


def test_last_hidden_is_after_the_final_norm() -> None:
    model, ids_T = tiny_model("llama"), tiny_ids(1)[0]
    torch.testing.assert_close(last_hidden(model, ids_T), _whole_model(model, ids_T))


def test_layer_forwards_are_counted_right() -> None:
    """Counted inside the blocks, where only real computation comes; the LM head never runs."""
    model, sequences = tiny_model("llama"), [tiny_ids(1, length)[0] for length in (12, 5, 1)]
    # The first pass over a family's blocks runs one block on one token to see what it returns.
    LayerwisePass(model, sequences[0][None])
    rows, heads = [], []
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda _mlp, inputs, _output: rows.append(len(inputs[0])))
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    for ids_T in sequences:
        candidate_hidden(model, ids_T)
    assert rows == [1, 2, 3, 4, 5, 6] * 3
    assert sum(rows) == 3 * 6 * 7 // 2 == layer_forwards(6, 3)
    assert not heads


def test_no_gradients_are_kept() -> None:
    assert not candidate_hidden(tiny_model("llama"), tiny_ids(1)[0]).requires_grad
