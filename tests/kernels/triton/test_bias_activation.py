"""Bias and activation against fp64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.kernels.device_kernels import DeviceKernels
from tests.kernels.triton import DEVICE

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@settings(max_examples=10)
@given(
    loads=st.lists(st.sampled_from([0, 1, 3, 70]), min_size=1, max_size=5),
    padding=st.integers(0, 3),
    width=st.sampled_from([1, 24, 150]),
    biased=st.booleans(),
)
def test_values_and_gradients(activation: Activation, loads: list[int], padding: int, width: int, biased: bool) -> None:
    """Experts without rows, and rows after the last expert, which take no part."""
    torch.manual_seed(width)
    real = sum(loads)
    ends = torch.tensor(loads, device=DEVICE).cumsum(0, dtype=torch.int32)
    row_expert = torch.searchsorted(ends, torch.arange(real + padding, device=DEVICE), right=True)
    rows = torch.randn(real + padding, width, device=DEVICE, requires_grad=True)
    bias = torch.randn(len(loads), width, device=DEVICE, requires_grad=True) if biased else None
    leaves = [rows] if bias is None else [rows, bias]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = DeviceKernels.bias_activation(rows, bias, row_expert, ends, activation)[:real]
    sums = wide[0][:real] + (wide[1][row_expert[:real]] if biased else 0)
    wanted = ACTIVATIONS[activation](sums)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(found)
    grads = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, wide, grad), strict=True)
    for ours, theirs in grads:
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


def test_nan_is_not_hidden_by_relu() -> None:
    rows = torch.tensor([[float("nan"), -1.0]], device=DEVICE)
    ends, expert = torch.tensor([1], dtype=torch.int32, device=DEVICE), torch.tensor([0], device=DEVICE)
    found = DeviceKernels.bias_activation(rows, None, expert, ends, "relu")
    assert found[0, 0].isnan() and found[0, 1] == 0
