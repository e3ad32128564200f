"""The next-token loss in chunks against torch's cross_entropy on the whole logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from actors.models.next_token import next_token_nats

B, T, D, V = 3, 11, 8, 50
SEEDED = torch.Generator().manual_seed(0)
HIDDEN_BTD = torch.randn(B, T, D, generator=SEEDED)
HEAD_VD = torch.randn(V, D, generator=SEEDED)
TARGETS_BT = torch.randint(0, V, (B, T), generator=SEEDED)


@pytest.mark.parametrize("at_once", [None, 1, 4, 11, 100])
def test_equals_cross_entropy_on_plain_logits(at_once: int | None) -> None:
    logits_BVT = (HIDDEN_BTD @ HEAD_VD.T).transpose(1, 2)
    want_BT = cross_entropy(logits_BVT, TARGETS_BT, reduction="none")
    seen: list[int] = []

    def logits_of(tokens_K: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens_K))
        return HIDDEN_BTD[:, tokens_K] @ HEAD_VD.T

    got_BT = next_token_nats(logits_of, TARGETS_BT, at_once)
    assert got_BT.dtype == torch.float32
    torch.testing.assert_close(got_BT, want_BT, rtol=1e-6, atol=1e-6)
    assert max(seen) == min(at_once or T, T)
    assert sum(seen) == T


def test_bfloat16_logits_are_taken_to_float32_first() -> None:
    logits_BTV = (HIDDEN_BTD @ HEAD_VD.T).bfloat16()
    want_BT = -logits_BTV.double().log_softmax(-1).gather(-1, TARGETS_BT[..., None])[..., 0]
    got_BT = next_token_nats(lambda tokens_K: logits_BTV[:, tokens_K], TARGETS_BT, 4)
    torch.testing.assert_close(got_BT.double(), want_BT, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_cross_entropy() -> None:
    ours, theirs = (HIDDEN_BTD.clone().requires_grad_() for _ in range(2))
    next_token_nats(lambda tokens_K: ours[:, tokens_K] @ HEAD_VD.T, TARGETS_BT, 4).sum().backward()
    cross_entropy((theirs @ HEAD_VD.T).flatten(0, 1), TARGETS_BT.flatten(), reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_token_has_no_loss() -> None:
    def never(_tokens_K: torch.Tensor) -> torch.Tensor:
        pytest.fail("the head ran")

    assert next_token_nats(never, TARGETS_BT[:, :0], 4).shape == (B, 0)
