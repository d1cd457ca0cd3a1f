"""Tokens to experts' rows and back: gather, and the weighted sum over a token's pairs.

Both are autograd functions because each one's gradient is the other's forward, and because torch's fused gather-and-sum
(``embedding_bag``) is several times faster than gather, multiply and ``index_add`` apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.plan import RowPlan

_CHUNK = 1024  # rows that are weighted at a time, so that fp32 copies stay in cache


class GatherRows(torch.autograd.Function):
    """x [T, d] → rows [N, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RowPlan) -> Tensor:  # noqa: D102
        ctx.plan = plan
        return x.index_select(0, plan.row_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return _sum_rows(grad.contiguous(), None, ctx.plan), None


class MixRows(torch.autograd.Function):
    """y_t = Σ over pairs of token t of weight · row: rows [N, d], weight [P] → [T, d] in at least fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:  # noqa: D102
        ctx.plan = plan
        ctx.save_for_backward(rows, weight)
        return _sum_rows(rows.to(torch.promote_types(rows.dtype, torch.float32)), weight, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        rows, weight = ctx.saved_tensors
        plan: RowPlan = ctx.plan
        row_weight = torch.cat([weight, weight.new_zeros(1)]).to(grad.dtype)[plan.row_pair].unsqueeze(1)
        grad_rows = torch.empty_like(rows)
        dots = grad.new_empty(rows.shape[0])
        for start in range(0, rows.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            g = grad.index_select(0, plan.row_token[part])
            torch.sum(rows[part].to(g.dtype).mul(g), 1, out=dots[part])
            grad_rows[part] = g.mul_(row_weight[part])
        return grad_rows, dots[plan.pair_row].to(weight.dtype), None


def _sum_rows(rows: Tensor, weight: Tensor | None, plan: RowPlan) -> Tensor:
    """[T, d]: for each token the (weighted) sum of its rows [N, d]."""
    if plan.by_token.numel() == 0:
        return rows.new_zeros(plan.token_start.shape[0], rows.shape[1])
    by = None if weight is None else weight[plan.row_pair[plan.by_token]].to(rows.dtype)
    return torch.embedding_bag(rows, plan.by_token, plan.token_start, False, 0, False, by)[0]
