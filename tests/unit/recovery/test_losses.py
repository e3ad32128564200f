"""Losses against their plain definitions, loop by loop."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from actors.data import TopK
from actors.errors import RequestError
from actors.recovery.losses.cross_entropy import next_token_cross_entropy
from actors.recovery.losses.layer_losses import attention_mse, hidden_mse
from actors.recovery.losses.logit_losses import (
    LOGIT_LOSSES,
    NO_TARGET,
    check_topk,
    chunked_logit_loss,
    find_logit_loss,
    gram_matrix,
    logit_mse_from_hidden,
)
from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights

B, T, D, H, V = 4, 5, 8, 3, 37
LENGTHS = (5, 3, 1, 4)
"""Real tokens of each sequence: micro-batches that count unequal numbers of tokens."""


class LinearHead:
    """z = W h, W frozen or trained."""

    def __init__(self, weight_VD: Tensor):
        self.weight_VD = weight_VD
        self.frozen = not weight_VD.requires_grad

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight_VD.T


class Tensors:
    """Hidden states, a head and attention matrices of student and teacher, and next ids."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student_BTD = torch.randn(B, T, D, generator=generator).requires_grad_()
        self.teacher_BTD = torch.randn(B, T, D, generator=generator)
        self.head_VD = torch.randn(V, D, generator=generator)
        self.student_BHTT = torch.rand(B, H, T, T, generator=generator).requires_grad_()
        self.teacher_BHTT = torch.rand(B, H, T, T, generator=generator)
        self.next_BT = torch.randint(0, V, (B, T), generator=generator)


Term = Callable[[Tensors, slice, TokenWeights], Tensor]


def _logits(name: str, temperature: float = 1.0) -> Term:
    def term(t: Tensors, rows: slice, weights: TokenWeights) -> Tensor:
        head = LinearHead(t.head_VD)
        distance = find_logit_loss(name, temperature)
        return chunked_logit_loss(
            t.student_BTD[rows], t.teacher_BTD[rows], (head, head), distance, weights, chunk_tokens=3
        )[0]

    return term


TERMS: dict[str, Term] = {
    "hidden": lambda t, rows, weights: hidden_mse(t.student_BTD[rows], t.teacher_BTD[rows], weights),
    "normalised": lambda t, rows, weights: hidden_mse(
        t.student_BTD[rows], t.teacher_BTD[rows], weights, normalised=True
    ),
    "attention": lambda t, rows, weights: attention_mse(
        t.student_BHTT[rows], t.teacher_BHTT[rows], weights, mask()[rows]
    ),
    "gram": lambda t, rows, weights: logit_mse_from_hidden(
        t.student_BTD[rows], t.teacher_BTD[rows], gram_matrix(t.head_VD), weights
    ),
    "causal_lm": lambda t, rows, weights: next_token_cross_entropy(
        t.student_BTD[rows], t.next_BT[rows], LinearHead(t.head_VD), weights, chunk_tokens=3
    ),
    **{name: _logits(name, temperature=2.0) for name in LOGIT_LOSSES},
}


def mask() -> Tensor:
    """1 for tokens, 0 for padding [B, T]."""
    return (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).float()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_batch(name: str, size: int) -> None:
    whole, cut = Tensors(), Tensors()
    want = TERMS[name](whole, slice(None), TokenWeights(mask()))
    want.backward()
    micro = B // size
    share = float(mask().sum()) / micro
    got = torch.zeros(())
    for start in range(0, B, size):
        rows = slice(start, start + size)
        loss = TERMS[name](cut, rows, TokenWeights(mask()[rows], share)) / micro
        loss.backward()
        got = got + loss.detach()
    torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=0)
    for mine, theirs in ((cut.student_BTD, whole.student_BTD), (cut.student_BHTT, whole.student_BHTT)):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", TERMS)
def test_padding_neither_counts_nor_gets_a_gradient(name: str) -> None:
    t, other = Tensors(), Tensors()
    padding = mask() == 0
    with torch.no_grad():
        other.student_BTD[padding] += 100
        other.teacher_BTD[padding] -= 100
        for matrices in (other.student_BHTT, other.teacher_BHTT):
            matrices += 100 * torch.rand(B, H, T, T) * (padding[:, None, None] | padding[:, None, :, None])
    value = TERMS[name](t, slice(None), TokenWeights(mask()))
    torch.testing.assert_close(TERMS[name](other, slice(None), TokenWeights(mask())), value)
    value.backward()
    if t.student_BTD.grad is not None:
        assert not t.student_BTD.grad[padding].any()
        assert t.student_BTD.grad[~padding].any()


