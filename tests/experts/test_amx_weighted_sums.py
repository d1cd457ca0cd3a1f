"""The kernel that takes tokens by their numbers and weighs its results: against fp64 and against permuted rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.experts import ExpertPool, amx, mlp
from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.row_plan import plan_rows
from moe_train.kernels.cpu import amx_mlp, thread_pool
from moe_train.parallel.permute import permute_rows, unpermute_rows
from moe_train.routing import Assignment
from tests.experts.reference import pool_of, random_assignment

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps
pytestmark = pytest.mark.skipif(
    not amx_mlp.is_supported(torch.zeros(1, dtype=BF16)), reason="no matrix units (AMX) here, or no C compiler"
)


def of_each_token(tokens: int, experts: int, k: int, seed: int) -> Assignment:
    """k different experts of each token."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(tokens, experts, generator=generator).topk(k).indices
    weight = torch.rand(tokens * k, generator=generator).requires_grad_()
    return Assignment(torch.arange(tokens * k) // k, choices.flatten(), weight, per_token=k)


def exact(pool: ExpertPool, x: Tensor, assignment: Assignment, grad: Tensor, magnitudes: bool = False) -> list[Tensor]:
    """y and all gradients, in fp64; or what they would be if no number had a sign."""

    def wide_of(tensor: Tensor) -> Tensor:
        double = tensor.detach().double()
        return (double.abs() if magnitudes else double).requires_grad_()

    (stack,) = pool.sublayers
    parameters = {name: wide_of(p) for name, p in stack.named_parameters()}
    of_pair = {name: p[assignment.expert] for name, p in parameters.items()}
    wide, weight = wide_of(x), wide_of(assignment.weight)
    hidden = torch.einsum("pd,pdh->ph", wide[assignment.token], of_pair["fc1_weight"])
    hidden = (hidden + of_pair.get("fc1_bias", 0)).relu()
    out = torch.einsum("ph,phd->pd", hidden, of_pair["fc2_weight"]) + of_pair.get("fc2_bias", 0)
    y = torch.zeros_like(wide).index_add(0, assignment.token, weight[:, None] * out)
    return [y, *torch.autograd.grad(y, (wide, weight, *parameters.values()), wide_of(grad).detach())]


def computed(pool: ExpertPool, x: Tensor, assignment: Assignment, grad: Tensor) -> list[Tensor]:
    y = pool(x, assignment)
    return [y, *torch.autograd.grad(y, (x, assignment.weight, *pool.parameters()), grad)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 150), st.tuples(*[st.integers(1, 100)] * 2), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_outputs_and_gradients(tokens: int, widths: tuple[int, int], k: int, bias: bool, seed: int) -> None:
    """Any sizes; k experts of each token, or (k = 0) any pairs: tokens and experts with none, tokens with several."""
    d, h = widths
    pool = pool_of(seed, 4, BF16, dim=d, hidden=h, bias=bias)
    assignment = of_each_token(tokens, 4, k, seed) if k else random_assignment(tokens, 4, tokens, seed)
    x, grad = (torch.randn(tokens, d).to(BF16) for _ in range(2))
    x.requires_grad_()
    found, wanted = computed(pool, x, assignment, grad), exact(pool, x, assignment, grad)
    most = exact(pool, x, assignment, grad, magnitudes=True)
    for one, other, magnitude in zip(found, wanted, most, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= 2 * EPS * magnitude.norm()


@pytest.mark.parametrize("k", [1, 2])
def test_dropout_and_threads(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hidden numbers are dropped as of permuted rows, and threads change nothing."""
    pool, assignment = pool_of(0, 4, BF16, dim=64, hidden=96, dropout=0.4).train(), of_each_token(200, 4, k, 1)
    x, grad = torch.randn(200, 64).to(BF16).requires_grad_(), torch.randn(200, 64).to(BF16)

    def results() -> list[Tensor]:
        torch.manual_seed(5)
        return computed(pool, x, assignment, grad)

    found = results()
    with monkeypatch.context() as patch:
        patch.setattr(thread_pool, "_threads", lambda _: 2)
        assert all(torch.equal(one, other) for one, other in zip(found, results(), strict=True))
    monkeypatch.setattr(mlp, "amx_weighted_sums", permuted)
    for one, other in zip(found, results(), strict=True):
        assert (one.double() - other.double()).norm() <= 0.02 * other.double().norm()


def permuted(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    *parameters, plan, hidden = rest
    rows = amx.amx_feed_forward(permute_rows(x, plan.index), *parameters, plan, hidden)
    return unpermute_rows(rows, weight, plan.index, x.dtype)


@pytest.mark.parametrize("asked", ["x", "weight", "fc2_bias"])
def test_only_what_is_asked_for(asked: str) -> None:
    pool, assignment = pool_of(0, 4, BF16, dim=32, hidden=64), of_each_token(50, 4, 2, 1)
    x, grad = torch.randn(50, 32).to(BF16).requires_grad_(), torch.randn(50, 32).to(BF16)
    tensors = {"x": x, "weight": assignment.weight, **dict(pool.sublayers[0].named_parameters())}
    everything = dict(zip(tensors, computed(pool, x, assignment, grad)[1:], strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == asked)
    pool(x, assignment).backward(grad)
    assert torch.equal(tensors[asked].grad, everything[asked])
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != asked)
    with torch.no_grad():
        assert pool(x, assignment).isfinite().all()


def test_tokens_that_do_not_exist_are_refused() -> None:
    x, ids = torch.zeros(2, 32, dtype=BF16), torch.tensor([0, 2])
    plan = plan_rows(ids, torch.tensor([0, 0]), 3, 1, 1, [2])
    weights = torch.zeros(1, 32, 64, dtype=BF16), None, torch.zeros(1, 64, 32, dtype=BF16), None
    with pytest.raises(IndexError, match=r"0 \.\. 1"):
        amx.amx_weighted_sums(x, torch.ones(2), *weights, plan, HiddenLayer("relu"))
