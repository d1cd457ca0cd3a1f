"""Softmax, choices and counts against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.kernels.device_kernels import DeviceKernels
from moe_train.routing.types import count_choices
from tests.kernels.triton import DEVICE

softmax_top_k = DeviceKernels.softmax_top_k


@settings(max_examples=15)
@given(st.integers(0, 70), st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_choices_weights_and_gradients(tokens: int, experts: int, k: int, seed: int) -> None:
    k = min(k, experts)
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, device=DEVICE, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    probabilities, weights, choices, counts = softmax_top_k(logits, k)
    wanted = torch.softmax(wide, -1)
    best = wanted.topk(k)
    torch.testing.assert_close(probabilities.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.double(), best.values, atol=1e-6, rtol=1e-5)
    assert torch.equal(choices, best.indices) and torch.equal(counts, count_choices(choices, experts))
    grad_p, grad_w = torch.randn_like(probabilities), torch.randn_like(weights)
    (found,) = torch.autograd.grad((probabilities * grad_p).sum() + (weights * grad_w).sum(), logits)
    (exact,) = torch.autograd.grad((wanted * grad_p).sum() + (best.values * grad_w).sum(), wide)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(used: int) -> None:
    logits = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(softmax_top_k(logits, 2)[used].square().sum(), logits)
    exact = torch.softmax(logits, -1) if used == 0 else torch.softmax(logits, -1).topk(2).values
    torch.testing.assert_close(found, torch.autograd.grad(exact.square().sum(), logits)[0])


def test_equal_probabilities_and_nans_choose_the_first_experts() -> None:
    """An index outside of the experts would be written through, so NaN has to be one of them, as in torch."""
    logits = torch.zeros(3, 5, device=DEVICE)
    logits[1] = float("nan")
    logits[2, 3] = float("inf")
    choices, counts = softmax_top_k(logits, 2)[2:]
    assert choices.tolist() == [[0, 1], [0, 1], [0, 1]] and counts.sum().item() == 6


def test_a_call_repeated_gives_the_same_bits() -> None:
    logits = torch.randn(50, 6, device=DEVICE)
    for first, second in zip(softmax_top_k(logits, 2), softmax_top_k(logits, 2), strict=True):
        assert torch.equal(first, second)
