"""Batched products of padded experts: the same outputs and gradients as the reference, and where they are chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_train.experts import batched, mlp
from moe_train.experts.row_plan import plan_rows
from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.matmul import max_padding_for_batched, row_alignment
from tests.experts.reference import mix, pool_of, random_assignment

KINDS = [{}, {"activation": "gelu"}, {"bias": False}, {"sublayers": 2}]


@pytest.fixture(scope="module")
def always() -> object:
    """Pads for any loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "max_padding_for_batched", lambda x, mean: float("inf"))
        calls: list[int] = []
        product = batched.batched_linear
        patch.setattr(batched, "batched_linear", lambda *a: calls.append(1) or product(*a))
        yield calls


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(experts=st.integers(1, 5), pairs=st.integers(1, 30), seed=st.integers(0, 99))
def test_equals_the_reference(kind: dict, experts: int, pairs: int, seed: int, always: list[int]) -> None:
    pool = pool_of(seed, experts, **kind)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assignment = random_assignment(7, experts, pairs, seed, torch.float64)
    before = len(always)
    ours, plain = pool(x, assignment), mix(pool, x, assignment)
    assert len(always) > before, "the test must take the batched road"
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    along = torch.randn_like(plain)
    inputs = [x, assignment.weight, *pool.parameters()]
    got = torch.autograd.grad(ours, inputs, along)
    for one, other in zip(got, torch.autograd.grad(plain, inputs, along, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("always")
def test_recomputation_and_dropout() -> None:
    pool = pool_of(0, 4, dropout=0.5)
    x, assignment = torch.randn(12, 6, dtype=torch.float64), random_assignment(12, 4, 30, 2, torch.float64)
    outcomes = []
    for call in (pool, lambda *a: checkpoint(pool, *a, use_reentrant=False)):
        torch.manual_seed(5)
        y = call(x, assignment)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), [assignment.weight, *pool.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert not torch.equal(outcomes[0][0], pool.eval()(x, assignment))


@pytest.mark.usefixtures("always")
def test_frozen_experts_still_pass_gradients_to_tokens() -> None:
    pool = pool_of(0, 4).requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pool(x, random_assignment(5, 4, 10, 0, torch.float64)).sum().backward()
    assert x.grad is not None and x.grad.any() and all(p.grad is None for p in pool.parameters())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.sampled_from([1, 4, 32]), st.floats(0.5, 4))
def test_padding_is_even_within_its_bound_else_as_before(experts: list[int], align: int, most: float) -> None:
    expert = torch.tensor(experts)
    token = torch.arange(len(experts))
    counts = torch.bincount(expert, minlength=4).tolist()
    plan = plan_rows(token, expert, len(experts), 4, align, counts, most)
    own = plan_rows(token, expert, len(experts), 4, align, counts)
    assert all(rows % align == 0 for rows in plan.rows)
    fits = 4 * max(own.rows) <= most * len(experts)
    assert plan.rows == ((max(own.rows),) * 4 if fits else own.rows)
    assert plan.even == (len(set(plan.rows)) == 1)
    expert_of_row = torch.arange(4).repeat_interleave(torch.tensor(plan.rows))
    assert torch.equal(expert_of_row[plan.index.pair_row], expert)
    assert len(plan.index.pair_row.unique()) == len(experts)


def test_only_small_experts_of_16_bits_are_batched() -> None:
    rows = torch.zeros(1, dtype=torch.bfloat16)
    assert max_padding_for_batched(rows, 128) > 1 > max_padding_for_batched(rows, 4096)
    assert max_padding_for_batched(rows.float(), 128) == 0
    assert row_alignment(rows, 128) % 32 == 0 and row_alignment(rows.double(), 128) == 1


def test_bf16_uses_the_kernel_and_accumulates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our kernel does not serve."""
    monkeypatch.setattr(amx_mlp, "is_supported", lambda *_: False)
    calls = []
    product = batched.batched_linear
    monkeypatch.setattr(batched, "batched_linear", lambda *a: calls.append(1) or product(*a))
    pool = pool_of(0, 4, torch.bfloat16)
    x = torch.randn(80, 6, dtype=torch.bfloat16)
    assignment = random_assignment(80, 4, 400, 2)
    y = pool(x, assignment)
    assert calls and y.dtype == torch.bfloat16
    exact = mix(pool.double(), x.double(), assignment)
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
