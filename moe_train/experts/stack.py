"""A whole expert on rows in expert order: one feed-forward, or several residual sub-layers with norms of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.batched import BatchedFeedForward
from moe_train.experts.feed_forward import Inner, LoopedFeedForward
from moe_train.experts.grouped import grouped_feed_forward
from moe_train.experts.native import native_feed_forward, serves
from moe_train.experts.parameters import StackedFeedForward
from moe_train.experts.plan import RowPlan


def run_experts(rows: Tensor, plan: RowPlan, stacks: Sequence[StackedFeedForward], training: bool) -> Tensor:
    """f_e of each row: rows [N, d] in expert order → [N, d]."""
    if len(stacks) == 1:
        return _feed_forward(rows, plan, stacks[0], training)
    y = rows
    for stack in stacks:
        y = y + _feed_forward(_norm(y, plan, stack), plan, stack, training)
    return y - rows


def _feed_forward(rows: Tensor, plan: RowPlan, stack: StackedFeedForward, training: bool) -> Tensor:
    w1, w2 = stack.fc1_weight.to(rows.dtype), stack.fc2_weight.to(rows.dtype)
    b1, b2 = (None if b is None else b.to(rows.dtype) for b in (stack.fc1_bias, stack.fc2_bias))
    inner = Inner(stack.spec.activation, stack.spec.dropout if training else 0.0)
    if not plan.rows:
        return grouped_feed_forward(rows, w1, b1, w2, b2, plan, inner)
    if serves(rows, inner.activation):
        return native_feed_forward(rows, w1, b1, w2, b2, plan, inner)
    if plan.even:
        return BatchedFeedForward.apply(rows, w1, b1, w2, b2, inner)  # type: ignore[no-any-return, no-untyped-call]
    return LoopedFeedForward.apply(rows, w1, b1, w2, b2, plan, inner)  # type: ignore[no-any-return, no-untyped-call]


def _norm(rows: Tensor, plan: RowPlan, stack: StackedFeedForward) -> Tensor:
    """LayerNorm with the weight and bias of each row's expert."""
    assert stack.norm_weight is not None and stack.norm_bias is not None
    weight, bias = (plan.of_rows(p.to(rows.dtype)) for p in (stack.norm_weight, stack.norm_bias))
    return torch.addcmul(bias, F.layer_norm(rows, rows.shape[-1:]), weight)
