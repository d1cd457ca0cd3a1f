"""The grouped products of GPUs, on the CPU's own grouped_mm: the same outputs and gradients as the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_train.experts import mlp
from moe_train.experts.grouped import grouped_feed_forward
from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.row_plan import plan_rows
from moe_train.routing.types import Assignment
from tests.experts.reference import pool_of, random_assignment


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize(
    "kind", [{}, {"activation": "gelu"}, {"bias": False}, {"sublayers": 2}, {"dim": 7, "hidden": 10}], ids=str
)
@pytest.mark.parametrize("pairs", [0, 5, 40])
def test_equals_the_loop(kind: dict, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(0, 4, torch.float32, **{"dim": 8, "hidden": 16, **kind})
    x = torch.randn(12, pool.spec.dim, requires_grad=True)
    assignment = random_assignment(12, 4, pairs, 1)
    outcomes = []
    for grouped in (False, True):
        monkeypatch.setattr(mlp, "prefers_grouped", lambda _, grouped=grouped: grouped)
        y = pool(x, assignment)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, [x, assignment.weight, *pool.parameters()], torch.randn_like(y))
        outcomes.append((y, *gradients))
    for loop, grouped_one in zip(*outcomes, strict=True):
        torch.testing.assert_close(grouped_one, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("bias", [True, False])
def test_an_expanded_gradient(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum has strides of 0, which a grouped product rejects: the pool hands on its own rows."""
    pool = pool_of(0, 4, torch.float32, dim=8, hidden=16, bias=bias)
    x, assignment = torch.randn(12, 8, requires_grad=True), random_assignment(12, 4, 24, 1)
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(mlp, "prefers_grouped", lambda _, grouped=grouped: grouped)
        found.append(torch.autograd.grad(pool(x, assignment).sum(), [x, assignment.weight, *pool.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_types_without_a_grouped_product_take_another(padded: bool) -> None:
    """fp64 has none anywhere. With padding pairs, which it can skip, every type that has one takes it."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        backend = mlp.choose_backend(torch.empty(4, 8, dtype=dtype), "gelu", 4.0, padded)
        wanted = padded and dtype != torch.float64 and hasattr(F, "grouped_mm")
        assert (backend.name == "grouped") == wanted, dtype


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("weighted", [True, False])
def test_no_tokens_at_all(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later stratum may get no token. Then all rows are padding, of a token that does not exist."""
    pool = pool_of(0, 4, torch.float32, dim=8, hidden=16)
    monkeypatch.setattr(mlp, "prefers_grouped", lambda _: True)
    monkeypatch.setattr(mlp, "row_alignment", lambda *_: 16)
    x = torch.randn(0, 8, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    weight = torch.empty(0, requires_grad=weighted)
    y = pool(x, Assignment(none, none, weight))
    assert y.shape == (0, 8)
    for gradient in torch.autograd.grad(y.sum(), [x, *pool.parameters()]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_what_stands_behind_the_last_expert_reaches_no_gradient() -> None:
    """There a GPU's grouped product leaves what it found in memory, in the rows and in their gradient."""
    assignment = random_assignment(9, 3, 20, 2)
    plan = plan_rows(assignment.token, assignment.expert, 9, 3, align=4)
    end, total = int(plan.ends[-1]), plan.index.row_token.shape[0]
    assert end < total
    generator = torch.Generator().manual_seed(3)
    stacks = [torch.randn(3, *shape, generator=generator) for shape in ((8, 16), (16,), (16, 8), (8,))]
    rows, grad = (torch.randn(total, 8, generator=generator) for _ in range(2))
    found = []
    for behind in (0.0, float("nan")):
        rows[end:], grad[end:] = behind, behind
        w1, b1, w2, b2 = parameters = [stack.requires_grad_() for stack in stacks]
        y = grouped_feed_forward(rows, w1, b1, w2, b2, plan, HiddenLayer("gelu"))
        found.append(torch.autograd.grad(y, parameters, grad))
    for clean, torn in zip(*found, strict=True):
        assert clean.any() and torch.equal(clean, torn)


def test_rows_without_a_host_sync_are_the_same_rows() -> None:
    assignment = random_assignment(9, 5, 23, 4)
    counts = torch.bincount(assignment.expert, minlength=5).tolist()
    host, device = (plan_rows(assignment.token, assignment.expert, 9, 5, 4, known) for known in (counts, None))
    held = sum(host.rows)
    assert device.rows == () and torch.equal(host.ends, device.ends)
    assert torch.equal(host.index.pair_row, device.index.pair_row)
    assert torch.equal(host.index.row_pair, device.index.row_pair[:held])
    assert (device.index.row_pair[held:] == 23).all()
    expert = host.gather_per_row(torch.arange(5).float().unsqueeze(1)).squeeze(1)
    assert torch.equal(assignment.expert, expert[host.index.pair_row].long())
