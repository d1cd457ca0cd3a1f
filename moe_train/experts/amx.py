"""Feed-forward of all local experts by the AMX kernel (bf16 on CPUs with matrix units), as an autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import empty_weight_gradient
from moe_train.experts.row_plan import RowPlan
from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.huge_pages import empty
from moe_train.parallel.permute import sum_by_token


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


def amx_weighted_sums(
    x: Tensor,
    weight: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    plan: RowPlan,
    hidden_layer: HiddenLayer,
) -> Tensor:
    """y [T, d], Σ over pairs of weight · f_e(x_token): permute, :func:`amx_feed_forward` and unpermute in one function.

    The kernel reads the tokens of x [T, d] bf16 by their numbers. If token t has pair t alone, it writes results to
    their places, too.

    Args:
        weight: [P] fp32, differentiable.

    Raises:
        IndexError: a pair's token is not a row of x.
        ValueError, MemoryError: as :func:`amx_feed_forward`.
    """
    token = plan.index.row_token
    if token.numel() and not 0 <= int(token.amin()) <= int(token.amax()) < x.shape[0]:
        raise IndexError(f"tokens of pairs are not all in 0 .. {x.shape[0] - 1}")
    amx_mlp.check_shapes(x[:0], w1, b1, w2, b2, (0,) * len(plan.rows))
    keep_hidden = torch.is_grad_enabled()
    return AmxWeightedSums.apply(x, weight, w1, b1, w2, b2, plan, hidden_layer, keep_hidden)  # type: ignore[no-any-return, no-untyped-call]


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
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_parameters = _parameter_gradients(ctx, w1, w2) if any(ctx.needs_input_grad[1:5]) else (None,) * 4
        into = grad_rows, *of_parameters
        amx_mlp.backward(grad.contiguous(), rows, hidden, w1, w2, into, _dropout_scale(ctx, rows), ctx.plan.rows)
        return grad_rows, *_rounded(of_parameters, w1.dtype), None, None, None


class AmxWeightedSums(torch.autograd.Function):
    """See :func:`amx_weighted_sums`. With h the hidden row of a pair and g the gradient of its token's y, that of its
    weight is (g W2ᵀ) · h + g · b2, so that the experts' outputs are not kept.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        plan: RowPlan,
        hidden_layer: HiddenLayer,
        keep_hidden: bool,
    ) -> Tensor:
        x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        index = plan.index
        by_row = weight.float().index_select(0, index.row_pair)
        rows = amx_mlp.GatheredRows(index.row_token, by_row, index.token_start is None)
        scale = None
        if hidden_layer.dropout:
            scale = hidden_layer.sample_dropout(x.new_empty(sum(plan.rows), 0), w1.shape[2])
        keep_hidden = keep_hidden and any(ctx.needs_input_grad)
        y, hidden = amx_mlp.forward(x, w1, b1, w2, b2, scale, plan.rows, keep_hidden, rows)
        ctx.plan, ctx.dropout, ctx.biased = plan, hidden_layer.dropout, b1 is not None
        ctx.save_for_backward(x, rows.weight, w1, w2, b2, hidden)
        ctx.weight_dtype = weight.dtype
        return y if rows.placed else sum_by_token(y, weight, index, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, w1, w2, b2, hidden = ctx.saved_tensors
        index = ctx.plan.index
        rows = amx_mlp.GatheredRows(index.row_token, weight, index.token_start is None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x) if rows.placed else empty((weight.shape[0], x.shape[1]), x)
        of_parameters = _parameter_gradients(ctx, w1, w2) if any(ctx.needs_input_grad[2:6]) else (None,) * 4
        into = grad_x, *of_parameters
        by_weight = amx_mlp.backward(
            grad.contiguous(), x, hidden, w1, w2, into, _dropout_scale(ctx, x), ctx.plan.rows, b2, rows
        )
        assert by_weight is not None
        if grad_x is not None and not rows.placed:
            grad_x = sum_by_token(grad_x, None, index, x.dtype)
        by_pair = by_weight.index_select(0, index.pair_row).to(ctx.weight_dtype)
        return grad_x, by_pair, *_rounded(of_parameters, w1.dtype), None, None, None


def _parameter_gradients(ctx: Any, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Tensors for the gradients of w1, b1, w2 and b2; those of biases are accumulated, in fp32."""
    grad_w1, grad_w2 = (empty_weight_gradient(w, ctx.plan) for w in (w1, w2))
    grad_b1, grad_b2 = (
        w.new_zeros(w.shape[0], w.shape[2], dtype=torch.float32) if ctx.biased else None for w in (w1, w2)
    )
    return grad_w1, grad_b1, grad_w2, grad_b2


def _rounded(gradients: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in gradients)


def _dropout_scale(ctx: Any, like: Tensor) -> float:
    """The factor 1 / (1 - p) of dropout, rounded to the type of the rows."""
    return float(like.new_ones(()).div_(1 - ctx.dropout))
