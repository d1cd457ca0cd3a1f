"""Feed-forward of all local experts, one expert after the other: act(X W1 + b1) W2 + b2, and its gradients.

One autograd function, because on the CPU the time outside the products is memory traffic: both products of an expert
are computed while its rows are in cache, only what backward needs is kept, and weight gradients are written directly
into the stacked tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.row_plan import RowPlan
from moe_train.kernels.cpu.grad_pool import gradient_like
from moe_train.kernels.cpu.huge_pages import empty_like
from moe_train.kernels.cpu.matmul import bag_sums, linear, linear_into, weight_grad_into
from moe_train.kernels.cpu.thread_pool import parallel_for


class LoopedFeedForward(torch.autograd.Function):
    """rows [N, d] in expert order → [N, d], expert by expert. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d].

    Views of single experts are created before the threads start, since creating them in threads contends for the GIL.
    """

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
    ) -> Tensor:
        out = empty_like(rows)
        scale = hidden_layer.sample_dropout(rows, w1.shape[2])
        x, y, scales = _split_rows(rows, plan), _split_rows(out, plan), _split_rows(scale, plan)
        first, second, bias1, bias2 = (
            _per_expert(w1, plan),
            _per_expert(w2, plan),
            _per_expert(b1, plan),
            _per_expert(b2, plan),
        )
        kept: list[Tensor | None] = [None] * w1.shape[0]

        def work(experts: Iterable[int]) -> None:
            for e in experts:
                hidden, kept[e] = hidden_layer.forward(x[e], first[e], bias1[e], scales[e])
                linear_into(y[e], hidden, second[e], bias2[e])

        parallel_for(work, plan.rows, _flops(w1))
        ctx.plan, ctx.hidden_layer, ctx.biased = plan, hidden_layer, b1 is not None
        ctx.save_for_backward(rows, w1, w2, scale, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        rows, w1, w2, scale, *kept = ctx.saved_tensors
        plan: RowPlan = ctx.plan
        hidden_layer: HiddenLayer = ctx.hidden_layer
        grad = grad.contiguous()
        weights = _WeightGradients(w1, w2, ctx.biased, plan) if any(ctx.needs_input_grad[1:5]) else None
        grad_rows = empty_like(rows) if ctx.needs_input_grad[0] else None
        x, gx, gy, scales = (_split_rows(buffer, plan) for buffer in (rows, grad_rows, grad, scale))
        first, second = _per_expert(w1.transpose(1, 2), plan), _per_expert(w2.transpose(1, 2), plan)

        def work(experts: Iterable[int]) -> None:
            for e in experts:
                if weights is not None:
                    weight_grad_into(weights.each_w2[e], hidden_layer.recompute(kept[e], scales[e]), gy[e])
                g = hidden_layer.backward(linear(gy[e], second[e], None), kept[e], scales[e])
                if weights is not None:
                    weights.first(e, x[e], g)
                if grad_rows is not None:
                    linear_into(gx[e], g, first[e])

        parallel_for(work, plan.rows, 2 * _flops(w1))
        return grad_rows, *((None,) * 4 if weights is None else weights.all(grad)), None, None


def empty_weight_gradient(weight: Tensor, plan: RowPlan) -> Tensor:
    """Uninitialised gradient of stacked weights [E, …]; zero for experts without rows."""
    gradient = gradient_like(weight)
    for e, count in enumerate(plan.rows):
        if count == 0:
            gradient[e].zero_()
    return gradient


class _WeightGradients:
    """Gradients of the stacked parameters, written expert by expert."""

    def __init__(self, w1: Tensor, w2: Tensor, biased: bool, plan: RowPlan) -> None:
        self.w1, self.w2 = empty_weight_gradient(w1, plan), empty_weight_gradient(w2, plan)
        self.each_w1, self.each_w2 = _per_expert(self.w1, plan), _per_expert(self.w2, plan)
        self.plan = plan
        self.b1 = w1.new_zeros(w1.shape[0], w1.shape[2]) if biased else None
        self.each_b1 = _per_expert(self.b1, plan)
        rows = torch.arange(max(plan.rows, default=0), device=w1.device)
        self.bags = {count: (rows[:count], rows[:1]) for count in set(plan.rows)}

    def first(self, e: int, x: Tensor, grad: Tensor) -> None:
        weight_grad_into(self.each_w1[e], x, grad)
        if self.b1 is not None:
            self.each_b1[e].copy_(bag_sums(grad, *self.bags[self.plan.rows[e]])[0])

    def all(self, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Gradients of w1, b1, w2, b2; grad [N, d] is the gradient of the output."""
        if self.b1 is None:
            return self.w1, None, self.w2, None
        every = torch.arange(grad.shape[0], device=grad.device)
        starts = torch.cat([self.plan.ends.new_zeros(1), self.plan.ends[:-1]]).long()
        return self.w1, self.b1, self.w2, bag_sums(grad, every, starts)


def _split_rows(buffer: Tensor | None, plan: RowPlan) -> Sequence[Any]:
    """Each expert's rows of a buffer [N, …]; a list of None if there is no buffer."""
    return [None] * len(plan.rows) if buffer is None else torch.split(buffer, list(plan.rows))


def _per_expert(stacked: Tensor | None, plan: RowPlan) -> Sequence[Any]:
    """Each expert's slice of a stacked tensor [E, …]; a list of None if there is no tensor."""
    return [None] * len(plan.rows) if stacked is None else stacked.unbind(0)


def _flops(w1: Tensor) -> float:
    return 4.0 * w1.shape[1] * w1.shape[2]
