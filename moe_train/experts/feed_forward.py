"""One feed-forward sub-layer of all local experts, on rows in expert order: act(X W1 + b1) W2 + b2, and its gradients.

Written as one autograd function on the CPU because there the time beyond the products goes to memory: each expert is
carried through both products while its rows are in cache, only what backward needs is kept, and weight gradients are
written straight into the stacked tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.plan import RowPlan
from moe_train.experts.products import affine, affine_into, outer_into
from moe_train.experts.spec import Activation


@dataclass(frozen=True)
class Inner:
    """What happens between the two products. ``dropout`` is 0 in evaluation."""

    activation: Activation
    dropout: float = 0.0

    @property
    def kept_per_expert(self) -> int:
        """Tensors kept for backward, per expert: ReLU's output tells all, GELU needs its input and what was dropped."""
        return 2 if self.activation == "gelu" and self.dropout else 1

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """dropout(act(x w + b)), and what backward needs."""
        if self.activation == "relu":
            hidden = affine(x, w, b, relu=True)
            hidden = F.dropout(hidden, self.dropout, True, inplace=True) if self.dropout else hidden
            return hidden, (hidden,)
        before = affine(x, w, b)
        if not self.dropout:
            return F.gelu(before), (before,)
        scale = torch.empty_like(before).bernoulli_(1 - self.dropout).div_(1 - self.dropout)
        return F.gelu(before).mul_(scale), (before, scale)

    def recall(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The hidden rows again."""
        if self.activation == "relu":
            return kept[0]
        hidden = F.gelu(kept[0])
        return hidden.mul_(kept[1]) if self.dropout else hidden

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The gradient before the activation; may overwrite ``grad``, the gradient of the hidden rows."""
        if self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(grad, kept[0], 0, grad_input=grad)
            return grad.div_(1 - self.dropout) if self.dropout else grad
        grad = grad.mul_(kept[1]) if self.dropout else grad
        return torch.ops.aten.gelu_backward(grad, kept[0])  # type: ignore[no-any-return]


class LoopedFeedForward(torch.autograd.Function):
    """rows [N, d] in expert order → [N, d], expert by expert. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        plan: RowPlan,
        inner: Inner,
    ) -> Tensor:
        out = torch.empty_like(rows)
        kept: list[Tensor] = []
        for e, (x, y) in _by_expert(plan, rows, out):
            hidden, keep = inner.forward(x, w1[e], None if b1 is None else b1[e])
            kept.extend(keep)
            affine_into(y, hidden, w2[e], None if b2 is None else b2[e])
        ctx.plan, ctx.inner, ctx.biased = plan, inner, b1 is not None
        ctx.save_for_backward(rows, w1, w2, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        rows, w1, w2, *kept = ctx.saved_tensors
        plan: RowPlan = ctx.plan
        train_weights = any(ctx.needs_input_grad[1:5])
        weights = _WeightGradients(w1, w2, ctx.biased, plan) if train_weights else None
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        step, taken = ctx.inner.kept_per_expert, 0
        for e, (x, g) in _by_expert(plan, rows, grad.contiguous()):
            keep = tuple(kept[taken : taken + step])
            taken += step
            if weights is not None:
                weights.second(e, ctx.inner.recall(keep), g)
            g = ctx.inner.backward(affine(g, w2[e].t(), None), keep)
            if weights is not None:
                weights.first(e, x, g)
            if grad_rows is not None:
                start = plan.starts[e]
                affine_into(grad_rows[start : start + x.shape[0]], g, w1[e].t())
        gradients = weights.all if weights is not None else (None,) * 4
        return grad_rows, *gradients, None, None


class _WeightGradients:
    """The stacked gradients, filled expert by expert; experts without rows stand at zero."""

    def __init__(self, w1: Tensor, w2: Tensor, biased: bool, plan: RowPlan) -> None:
        self.w1, self.w2 = torch.empty_like(w1), torch.empty_like(w2)
        for e, count in enumerate(plan.rows):
            if count == 0:
                self.w1[e].zero_()
                self.w2[e].zero_()
        self.b1 = w1.new_zeros(w1.shape[0], w1.shape[2]) if biased else None
        self.b2 = w1.new_zeros(w1.shape[0], w1.shape[1]) if biased else None
        self.ones = w1.new_ones(max(plan.rows, default=0))

    def first(self, e: int, x: Tensor, grad: Tensor) -> None:
        outer_into(self.w1[e], x, grad)
        if self.b1 is not None:
            torch.mv(grad.t(), self.ones[: grad.shape[0]], out=self.b1[e])

    def second(self, e: int, hidden: Tensor, grad: Tensor) -> None:
        outer_into(self.w2[e], hidden, grad)
        if self.b2 is not None:
            torch.mv(grad.t(), self.ones[: grad.shape[0]], out=self.b2[e])

    @property
    def all(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.w1, self.b1, self.w2, self.b2


def _by_expert(plan: RowPlan, *buffers: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each expert that has rows, with its part of each buffer [N, …]."""
    parts = zip(*(torch.split(buffer, list(plan.rows)) for buffer in buffers), strict=True)
    for e, part in enumerate(parts):
        if plan.rows[e]:
            yield e, part
