"""The experts' products by one grouped product each: the fast road on a GPU, without a host sync."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.row_plan import RowPlan

_BYTES = 16  # what a grouped product's strides must be multiples of on a GPU


def grouped_feed_forward(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan, hidden_layer: HiddenLayer
) -> Tensor:
    """act(X W1 + b1) W2 + b2: rows [N, d] in expert order → [N, d]; what stands in padding is arbitrary.

    w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]. Widths that are no multiple of 16 bytes, which a GPU's grouped
    product refuses, are filled up with zeros: a hidden unit of zeros is zero after ReLU and GELU too.
    """
    dim, (d, h) = rows.shape[1], (_missing(width, rows) for width in w1.shape[1:])
    rows, w1, w2 = _filled(rows, d), _filled(w1, h, d), _filled(w2, d, h)
    hidden = _with_bias(F.grouped_mm(rows, w1, offs=plan.ends), _filled(b1, h), plan)
    hidden = F.relu(hidden) if hidden_layer.activation == "relu" else F.gelu(hidden)
    hidden = F.dropout(hidden, hidden_layer.dropout)
    return _with_bias(F.grouped_mm(hidden, w2, offs=plan.ends), _filled(b2, d), plan)[:, :dim]


def _missing(width: int, like: Tensor) -> int:
    """Numbers up to the next multiple of 16 bytes."""
    return -width % (_BYTES // like.element_size())


@overload
def _filled(numbers: Tensor, columns: int, rows: int = 0) -> Tensor: ...
@overload
def _filled(numbers: None, columns: int, rows: int = 0) -> None: ...
def _filled(numbers: Tensor | None, columns: int, rows: int = 0) -> Tensor | None:
    """Zeros behind the last columns, and behind the last rows."""
    if numbers is None or (not columns and not rows):
        return numbers
    return F.pad(numbers, (0, columns, 0, rows) if rows else (0, columns))


def _with_bias(rows: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    return rows if bias is None else _AddBias.apply(rows, bias, plan)  # type: ignore[no-untyped-call]


class _AddBias(torch.autograd.Function):
    """rows [N, m] + the bias, of [E, m], of each row's expert.

    The gradient of the biases is a grouped product with ones, which reads the rows' gradient once and adds up in fp32.
    That of ``index_select`` adds row by row to the same few places, one after the other.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return rows + plan.of_rows(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        ones = grad.new_ones(grad.shape[0], _BYTES // grad.element_size())
        sums = F.grouped_mm(ones.t(), grad.contiguous(), offs=ctx.plan.ends)
        return grad, sums[:, 0], None
