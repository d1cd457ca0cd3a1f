"""Feed-forward of all local experts by grouped products: the fastest way on a GPU, without a host sync.

An expert's rows may start anywhere. Only the widths, the contiguous dimension of every operand, must be aligned.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.row_plan import RowPlan
from moe_train.experts.spec import Activation

_BYTES = 16  # on a GPU the strides of a grouped product must be multiples of this


def grouped_feed_forward(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan, hidden_layer: HiddenLayer
) -> Tensor:
    """act(X W1 + b1) W2 + b2: rows [N, d] in expert order → [N, d]; the output of padding rows is undefined.

    w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]. Widths that are not multiples of 16 bytes, which a GPU's grouped
    product rejects, are padded with zeros; this is exact, since ReLU and GELU map 0 to 0.
    """
    dim, (d, h) = rows.shape[1], (_missing_columns(width, rows) for width in w1.shape[1:])
    rows, w1, w2 = _zero_padded(rows, d), _zero_padded(w1, h, d), _zero_padded(w2, d, h)
    hidden = _activate(F.grouped_mm(rows, w1, offs=plan.ends), _zero_padded(b1, h), plan, hidden_layer.activation)
    hidden = F.dropout(hidden, hidden_layer.dropout)
    return _add_bias(F.grouped_mm(hidden, w2, offs=plan.ends), _zero_padded(b2, d), plan)[:, :dim]


def _missing_columns(width: int, like: Tensor) -> int:
    """Columns missing to the next multiple of 16 bytes."""
    return -width % (_BYTES // like.element_size())


@overload
def _zero_padded(numbers: Tensor, columns: int, rows: int = 0) -> Tensor: ...
@overload
def _zero_padded(numbers: None, columns: int, rows: int = 0) -> None: ...
def _zero_padded(numbers: Tensor | None, columns: int, rows: int = 0) -> Tensor | None:
    """Appends zero columns and zero rows."""
    if numbers is None or (not columns and not rows):
        return numbers
    return F.pad(numbers, (0, columns, 0, rows) if rows else (0, columns))


def _activate(rows: Tensor, bias: Tensor | None, plan: RowPlan, activation: Activation) -> Tensor:
    kernels = plan.index.kernels
    if kernels.uses("activation", rows):
        return kernels.bias_activation(rows, bias, plan.row_expert, plan.ends, activation)
    rows = _add_bias(rows, bias, plan)
    return F.relu(rows) if activation == "relu" else F.gelu(rows)


def _add_bias(rows: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    kernels = plan.index.kernels
    if bias is not None and kernels.uses("activation", rows):
        return kernels.bias_activation(rows, bias, plan.row_expert, plan.ends, "none")
    return rows if bias is None else _AddBias.apply(rows, bias, plan)  # type: ignore[no-untyped-call]


class _AddBias(torch.autograd.Function):
    """rows [N, m] + bias[e] of each row's expert e, with bias [E, m].

    The gradient of the biases is a grouped product with ones, which reads the rows' gradient once and accumulates in
    fp32. The backward of ``index_select`` would add the rows one after the other to the same few places.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return plan.gather_per_row(bias).add_(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        ones = grad.new_ones(grad.shape[0], _BYTES // grad.element_size())
        sums = F.grouped_mm(ones.t(), grad.contiguous(), offs=ctx.plan.ends)
        return grad, sums[:, 0], None
