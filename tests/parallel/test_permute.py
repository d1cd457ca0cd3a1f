"""Gather and weighted sums against plain formulas, in every type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.experts.row_plan import RowPlan, plan_rows
from moe_train.parallel.permute import RowIndex, permute_rows, unpermute_rows

EXPERTS, DIM = 3, 8


def planned(token: Tensor, num_tokens: int, align: int, seed: int) -> RowPlan:
    expert = torch.randint(EXPERTS, token.shape, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(expert, minlength=EXPERTS).tolist()
    return plan_rows(token, expert, num_tokens, EXPERTS, align, counts)


@given(st.lists(st.integers(0, 5), max_size=20), st.sampled_from([1, 4]), st.integers(0, 99))
def test_mixes_and_their_gradients(tokens: list[int], align: int, seed: int) -> None:
    """Any pairs, also tokens without a pair; the content of padding rows is not used."""
    token = torch.tensor(tokens, dtype=torch.int64)
    rows = planned(token, 6, align, seed).index
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows.row_token.shape[0], DIM, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(token.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(6, DIM, dtype=torch.float64, generator=generator)

    def plain(values: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros(6, DIM, dtype=torch.float64).index_add(0, token, weight[:, None] * values[rows.pair_row])

    ours, theirs = unpermute_rows(values, weight, rows), plain(values, weight)
    torch.testing.assert_close(ours, theirs)
    found, wanted = (torch.autograd.grad(y, (values, weight), grad) for y in (ours, theirs))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_rounded_in_16_bit_types(dtype: torch.dtype) -> None:
    """Two weights that would be the same in 16 bits: their difference is what remains of opposite values."""
    rows = RowIndex.of_tokens(torch.tensor([0, 0, 1]), 2)
    values = torch.tensor([[1.0], [-1.0], [1.0]], dtype=dtype)
    weight = torch.tensor([0.5 + 2**-13, 0.5, 0.25])
    mixed = unpermute_rows(values, weight, rows, dtype)
    assert mixed.dtype == dtype
    assert mixed.tolist() == [[2**-13], [0.25]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_mixes_are_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output, and the gradients of values and weights, are those of fp32 to within one rounding."""
    monkeypatch.setattr("moe_train.parallel.permute._CHUNK_ELEMENTS", 64 * 7)  # pieces of seven rows, and a shorter one
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(40).repeat_interleave(2)
    rows = planned(token, 40, 4, 0).index
    values = torch.randn(rows.row_token.shape[0], 64, generator=generator).to(dtype)
    weight, grad = torch.rand(80, generator=generator), torch.randn(40, 64, generator=generator).to(dtype)
    results = []
    for kind in (dtype, torch.float32):
        inputs = values.to(kind).requires_grad_(), weight.clone().requires_grad_()
        y = unpermute_rows(*inputs, rows, kind)
        results.append((y, *torch.autograd.grad(y, inputs, grad.to(kind))))
    for half, full in zip(*results, strict=True):
        rounding = torch.finfo(dtype).eps if half.dtype == dtype else 1e-6
        assert (half.float() - full).norm() <= rounding * full.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_pair(dtype: torch.dtype) -> None:
    rows = planned(torch.empty(0, dtype=torch.int64), 3, 4, 0).index
    values, weight = torch.empty(0, DIM, dtype=dtype, requires_grad=True), torch.empty(0, requires_grad=True)
    y = unpermute_rows(values, weight, rows, dtype)
    assert torch.equal(y, torch.zeros(3, DIM, dtype=dtype))
    grad_values, grad_weight = torch.autograd.grad(y, (values, weight), torch.ones_like(y))
    assert grad_values.shape == (0, DIM) and grad_weight.shape == (0,)


@given(st.permutations(range(12)))
def test_one_pair_per_token_is_a_copy(order: list[int]) -> None:
    """Each token has one pair: rows are a permutation of tokens, and go back to where they came from."""
    expert = torch.tensor(order) % EXPERTS
    counts = torch.bincount(expert, minlength=EXPERTS).tolist()
    plan = plan_rows(torch.arange(12), expert, 12, EXPERTS, 1, counts)
    x = torch.randn(12, DIM)
    assert plan.index.token_start is None and plan.rows == tuple(counts) and plan.ends.tolist() == [4, 8, 12]
    rows = permute_rows(x, plan.index)
    assert torch.equal(rows, x[torch.argsort(expert, stable=True)])
    assert torch.equal(unpermute_rows(rows, torch.ones(12), plan.index), x)


@given(st.integers(0, 6), st.sampled_from([1, 2, 3]), st.sampled_from([1, 4]), st.integers(0, 99))
def test_a_known_number_of_pairs_per_token_gives_the_same_rows(tokens: int, k: int, align: int, seed: int) -> None:
    """No sort by token is needed then; what is known of the load saves a count."""
    token = torch.arange(tokens).repeat_interleave(k)
    expert = torch.randint(EXPERTS, token.shape, generator=torch.Generator().manual_seed(seed))
    load = torch.bincount(expert, minlength=EXPERTS)
    found = plan_rows(token, expert, tokens, EXPERTS, align, load=load, per_token=k)
    unknown = plan_rows(token, expert, tokens, EXPERTS, align)
    assert torch.equal(found.ends, unknown.ends)
    real = unknown.index.row_pair < len(token)
    for name in ("row_pair", "pair_row", "by_token"):
        assert torch.equal(getattr(found.index, name), getattr(unknown.index, name))
    assert torch.equal(found.index.row_token[real], unknown.index.row_token[real])
    assert torch.equal(found.row_expert[real], unknown.row_expert[real])
    values, weight = torch.randn(len(real), DIM), torch.rand(len(token))
    assert torch.equal(unpermute_rows(values, weight, found.index), unpermute_rows(values, weight, unknown.index))
