"""How many torch operators one sparse layer takes, and that routers and row plans compile into one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train import MoELayer
from moe_train.experts import mlp
from moe_train.experts.row_plan import plan_rows
from moe_train.layers import BatchInfo, RoutingSettings, batch_context
from moe_train.parallel import permute
from moe_train.routing import registered_strategies

B, S, D, H, E = 32, 128, 256, 1024, 16


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("routing", "forward", "backward"),
    [
        pytest.param({"name": "switch"}, 36, 32, id="switch"),
        pytest.param({"name": "top_k", "top_k": 2}, 47, 42, id="top_2"),
        pytest.param({"name": "sam", "top_k": 2, "num_groups": 4}, 58, 43, id="sam"),
    ],
)
def test_operators_of_one_sparse_layer(
    routing: Mapping[str, Any], forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 autocast, dropless, with the balance loss, on one process, as a GPU runs it: grouped products, no reads."""
    monkeypatch.setattr(mlp, "prefers_grouped", lambda _: True)
    monkeypatch.setattr(permute, "_readable_without_sync", lambda _: False)
    layer = MoELayer(D, H, {**routing, "num_experts": E}).train()
    context = batch_context(None, (B, S), RoutingSettings(), BatchInfo(), training=True)
    x, grad = torch.randn(B, S, D, requires_grad=True), torch.randn(B, S, D)
    with torch.autocast("cpu", torch.bfloat16), OperatorCounter() as forwards:
        layer.block(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        y, record = layer(x)
        assert record is not None
        total = record.total_loss
    with OperatorCounter() as backwards:
        torch.autograd.backward([y, total], [grad, torch.ones(())])
    assert forwards.counts.total() <= forward, forwards.counts
    assert backwards.counts.total() <= backward, backwards.counts


@pytest.mark.parametrize("name", sorted(set(registered_strategies()) - {"dense"}))
def test_a_router_compiles_into_one_graph(name: str) -> None:
    """Shapes and numbers that depend on data are captured: choices that are dropped, expert choice's table."""
    router = MoELayer(8, 16, {"name": name, "num_experts": 8}).train().block.router
    context = batch_context(None, (2, 6), RoutingSettings(), BatchInfo(), training=True)
    if name == "soft_moe":
        calls = ((router.mixes, torch.randn(2, 6, 8), None), (router, torch.randn(8, 8)))
    else:
        calls = ((router, torch.randn(12, 8), context.routing),)
    with dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for function, *arguments in calls:
            dynamo.reset()
            found = dynamo.explain(function)(*arguments)
            assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("known", ["nothing", "load", "counts"])
@pytest.mark.parametrize("per_token", [0, 2])
def test_a_row_plan_compiles_into_one_graph(align: int, known: str, per_token: int) -> None:
    expert, token = torch.randint(4, (24,)), torch.arange(24) // 2
    load = torch.bincount(expert, minlength=4)
    keys = {"nothing": {}, "load": {"load": load}, "counts": {"load": load, "counts": load.tolist()}}[known]
    dynamo.reset()
    found = dynamo.explain(plan_rows)(token, expert, 12, 4, align, per_token=per_token, **keys)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
