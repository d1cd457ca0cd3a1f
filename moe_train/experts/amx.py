"""The feed-forward of all local experts by the kernel for bf16 on CPUs with matrix units, as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import gradient_of
from moe_train.experts.row_plan import RowPlan
from moe_train.kernels.cpu import amx_mlp


def amx_feed_forward(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan, hidden_layer: HiddenLayer
) -> Tensor:
    """rows [N, d] in expert order → [N, d], all bf16. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]; ReLU.

    Raises:
        ValueError: shapes or types do not fit each other or the plan.
        MemoryError: no room for one expert's hidden rows.
    """
    amx_mlp.check_shapes(rows, w1, b1, w2, b2, plan.rows)
    keeps = torch.is_grad_enabled()  # inside the function it never is
    return AmxFeedForward.apply(rows, w1, b1, w2, b2, plan, hidden_layer, keeps)  # type: ignore[no-any-return, no-untyped-call]


class AmxFeedForward(torch.autograd.Function):
    """:func:`amx_feed_forward`. ``keeps``: whether there may be a backward."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        plan: RowPlan,
        hidden_layer: HiddenLayer,
        keeps: bool,
    ) -> Tensor:
        rows, w1, w2 = rows.contiguous(), w1.contiguous(), w2.contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        scale = hidden_layer.draw(rows, w1.shape[2]) if hidden_layer.dropout else None
        keeps = keeps and any(ctx.needs_input_grad)
        y, hidden = amx_mlp.forward(rows, w1, b1, w2, b2, scale, plan.rows, keeps)
        ctx.plan, ctx.dropout, ctx.biased = plan, hidden_layer.dropout, b1 is not None
        ctx.save_for_backward(rows, w1, w2, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        rows, w1, w2, hidden = ctx.saved_tensors
        learns = any(ctx.needs_input_grad[1:5])
        by_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        by_w1, by_w2 = (gradient_of(w, ctx.plan) if learns else None for w in (w1, w2))
        by_b1, by_b2 = (_fp32_sums(w) if learns and ctx.biased else None for w in (w1, w2))
        # What dropout multiplies what it leaves by, in the type of the rows.
        dropout_scale = float(rows.new_ones(()).div_(1 - ctx.dropout))
        into = by_rows, by_w1, by_b1, by_w2, by_b2
        amx_mlp.backward(grad.contiguous(), rows, hidden, w1, w2, into, dropout_scale, ctx.plan.rows)
        by_b1, by_b2 = (None if by is None else by.to(w1.dtype) for by in (by_b1, by_b2))
        return by_rows, by_w1, by_b1, by_w2, by_b2, None, None, None


def _fp32_sums(weight: Tensor) -> Tensor:
    """Zeros for the sums that become the gradient of the bias behind a weight [E, in, out]: [E, out], fp32."""
    return torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float32, device=weight.device)
