"""Losses against their plain definitions."""

import pytest
import torch

from actors.recovery.losses import attention_mse, gram_matrix, hidden_mse, logit_mse, logit_mse_from_hidden

B, T, D, H, V = 2, 5, 8, 3, 37


@pytest.fixture
def hidden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher hidden states [B, T, D] and a head [V, D]."""
    torch.manual_seed(0)
    return torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D), torch.randn(V, D)


def mask() -> torch.Tensor:
    """The second sequence ends after three tokens."""
    return torch.tensor([[1] * T, [1, 1, 1, 0, 0]])


def test_hidden_mse_is_the_mean_over_tokens_and_features(hidden: tuple) -> None:
    student, teacher, _ = hidden
    torch.testing.assert_close(hidden_mse(student, teacher), torch.nn.functional.mse_loss(student, teacher))


def test_padding_does_not_count(hidden: tuple) -> None:
    student, teacher, head = hidden
    real = mask().bool()
    want = torch.nn.functional.mse_loss(student[real], teacher[real])
    torch.testing.assert_close(hidden_mse(student, teacher, mask()), want)
    want = torch.nn.functional.mse_loss(student[real] @ head.T, teacher[real] @ head.T)
    gram = gram_matrix(head)
    torch.testing.assert_close(logit_mse_from_hidden(student - teacher, gram, mask()), want)
    torch.testing.assert_close(
        logit_mse(student, teacher, lambda h: h @ head.T, mask(), chunk_tokens=3), want
    )


def test_attention_mse_counts_only_pairs_of_real_tokens() -> None:
    torch.manual_seed(1)
    student, teacher = torch.rand(B, H, T, T), torch.rand(B, H, T, T)
    torch.testing.assert_close(attention_mse(student, teacher), ((student - teacher) ** 2).mean())
    pairs = [
        ((student[b, h, q, k] - teacher[b, h, q, k]) ** 2)
        for b in range(B)
        for h in range(H)
        for q in range(T)
        for k in range(T)
        if mask()[b, q] and mask()[b, k]
    ]
    torch.testing.assert_close(attention_mse(student, teacher, mask()), torch.stack(pairs).mean())


@pytest.mark.parametrize("chunk_tokens", [1, 4, 256])
def test_both_ways_to_the_logit_mse_agree_in_value_and_gradient(hidden: tuple, chunk_tokens: int) -> None:
    student, teacher, head = hidden
    want = torch.nn.functional.mse_loss(student @ head.T, teacher @ head.T)
    (want_gradient,) = torch.autograd.grad(want, student)
    through_gram = logit_mse_from_hidden(student - teacher, gram_matrix(head))
    chunked = logit_mse(student, teacher, lambda h: h @ head.T, chunk_tokens=chunk_tokens)
    for got in (through_gram, chunked):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got, student)[0], want_gradient, rtol=1e-5, atol=1e-7)
