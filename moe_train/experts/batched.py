"""Feed-forward of all local experts by batched products; all experts have the same number of rows, with padding.

Used for many small experts, for which a product per expert costs more in calls and remainders than padding does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.kernels.cpu.grad_pool import gradient_like
from moe_train.kernels.cpu.matmul import bag_sums, batched, batched_linear


class BatchedFeedForward(torch.autograd.Function):
    """rows [N, d] in expert order, N / E of each → [N, d]. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, hidden_layer: HiddenLayer
    ) -> Tensor:
        x = rows.view(w1.shape[0], -1, rows.shape[1])
        scale = hidden_layer.sample_dropout(rows, w1.shape[2])
        scale = None if scale is None else scale.view(*x.shape[:2], -1)
        hidden, kept = hidden_layer.activate(batched_linear(x, w1, b1), scale)
        ctx.hidden_layer, ctx.biased = hidden_layer, b1 is not None
        ctx.save_for_backward(x, w1, w2, scale, kept)
        return batched_linear(hidden, w2, b2).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, w1, w2, scale, kept = ctx.saved_tensors
        hidden_layer: HiddenLayer = ctx.hidden_layer
        gy = grad.reshape(*x.shape[:2], -1)
        needs_weights = any(ctx.needs_input_grad[1:5])
        grad_w2 = None
        if needs_weights:
            grad_w2 = batched(hidden_layer.recompute(kept, scale).transpose(1, 2), gy, gradient_like(w2))
        g = hidden_layer.backward(batched(gy, w2.transpose(1, 2)), kept, scale)
        grad_w1 = batched(x.transpose(1, 2), g, gradient_like(w1)) if needs_weights else None
        grad_rows = batched(g, w1.transpose(1, 2)).flatten(0, 1) if ctx.needs_input_grad[0] else None
        grad_b1, grad_b2 = (_sum_per_expert(g), _sum_per_expert(gy)) if needs_weights and ctx.biased else (None, None)
        return grad_rows, grad_w1, grad_b1, grad_w2, grad_b2, None


def _sum_per_expert(grad: Tensor) -> Tensor:
    """[E, n, m] → [E, m]: sum over the rows of each expert."""
    experts, rows, _ = grad.shape
    every = torch.arange(experts * rows, device=grad.device)
    return bag_sums(grad.flatten(0, 1), every, torch.arange(experts, device=grad.device) * rows)
