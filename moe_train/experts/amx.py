"""Feed-forward of all local experts by the AMX kernel (bf16 on CPUs with matrix units), as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import empty_weight_gradient
from moe_train.experts.row_plan import RowPlan
from moe_train.kernels.cpu import amx_mlp


def amx_feed_forward(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan, hidden_layer: HiddenLayer
) -> Tensor:
    """rows [N, d] in expert order → [N, d], all bf16. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]; ReLU.

    Raises:
        ValueError: shapes or types do not match each other or the plan.
        MemoryError: the hidden rows of one expert cannot be allocated.
    """
    amx_mlp.check_shapes(rows, w1, b1, w2, b2, plan.rows)
    keep_hidden = torch.is_grad_enabled()  # always false inside forward()
    return AmxFeedForward.apply(rows, w1, b1, w2, b2, plan, hidden_layer, keep_hidden)  # type: ignore[no-any-return, no-untyped-call]


class AmxFeedForward(torch.autograd.Function):
    """See :func:`amx_feed_forward`. ``keep_hidden``: whether backward may be called."""

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
        keep_hidden: bool,
    ) -> Tensor:
        rows, w1, w2 = rows.contiguous(), w1.contiguous(), w2.contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        scale = hidden_layer.sample_dropout(rows, w1.shape[2]) if hidden_layer.dropout else None
        keep_hidden = keep_hidden and any(ctx.needs_input_grad)
        y, hidden = amx_mlp.forward(rows, w1, b1, w2, b2, scale, plan.rows, keep_hidden)
        ctx.plan, ctx.dropout, ctx.biased = plan, hidden_layer.dropout, b1 is not None
        ctx.save_for_backward(rows, w1, w2, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        rows, w1, w2, hidden = ctx.saved_tensors
        weights_need_grad = any(ctx.needs_input_grad[1:5])
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_w1, grad_w2 = (empty_weight_gradient(w, ctx.plan) if weights_need_grad else None for w in (w1, w2))
        # Gradients of biases are accumulated in fp32.
        grad_b1, grad_b2 = (
            w.new_zeros(w.shape[0], w.shape[2], dtype=torch.float32) if weights_need_grad and ctx.biased else None
            for w in (w1, w2)
        )
        # The factor 1 / (1 - p) of dropout, rounded to the type of the rows.
        dropout_scale = float(rows.new_ones(()).div_(1 - ctx.dropout))
        into = grad_rows, grad_w1, grad_b1, grad_w2, grad_b2
        amx_mlp.backward(grad.contiguous(), rows, hidden, w1, w2, into, dropout_scale, ctx.plan.rows)
        grad_b1, grad_b2 = (None if by is None else by.to(w1.dtype) for by in (grad_b1, grad_b2))
        return grad_rows, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None
