"""Gather, weighted sums and their gradients against fp64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.kernels.device_kernels import DeviceKernels
from tests.kernels.triton import DEVICE

DIMS = st.sampled_from([1, 8, 20, 1100])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(0, 70), DIMS)
def test_rows_are_gathered(tokens: int, rows: int, dim: int) -> None:
    x, index = random(tokens, dim), torch.randint(tokens, (rows,), device=DEVICE)
    assert torch.equal(DeviceKernels.gather(x, index), x[index])
    assert torch.equal(DeviceKernels.gather(x, index, torch.float16), x[index].half())


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), max_size=20), DIMS, st.booleans())
def test_sums_of_any_number_of_rows(lengths: list[int], dim: int, weighted: bool) -> None:
    """Tokens without a row have 0."""
    rows = sum(lengths)
    values, ids = random(rows, dim), torch.randperm(rows).to(DEVICE)
    weight = random(rows, seed=1) if weighted else None
    length = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    found = DeviceKernels.weighted_sums(values, ids, length.cumsum(0) - length, weight, torch.float32, 0)
    token = torch.arange(len(lengths), device=DEVICE).repeat_interleave(length)
    scaled = values[ids].double() * (1 if weight is None else weight.double()[:, None])
    wanted = scaled.new_zeros(len(lengths), dim).index_add(0, token, scaled)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 20), st.sampled_from([1, 2, 4]), DIMS, st.booleans())
def test_sums_of_k_rows(tokens: int, k: int, dim: int, weighted: bool) -> None:
    values, ids = random(tokens * k, dim), torch.randperm(tokens * k).to(DEVICE)
    weight = random(tokens * k, seed=1) if weighted else None
    found = DeviceKernels.weighted_sums(values, ids, None, weight, torch.float32, k)
    scaled = values[ids].double() * (1 if weight is None else weight.double()[:, None])
    torch.testing.assert_close(found.double(), scaled.view(tokens, k, dim).sum(1), atol=1e-5, rtol=1e-5)


def test_16_bit_rows_are_summed_in_fp32() -> None:
    values = torch.tensor([[1.0], [2.0**-9], [-1.0]], dtype=torch.bfloat16, device=DEVICE)
    starts = torch.tensor([0], device=DEVICE)
    found = DeviceKernels.weighted_sums(values, torch.arange(3, device=DEVICE), starts, None, torch.bfloat16, 0)
    assert found.dtype == torch.bfloat16 and found.item() == 2.0**-9


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(0, 70), st.integers(0, 5), DIMS)
def test_gradients_of_values_and_weights(tokens: int, pairs: int, padding: int, dim: int) -> None:
    """Rows without a pair have the gradient 0."""
    rows = pairs + padding
    grad, values, weight = random(tokens, dim), random(rows, dim, seed=1), random(pairs, seed=2)
    token = torch.randint(tokens, (rows,), device=DEVICE)
    pair = torch.randperm(rows).clamp(max=pairs).to(DEVICE)
    found_values, found_weight = DeviceKernels.weighted_sums_grad(grad, values, weight, token, pair)
    padded = torch.cat([weight, weight.new_zeros(1)]).double()
    torch.testing.assert_close(found_values.double(), padded[pair][:, None] * grad[token].double())
    dots = (grad[token].double() * values.double()).sum(1)
    wanted = dots.new_zeros(pairs + 1).index_put((pair,), dots)[:pairs]
    torch.testing.assert_close(found_weight.double(), wanted, atol=1e-4, rtol=1e-5)