@pytest.mark.parametrize("name", TERMS)
def test_no_token_at_all_is_a_loss_of_zero(name: str) -> None:
    t = Tensors()
    value = TERMS[name](t, slice(None), TokenWeights(torch.zeros(B, T)))
    value.backward()
    assert float(value.detach()) == 0.0


def test_hidden_mse_is_the_mean_over_tokens_and_features() -> None:
    t = Tensors()
    torch.testing.assert_close(
        hidden_mse(t.student_BTD, t.teacher_BTD), mse_loss(t.student_BTD, t.teacher_BTD)
    )
    real = mask().bool()
    want = mse_loss(t.student_BTD[real], t.teacher_BTD[real])
    torch.testing.assert_close(hidden_mse(t.student_BTD, t.teacher_BTD, TokenWeights(mask())), want)


def test_the_normalised_hidden_error_is_relative_to_the_teachers_state_token_by_token() -> None:
    t = Tensors()
    tokens = [(b, q) for b in range(B) for q in range(LENGTHS[b])]
    apart = [
        (t.student_BTD[i] - t.teacher_BTD[i]).square().sum() / t.teacher_BTD[i].square().sum() for i in tokens
    ]
    got = hidden_mse(t.student_BTD, t.teacher_BTD, TokenWeights(mask()), normalised=True)
    torch.testing.assert_close(got, torch.stack(apart).mean())
    # Neither model's scale matters: a block whose states are a hundred times as large weighs the same.
    scaled = hidden_mse(100 * t.student_BTD, 100 * t.teacher_BTD, TokenWeights(mask()), normalised=True)
    torch.testing.assert_close(scaled, got)


def test_attention_mse_is_the_mean_over_queries_of_the_mean_over_heads_and_real_keys() -> None:
    t = Tensors()
    squares = (t.student_BHTT - t.teacher_BHTT).detach() ** 2
    torch.testing.assert_close(attention_mse(t.student_BHTT, t.teacher_BHTT).detach(), squares.mean())
    of_queries = [squares[b, :, q, : LENGTHS[b]].mean() for b in range(B) for q in range(LENGTHS[b])]
    got = attention_mse(t.student_BHTT, t.teacher_BHTT, TokenWeights(mask()), mask())
    torch.testing.assert_close(got.detach(), torch.stack(of_queries).mean())


def _plain_logit_loss(name: str, z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """One token's value, by probabilities and sums."""
    p_s, p_t = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (z_s, z_t))
    middle, mix = (p_s + p_t) / 2, lambda p, q: 0.1 * p + 0.9 * q
    kl = lambda p, q: (p * torch.log(p / q)).sum()  # noqa: E731
    scale = temperature**2
    return {
        "mse": ((z_s - z_t) ** 2).sum() / V,
        "forward_kl": scale * kl(p_t, p_s),
        "reverse_kl": scale * kl(p_s, p_t),
        "jsd": scale * (kl(p_t, middle) + kl(p_s, middle)) / 2,
        "skew_kl": scale * kl(p_t, mix(p_s, p_t)),
        "skew_reverse_kl": scale * kl(p_s, mix(p_t, p_s)),
        "cross_entropy": -scale * (p_t * torch.log(p_s)).sum(),
    }[name]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 256])
