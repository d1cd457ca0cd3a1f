"""The experts' products on rows in expert order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.parameters import StackedFeedForward
from moe_train.experts.plan import RowPlan


def run_experts(rows: Tensor, plan: RowPlan, stacks: list[StackedFeedForward], training: bool) -> Tensor:
    """f_e of each row: rows [P, d] in expert order → [P, d]."""
    parts = torch.split(rows, list(plan.counts))
    return torch.cat([_expert(part, e, stacks, training) for e, part in enumerate(parts)])


def _expert(x: Tensor, e: int, stacks: list[StackedFeedForward], training: bool) -> Tensor:
    if len(stacks) == 1:
        return _feed_forward(x, e, stacks[0], training)
    y = x
    for stack in stacks:
        weight, bias = (_row(p, e, x) for p in (stack.norm_weight, stack.norm_bias))
        y = y + _feed_forward(F.layer_norm(y, y.shape[-1:], weight, bias), e, stack, training)
    return y - x


def _feed_forward(x: Tensor, e: int, stack: StackedFeedForward, training: bool) -> Tensor:
    w1, b1, w2, b2 = (_row(p, e, x) for p in (stack.fc1_weight, stack.fc1_bias, stack.fc2_weight, stack.fc2_bias))
    assert w1 is not None and w2 is not None
    h = x @ w1 if b1 is None else torch.addmm(b1, x, w1)
    h = F.relu(h) if stack.spec.activation == "relu" else F.gelu(h)
    h = F.dropout(h, stack.spec.dropout, training)
    return h @ w2 if b2 is None else torch.addmm(b2, h, w2)


def _row(parameter: Tensor | None, e: int, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter[e].to(like.dtype)
