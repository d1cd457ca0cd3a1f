"""Label-smoothed cross-entropy, alone and fused with the vocabulary product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cross_entropy import fused_label_smoothed_nll, label_smoothed_nll

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
IGNORE = 1


def plain(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """fairseq's definition, term by term."""
    log_p = F.log_softmax(x @ weight.t(), dim=1)
    real = target.ne(IGNORE)
    nll = -log_p.gather(1, target[:, None]).squeeze(1)[real].sum()
    smooth = -log_p.sum(1)[real].sum()
    each = eps / (weight.shape[0] - 1)
    return (1 - eps - each) * nll + each * smooth, nll


def separate(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return label_smoothed_nll(x @ weight.t(), target, eps, IGNORE)


def fused(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fused_label_smoothed_nll(x, weight, target, eps, IGNORE, chunk_rows=3)


def numbers(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    return x, weight, torch.randint(0, 11, (rows,), generator=generator)


@pytest.mark.parametrize("loss", [separate, fused])
@given(rows=st.integers(0, 9), eps=st.sampled_from([0.0, 0.1, 0.7]), seed=st.integers(0, 99))
def test_value_and_gradients_are_those_of_the_definition(loss: Loss, rows: int, eps: float, seed: int) -> None:
    x, weight, target = numbers(rows, seed)
    results = []
    for function in (plain, loss):
        total, nll = function(x, weight, target, eps)
        gradients = torch.autograd.grad(3 * total, (x, weight))
        results.append((total.detach(), nll.detach(), *gradients))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    x, weight, target = numbers(7)
    assert torch.autograd.gradcheck(lambda a, b: fused(a, b, target, 0.1)[0], (x, weight))


def test_fairseqs_own_function_gives_the_same() -> None:
    from moe_train.fairseq_compat import apply

    apply()
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    x, weight, target = numbers(9)
    expected = label_smoothed_nll_loss(F.log_softmax(x @ weight.t(), 1), target, 0.1, ignore_index=IGNORE)
    for got, right in zip(fused(x, weight, target, 0.1), expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("loss", [separate, fused])
def test_a_hopeless_target_costs_what_it_should(loss: Loss) -> None:
    """Its probability is 0 in fp32, its logarithm is not."""
    x, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [0.0], [-1.0]])
    total, nll = loss(x, weight, torch.tensor([2]), 0.0)
    total.backward()
    assert nll == 400.0 and x.grad == 2.0


@pytest.mark.parametrize("loss", [separate, fused])
def test_sixteen_bit_scores_are_summed_in_fp32(loss: Loss) -> None:
    x, weight, target = numbers(8)
    total, nll = loss(x.bfloat16(), weight.bfloat16(), target, 0.1)
    assert total.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(total.double(), plain(x, weight, target, 0.1)[0], rtol=0.02, atol=0)


def test_autocast_gives_full_precision_gradients_to_the_parameters() -> None:
    x, weight, target = (t.detach().float() for t in numbers(8))
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = fused_label_smoothed_nll(x, weight, target.long(), 0.1)
    total.backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_scores_are_held_for_a_chunk_of_rows_only() -> None:
    """The point of fusing: memory for 16 rows at a time, not for all."""
    rows, vocabulary, largest = 512, 4096, 0
    x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fused_label_smoothed_nll(x, weight, torch.zeros(rows).long(), 0.1, chunk_rows=16)[0].backward()
    for event in profile.events():
        largest = max(largest, event.self_cpu_memory_usage)
    assert largest <= 16 * vocabulary * 4 * 2 < rows * vocabulary * 4 / 4


def test_it_refuses_a_second_backward() -> None:
    x, weight, target = numbers(3)
    total, _ = separate(x, weight, target, 0.1)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()
