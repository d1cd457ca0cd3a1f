"""The pool against the plain reference: outputs, gradients, and the edges where code bases hang or lose gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_train.experts import ExpertPool, ExpertSpec, is_expert
from moe_train.routing import Assignment
from tests.experts.reference import mix, pool_of, random_assignment

KINDS = [
    {},
    {"activation": "gelu"},
    {"bias": False},
    {"sublayers": 3},
    {"sublayers": 2, "activation": "gelu", "bias": False},
]


def gradients(y: torch.Tensor, pool: ExpertPool, *others: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(9)
    return list(torch.autograd.grad(y, [*others, *pool.parameters()], torch.randn_like(y)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 9), experts=st.integers(1, 6), pairs=st.integers(0, 30), seed=st.integers(0, 99))
def test_equals_the_reference(kind: dict, tokens: int, experts: int, pairs: int, seed: int) -> None:
    pool = pool_of(seed, experts, **kind)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    assignment = random_assignment(tokens, experts, pairs, seed, torch.float64)
    ours, plain = pool(x, assignment), mix(pool, x, assignment)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    if tokens and assignment.token.numel():
        torch.manual_seed(9)
        seedling = torch.randn_like(plain)
        wanted = torch.autograd.grad(plain, [x, assignment.weight, *pool.parameters()], seedling, allow_unused=True)
        for got, want in zip(gradients(ours, pool, x, assignment.weight), wanted, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_by_finite_differences(kind: dict) -> None:
    pool = pool_of(3, 3, **{"dim": 4, "hidden": 5, **kind})
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assignment = random_assignment(5, 3, 8, 1, torch.float64)
    names = [n for n, _ in pool.named_parameters()]

    def outcome(x: torch.Tensor, weight: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        pairs = Assignment(assignment.token, assignment.expert, weight)
        return torch.func.functional_call(pool, dict(zip(names, parameters, strict=True)), (x, pairs))

    assert torch.autograd.gradcheck(outcome, (x, assignment.weight, *pool.parameters()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "pairs"), [(0, 0), (4, 0)])
def test_nothing_to_do_keeps_the_graph(kind: dict, tokens: int, pairs: int) -> None:
    pool = pool_of(0, 4, **kind)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    y = pool(x, random_assignment(tokens, 4, pairs))
    assert y.shape == (tokens, 6) and not y.any()
    y.sum().backward()
    assert x.grad is not None and not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in pool.parameters())


def test_experts_without_tokens_get_zero_gradients() -> None:
    pool = pool_of(0, 4)
    token = torch.arange(3)
    pairs = Assignment(token, torch.full_like(token, 2), torch.ones(3))
    pool(torch.randn(3, 6, dtype=torch.float64), pairs).square().sum().backward()
    for parameter in pool.parameters():
        assert parameter.grad is not None
        assert parameter.grad[2].any() and not parameter.grad[[0, 1, 3]].any()


def test_bf16_sums_in_fp32_and_answers_in_bf16() -> None:
    pool = pool_of(0, 4, torch.bfloat16)
    x = torch.randn(50, 6, dtype=torch.bfloat16)
    assignment = random_assignment(50, 4, 400, 2)
    y = pool(x, assignment)
    assert y.dtype == torch.bfloat16
    exact = mix(pool.double(), x.double(), assignment)
    assert (y.double() - exact).norm() < 0.01 * exact.norm()


def test_autocast_computes_in_its_type() -> None:
    pool = pool_of(0, 4, torch.float32)
    x = torch.randn(20, 6, requires_grad=True)
    assignment = random_assignment(20, 4, 60, 2)
    exact = pool(x, assignment)
    with torch.autocast("cpu", torch.bfloat16):
        y = pool(x, assignment)
    assert y.dtype == torch.float32
    assert 0 < (y - exact).norm() < 0.02 * exact.norm()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pool.parameters())


@pytest.mark.parametrize("kind", [{"dropout": 0.5}, {"dropout": 0.5, "sublayers": 2}], ids=str)
def test_recomputation_changes_nothing(kind: dict) -> None:
    pool = pool_of(0, 4, **kind)
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    assignment = random_assignment(12, 4, 30, 2, torch.float64)
    torch.manual_seed(5)
    plain = pool(x, assignment)
    wanted = gradients(plain, pool, x, assignment.weight)
    torch.manual_seed(5)
    again = checkpoint(pool, x, assignment, use_reentrant=False)
    assert isinstance(again, torch.Tensor) and torch.equal(plain, again)
    for got, want in zip(gradients(again, pool, x, assignment.weight), wanted, strict=True):
        assert torch.equal(got, want)


def test_dropout_rate_and_scale() -> None:
    pool = pool_of(0, 1, torch.float64, hidden=4000, dropout=0.25, bias=False)
    x = torch.ones(1, 6, dtype=torch.float64)
    once = torch.zeros(200, dtype=torch.long)
    pairs = Assignment(once, once, torch.full((200,), 1 / 200))
    exact = pool.eval()(x, pairs)
    noisy = pool.train()(x, pairs)
    assert not torch.equal(noisy, exact)
    torch.testing.assert_close(noisy, exact, rtol=0.1, atol=0.05)


def test_frozen_experts_still_pass_gradients_to_tokens() -> None:
    pool = pool_of(0, 4).requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assignment = random_assignment(5, 4, 10, 0, torch.float64)
    pool(x, assignment).sum().backward()
    assert x.grad is not None and x.grad.any()
    assert assignment.weight.grad is not None
    assert all(p.grad is None for p in pool.parameters())


def test_initialisation_is_nn_linears_and_experts_differ() -> None:
    torch.manual_seed(0)
    pool = ExpertPool(ExpertSpec(dim=64, hidden=256), 3)
    stack = pool.sublayers[0]
    assert stack.fc1_weight.abs().max() <= 1 / 8 and stack.fc1_weight.std().item() == pytest.approx(
        1 / 8 / 3**0.5, rel=0.02
    )
    assert stack.fc2_weight.abs().max() <= 1 / 16 and stack.fc2_bias.abs().max() <= 1 / 16
    assert not torch.equal(stack.fc1_weight[0], stack.fc1_weight[1])
    torch.manual_seed(0)
    xavier = ExpertPool(ExpertSpec(dim=64, hidden=256, init="xavier"), 3).sublayers[0]
    assert xavier.fc1_weight.std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.02) and not xavier.fc1_bias.any()


def test_zero_output_starts_as_nothing() -> None:
    pool = pool_of(0, 2, sublayers=3, zero_output=True)
    y = pool(torch.randn(4, 6, dtype=torch.float64), random_assignment(4, 2, 8))
    assert y.abs().max() < 1e-12


def test_parameters_are_tagged_and_counted() -> None:
    for kind in KINDS:
        pool = pool_of(0, 4, **kind)
        assert all(is_expert(p) for p in pool.parameters())
        assert sum(p.numel() for p in pool.parameters()) == 4 * pool.spec.parameters


def test_meta_device_builds_nothing() -> None:
    with torch.device("meta"):
        pool = ExpertPool(ExpertSpec(dim=512, hidden=2048), 128)
    assert sum(p.numel() for p in pool.parameters()) == 128 * pool.spec.parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_one_pair_per_token_is_the_same_by_moves_as_by_sums(dtype: torch.dtype, ones: bool, permuted: bool) -> None:
    pool = pool_of(0, 3, dtype)
    x = torch.randn(9, 6, dtype=dtype, requires_grad=True)
    token = torch.tensor([4, 1, 8, 0, 3, 7, 2, 6, 5]) if permuted else torch.arange(9)
    weight = (torch.ones(9) if ones else torch.rand(9)).requires_grad_()
    pairs = Assignment(token, torch.tensor([0, 2, 2, 0, 1, 1, 1, 2, 0]), weight)
    y, plain = pool(x, pairs), mix(pool.double(), x.double(), pairs)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(y.double(), plain, **tolerance)
    got = torch.autograd.grad(plain.square().sum(), [x, weight])
    pool = pool.to(dtype)
    for one, other in zip(torch.autograd.grad(pool(x, pairs).square().sum(), [x, weight]), got, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerance)
    with torch.no_grad():  # where nothing is to be multiplied, nothing is
        torch.testing.assert_close(pool(x, pairs), y)
