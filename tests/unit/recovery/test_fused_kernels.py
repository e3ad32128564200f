"""liger-kernel's fused divergences against the chunked ones: reference on the CPU, kernel on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from actors.recovery.losses import fused_kernels
from actors.recovery.losses.fused_kernels import BETAS, fused_heads, fused_logit_loss
from actors.recovery.losses.lm_head import LMHead
from actors.recovery.losses.logit_losses import chunked_logit_loss, find_logit_loss
from actors.recovery.losses.token_weights import TokenWeights
from tests.support.tiny_models import tiny_llama

B, T, D, V = 3, 5, 32, 300


def documented(
    student_ND: Tensor, ours_VD: Tensor, teacher_ND: Tensor, theirs_VD: Tensor, *options: object
) -> Tensor:
    """What liger-kernel's documentation says its function computes, with whole logits."""
    labels, beta, _, temperature = options
    assert labels is None
    log_s = (student_ND @ ours_VD.T / temperature).log_softmax(-1)
    log_t = (teacher_ND @ theirs_VD.T / temperature).log_softmax(-1)
    kl = lambda q, p: nn.functional.kl_div(q, p, log_target=True, reduction="sum")  # noqa: E731
    if beta in (0.0, 1.0):
        total = kl(log_s, log_t) if beta == 0.0 else kl(log_t, log_s)
    else:
        mean = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        total = beta * kl(mean, log_t) + (1 - beta) * kl(mean, log_s)
    return total / len(student_ND)


def _assert_same(name: str, temperature: float, device: str = "cpu", tolerance: float = 1e-5) -> None:
    model = tiny_llama(2)[0].requires_grad_(False).to(device)
    head, generator = LMHead(model), torch.Generator().manual_seed(0)
    states = [torch.randn(B, T, D, generator=generator).to(device) for _ in range(2)]
    student_BTD, teacher_BTD = states[0].requires_grad_(), states[1]
    mask_BT = (torch.arange(T)[None] < torch.tensor([5, 2, 4])[:, None]).float().to(device)
    heads = fused_heads(name, head, head)
    assert heads is not None
    for weights in (TokenWeights(), TokenWeights(mask_BT), TokenWeights(mask_BT, 7.0)):
        got = fused_logit_loss(name, student_BTD, teacher_BTD, heads, temperature, weights)
        distance = find_logit_loss(name, temperature)
        want, _ = chunked_logit_loss(student_BTD, teacher_BTD, (head, head), distance, weights)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
        mine, theirs = (torch.autograd.grad(3 * loss, student_BTD)[0] for loss in (got, want))
        assert float((mine - theirs).norm()) <= 10 * tolerance * float(theirs.norm())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", BETAS)
def test_the_scale_and_the_tokens_that_count_are_those_of_the_chunked_loss(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_kernels, "fused_linear_jsd", lambda: documented)
    _assert_same(name, temperature)


@pytest.mark.parametrize("name", BETAS)
def test_the_chunked_loss_is_what_ligers_reference_gives(name: str) -> None:
    reference = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(6, V, generator=generator) for _ in range(2))
    want = reference.distillation_loss_fn(student_NV, teacher_NV, beta=BETAS[name])
    torch.testing.assert_close(find_logit_loss(name, 1.0)(student_NV, teacher_NV).sum(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on GPUs alone")
@pytest.mark.parametrize("name", BETAS)
def test_ligers_kernel_gives_the_chunked_loss(name: str) -> None:
    pytest.importorskip("liger_kernel")
    _assert_same(name, 2.0, "cuda", 1e-3)


def test_without_a_gpu_no_kernel_is_used() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    head = LMHead(tiny_llama(2)[0].requires_grad_(False))
    assert fused_heads("forward_kl", head, head) is None
