"""Kernels for rows of bf16 against plain formulas, in any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu import segment_sum, thread_pool

pytestmark = pytest.mark.skipif(
    not segment_sum.is_supported(torch.zeros(1, dtype=torch.bfloat16)),
    reason="no matrix units (AMX) here, or no C compiler",
)
EPS = torch.finfo(torch.bfloat16).eps


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 150), st.booleans(), st.integers(0, 99))
def test_weighted_sums(sizes: list[int], dim: int, weighted: bool, seed: int) -> None:
    """Bags of any size, none included, over rows in any order."""
    total, count = sum(sizes), torch.tensor(sizes)
    values = draw(seed, max(total, 1), dim)
    ids = torch.randperm(values.shape[0], generator=torch.Generator().manual_seed(seed))[:total]
    weight = draw(seed + 1, total).float() + 2**-12 if weighted else None
    found = segment_sum.weighted_sums(values, ids, count.cumsum(0) - count, weight)
    rows = values.double()[ids] * (1 if weight is None else weight.double()[:, None])
    bag = torch.arange(len(sizes)).repeat_interleave(count)
    wanted = torch.zeros(len(sizes), dim, dtype=torch.float64).index_add(0, bag, rows)
    largest = torch.zeros_like(wanted).index_add(0, bag, rows.abs())
    assert ((found - wanted).abs() <= EPS / 2 * wanted.abs() + 1e-6 * largest).all()


def test_one_row_each() -> None:
    values, ids, weight = draw(0, 9, 40), torch.randperm(9), torch.rand(9)
    found = segment_sum.weighted_sums(values, ids, None, weight)
    assert torch.equal(found, (weight[:, None] * values[ids].float()).to(torch.bfloat16))


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 4), st.integers(1, 150), st.integers(0, 99))
def test_weighted_sums_grad(tokens: list[int], padding: int, dim: int, seed: int) -> None:
    """Rows in any order; content and token of padding rows are not used."""
    pairs, total = len(tokens), len(tokens) + padding
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    pair = order.clamp(max=pairs)
    token = torch.tensor([*tokens, 0], dtype=torch.int64)[pair]
    grad, values, weight = draw(seed, 4, dim), draw(seed + 1, total, dim), draw(seed + 2, pairs).float()
    values[pair == pairs] = float("nan")
    by_values, by_weight = segment_sum.weighted_sums_grad(grad, values, weight, token, pair)
    scale = torch.cat([weight, weight.new_zeros(1)])[pair]
    torch.testing.assert_close(by_values, (scale[:, None] * grad.float()[token]).to(torch.bfloat16), rtol=0, atol=0)
    rows = order.argsort()[:pairs]
    products = grad.double()[token[rows]] * values.double()[rows]
    assert ((by_weight - products.sum(1)).abs() <= 1e-5 * products.abs().sum(1)).all()


def test_nan_and_infinity_pass_through() -> None:
    """NaN and infinity pass through, and what is too large becomes infinite."""
    row = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.3e38, 0.0]]).to(torch.bfloat16)
    one = torch.zeros(1, dtype=torch.int64)
    twice = segment_sum.weighted_sums(row, one, one, torch.tensor([2.0]))
    torch.testing.assert_close(twice, row * 2, rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads() -> None:
    values, before = draw(0, 20_000, 128), torch.get_num_threads()
    rows, starts, weight = torch.arange(20_000), torch.arange(0, 20_000, 2), torch.rand(20_000)
    grad, token, outcomes = draw(1, 10_000, 128), rows // 2, []
    assert segment_sum._COST * values.numel() > thread_pool._MIN_PARALLEL_FLOPS
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        sums = segment_sum.weighted_sums(values, rows, starts, weight)
        outcomes.append((sums, *segment_sum.weighted_sums_grad(grad, values, weight, token, rows)))
    torch.set_num_threads(before)
    for single, *others in zip(*outcomes, strict=True):
        assert all(torch.equal(single, other) for other in others)


def test_other_ids_are_refused() -> None:
    values, ids = draw(0, 2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="int32"):
        segment_sum.weighted_sums(values, ids.int(), ids, None)
    with pytest.raises(ValueError, match="int32"):
        segment_sum.weighted_sums_grad(values, values, torch.ones(2), ids.int(), ids)