def test_logit_losses_and_their_gradients(name: str, temperature: float, chunk_tokens: int) -> None:
    t = Tensors()
    z_s, z_t = (hidden @ t.head_VD.T for hidden in (t.student_BTD, t.teacher_BTD))
    tokens = [(b, q) for b in range(B) for q in range(LENGTHS[b])]
    want = torch.stack([_plain_logit_loss(name, z_s[i], z_t[i], temperature) for i in tokens]).mean()
    (want_gradient,) = torch.autograd.grad(want, t.student_BTD)
    head, distance = LinearHead(t.head_VD), find_logit_loss(name, temperature)
    got, _ = chunked_logit_loss(
        t.student_BTD,
        t.teacher_BTD,
        (head, head),
        distance,
        TokenWeights(mask()),
        chunk_tokens=chunk_tokens,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(3 * got, t.student_BTD)
    torch.testing.assert_close(gradient, 3 * want_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_one_pass_through_the_head_gives_distance_and_next_token_in_their_proportion(trained: bool) -> None:
    t, padding = Tensors(), mask() == 0
    head = LinearHead(t.head_VD.requires_grad_(trained))
    next_BT = t.next_BT.masked_fill(padding, NO_TARGET)
    next_BT[0, 3] = NO_TARGET
    tokens = [(b, q) for b in range(B) for q in range(LENGTHS[b])]
    z_s, z_t = (hidden @ t.head_VD.T for hidden in (t.student_BTD, t.teacher_BTD))
    distance = torch.stack([_plain_logit_loss("forward_kl", z_s[i], z_t[i].detach(), 1.0) for i in tokens])
    likelihood = [cross_entropy(z_s[i], next_BT[i]) for i in tokens if next_BT[i] != NO_TARGET]
    want = torch.stack([distance.sum(), torch.stack(likelihood).sum()]) / len(tokens)
    total, parts = chunked_logit_loss(
        t.student_BTD,
        t.teacher_BTD,
        (head, head),
        find_logit_loss("forward_kl", 1.0),
        TokenWeights(mask()),
        (0.3, next_BT),
        chunk_tokens=3,
    )
    torch.testing.assert_close(parts, want.detach())
    torch.testing.assert_close(total, want[0] + 0.3 * want[1])
    inputs = [t.student_BTD, t.head_VD] if trained else [t.student_BTD]
    got = torch.autograd.grad(total, inputs, retain_graph=True)
    for mine, theirs in zip(got, torch.autograd.grad(want[0] + 0.3 * want[1], inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


PROBABILITY_LOSSES = [name for name, row in LOGIT_LOSSES.items() if row.compares_probabilities]


def _topk(t: Tensors, k: int) -> TopK:
    log_BTV = (t.teacher_BTD @ t.head_VD.T).log_softmax(-1)
    values_BTK, ids_BTK = log_BTV.topk(k)
    return TopK(ids_BTK, values_BTK)


@pytest.mark.parametrize("name", PROBABILITY_LOSSES)
@pytest.mark.parametrize("k", [5, V])
def test_the_most_likely_tokens_and_any_other_are_what_is_compared(name: str, k: int) -> None:
    """With K = V nothing is left over, and the loss is that of the whole vocabulary."""
    t = Tensors()
    topk, head = _topk(t, k), LinearHead(t.head_VD)
    p_BTV = (t.student_BTD @ t.head_VD.T).softmax(-1)
    values = []
    for i in [(b, q) for b in range(B) for q in range(LENGTHS[b])]:
        student, teacher = p_BTV[i][topk.ids_BTK[i]], topk.log_probabilities_BTK[i].exp()
        if k < V:
            student, teacher = (torch.cat([p, (1 - p.sum())[None]]) for p in (student, teacher))
        values.append(_plain_logit_loss(name, student.log(), teacher.log(), 1.0))
    want = torch.stack(values).mean()
    weights = TokenWeights(mask())
    got, _ = chunked_logit_loss(t.student_BTD, topk, (head, head), find_logit_loss(name, 1.0), weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    mine, theirs = (torch.autograd.grad(loss, t.student_BTD)[0] for loss in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "temperature"), [("mse", 1.0), ("forward_kl", 2.0)])
def test_what_top_k_probabilities_do_not_tell_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(RequestError, match="teacher_cache: hidden"):
        check_topk(name, temperature)


@pytest.mark.parametrize("weights", [ALL_TOKENS, TokenWeights(mask()), TokenWeights(mask(), 7.0)])
def test_the_gram_matrix_gives_the_logit_mse(weights: TokenWeights) -> None:
    t, head = Tensors(), LinearHead(Tensors().head_VD)
    through_logits, _ = chunked_logit_loss(
        t.student_BTD, t.teacher_BTD, (head, head), find_logit_loss("mse", 1.0), weights
    )
    through_gram = logit_mse_from_hidden(t.student_BTD, t.teacher_BTD, gram_matrix(t.head_VD), weights)
    torch.testing.assert_close(through_gram, through_logits, rtol=1e-5, atol=0)
    want, got = (torch.autograd.grad(loss, t.student_BTD)[0] for loss in (through_logits, through_gram))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", [False, True])
def test_causal_lm_is_the_mean_cross_entropy_with_a_frozen_and_a_trained_head(trained: bool) -> None:
    t = Tensors()
    weight_VD = t.head_VD.requires_grad_(trained)
    inputs = [t.student_BTD, weight_VD] if trained else [t.student_BTD]
    real = mask().bool()
    want = cross_entropy(t.student_BTD[real] @ weight_VD.T, t.next_BT[real])
    got = next_token_cross_entropy(
        t.student_BTD, t.next_BT, LinearHead(weight_VD), TokenWeights(mask()), chunk_tokens=3
    )
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True)
    for gradient, want_gradient in pairs:
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-7)


def test_a_wrong_name_or_temperature_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'forward'.*forward_kl"):
        find_logit_loss("forward", 1.0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RequestError, match="temperature"):
            find_logit_loss("jsd", temperature)
