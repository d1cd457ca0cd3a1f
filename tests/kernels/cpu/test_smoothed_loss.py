"""The C kernel of label-smoothed cross-entropy against the definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu.smoothed_loss import is_supported, smoothed_loss_

pytestmark = pytest.mark.skipif(
    not is_supported(torch.zeros(1, dtype=torch.bfloat16)), reason="needs a CPU with AMX, Linux, and a C compiler"
)
IGNORE = 1


def logits_and_targets(
    rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def reference(logits: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    log_p = logits.double().log_softmax(1)
    real = target.ne(IGNORE)
    nll, smooth = -log_p.gather(1, target[:, None]).squeeze(1) * real, -log_p.sum(1) * real
    q = torch.full_like(log_p, eps / max(logits.shape[1] - 1, 1)).scatter_(1, target[:, None], 1 - eps)
    return nll, smooth, (log_p.exp() - q) * real[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(2, 140),
    eps=st.sampled_from([0.0, 0.1, 0.7]),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_definition(
    dtype: torch.dtype, rows: int, vocabulary: int, eps: float, spread: float, seed: int
) -> None:
    logits, target = logits_and_targets(rows, vocabulary, seed, spread, dtype)
    nll, smooth, gradient = reference(logits, target, eps)
    untouched = logits.clone()
    for got in (
        smoothed_loss_(untouched, target, eps, IGNORE, False),
        smoothed_loss_(logits, target, eps, IGNORE, True),
    ):
        torch.testing.assert_close(got[0].double(), nll, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(got[1].double(), smooth, rtol=1e-6, atol=1e-5 * vocabulary)
    torch.testing.assert_close(untouched, logits_and_targets(rows, vocabulary, seed, spread, dtype)[0], rtol=0, atol=0)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=5e-7)


def test_memory_next_to_the_rows_is_not_written() -> None:
    for vocabulary in (1, 31, 32, 33, 95):
        room = torch.full((5 * vocabulary + 128,), 7.0, dtype=torch.bfloat16)
        logits = room[64 : 64 + 5 * vocabulary].view(5, vocabulary).copy_(logits_and_targets(5, vocabulary)[0])
        smoothed_loss_(logits, torch.zeros(5, dtype=torch.int64), 0.1, IGNORE, True)
        assert bool((room[:64] == 7).all()) and bool((room[-64:] == 7).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 31, 40])
def test_what_is_not_finite_stays_so(value: float, place: int) -> None:
    logits, target = logits_and_targets(3, 41)
    logits[1, place] = value
    target[:] = 5
    nll, smooth = smoothed_loss_(logits, target, 0.1, IGNORE, True)
    assert nll.isfinite().tolist() == smooth.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_a_target_with_probability_zero_has_its_whole_loss() -> None:
    nll, _ = smoothed_loss_(torch.tensor([[200.0, 0.0, -200.0]]).bfloat16(), torch.tensor([2]), 0.0, IGNORE, False)
    assert nll.tolist() == [400.0]


def test_threads_give_the_same_bits() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, target = logits_and_targets(300, 8000)
            found.append((*smoothed_loss_(logits, target, 0.1, IGNORE, True), logits))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_unusable_arguments_are_refused() -> None:
    logits, target = logits_and_targets(4, 50)
    for bad in (target.int(), target[:3], target + 50, target.neg() - 1):
        with pytest.raises(ValueError, match="target"):
            smoothed_loss_(logits, bad, 0.1, IGNORE, True)
    for unusable in (logits.double(), logits.t().contiguous().t()):
        with pytest.raises(ValueError, match="contiguous bfloat16"):
            smoothed_loss_(unusable, target, 0.1, IGNORE, True)
