"""x W^T + b with optional ReLU, by oneDNN for large fp32 products on the CPU and by ``F.linear`` otherwise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu.matmul import onednn_linear, prefers_onednn

# oneDNN generates code for every new shape (0.7 ms), which does not pay off below this many FLOPs.
_MIN_ONEDNN_FLOPS = 2.5e8
_MIN_ONEDNN_FLOPS_IN_SEARCH = 4e7  # the steps of a search repeat the same shapes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x [..., k], weight [m, k], bias [m] → [..., m]."""
    if _uses_onednn(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _Linear.apply(rows, weight, bias, relu)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], weight.shape[0])
    y = F.linear(x, weight, bias)
    # ReLU's backward needs only its output, so it may overwrite its input.
    return F.relu(y, inplace=True) if relu else y


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    least_flops = _MIN_ONEDNN_FLOPS if torch.is_grad_enabled() else _MIN_ONEDNN_FLOPS_IN_SEARCH
    return (
        prefers_onednn(x)
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and 2.0 * x.numel() * weight.shape[0] >= least_flops
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y = onednn_linear(x, weight.t(), bias, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x = onednn_linear(grad, weight, None) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None
