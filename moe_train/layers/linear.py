"""x W^T + b with optional ReLU: by oneDNN or a C kernel in training on the CPU, by ``F.linear`` otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu import amx_linear
from moe_train.kernels.cpu.matmul import onednn_linear, prefers_onednn

# oneDNN generates code for every new shape (0.7 ms), which does not pay off below this many FLOPs.
_MIN_ONEDNN_FLOPS = 2.5e8
_MIN_ONEDNN_FLOPS_IN_SEARCH = 4e7  # the steps of a search repeat the same shapes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x [..., k], weight [m, k], bias [m] → [..., m]."""
    function = _OneDnnLinear if _uses_onednn(x, weight) else _AmxLinear if _uses_amx(x, weight) else None
    if function is not None:
        rows: Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight, bias, relu)  # type: ignore[no-untyped-call]
        return rows.view(*x.shape[:-1], weight.shape[0])
    y = F.linear(x, weight, bias)
    # ReLU's backward needs only its output, so it may overwrite its input.
    return F.relu(y, inplace=True) if relu else y


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """relu(x W1^T + b1) W2^T + b2, x [..., d], w1 [h, d], b1 [h], w2 [d, h], b2 [d] → [..., d]."""
    if not _uses_amx(x, w1):
        return linear(linear(x, w1, b1, relu=True), w2, b2)
    rows = x.reshape(-1, x.shape[-1])
    return _AmxFeedForward.apply(rows, w1, b1, w2, b2).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]


def _uses_amx(x: Tensor, weight: Tensor) -> bool:
    """Searches repeat few shapes, for which torch has its code."""
    return torch.is_grad_enabled() and weight.dtype == torch.bfloat16 and amx_linear.is_supported(x)


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    least_flops = _MIN_ONEDNN_FLOPS if torch.is_grad_enabled() else _MIN_ONEDNN_FLOPS_IN_SEARCH
    return (
        prefers_onednn(x)
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and 2.0 * x.numel() * weight.shape[0] >= least_flops
    )


@dataclass(frozen=True)
class _Products:
    """How a layer's products are computed. ``product``: of [n, k] and [k, m], plus a bias [m], with optional ReLU."""

    product: Callable[..., Tensor]
    weight_grad: Callable[[Tensor, Tensor], Tensor]  # of grad^T [m, n] and x [n, k]
    column_sums: Callable[[Tensor], Tensor]


_ONEDNN = _Products(onednn_linear, torch.mm, lambda grad: grad.sum(0))
_AMX = _Products(amx_linear.product, amx_linear.product, amx_linear.column_sums)


def _forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, products: _Products) -> Tensor:
    y = products.product(x, weight.t(), bias, relu)
    ctx.save_for_backward(x, weight, y if relu else None)
    ctx.has_bias, ctx.products = bias is not None, products
    return y


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight, y = ctx.saved_tensors
    products: _Products = ctx.products
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_x = products.product(grad, weight, None) if ctx.needs_input_grad[0] else None
    grad_weight = products.weight_grad(grad.t(), x) if ctx.needs_input_grad[1] else None
    grad_bias = products.column_sums(grad) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, None


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        return _forward(ctx, x, weight, bias, relu, _ONEDNN)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        return _backward(ctx, grad)


class _AmxLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        return _forward(ctx, x, weight, bias, relu, _AMX)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        return _backward(ctx, grad)


class _AmxFeedForward(torch.autograd.Function):
    """ReLU's mask is applied where the product writes its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = amx_linear.product(x, w1.t(), b1, relu=True)
        ctx.save_for_backward(x, w1, w2, hidden)
        return amx_linear.product(hidden, w2.t(), b2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, hidden = ctx.saved_tensors
        grad_hidden = amx_linear.product(grad, w2, kept=hidden)
        grad_x = amx_linear.product(grad_hidden, w1) if ctx.needs_input_grad[0] else None
        of_first, of_second = (
            (amx_linear.product(g.t(), rows), amx_linear.column_sums(g)) if needed else (None, None)
            for g, rows, needed in (
                (grad_hidden, x, any(ctx.needs_input_grad[1:3])),
                (grad, hidden, any(ctx.needs_input_grad[3:])),
            )
        )
        return grad_x, *of_first, *of_second
