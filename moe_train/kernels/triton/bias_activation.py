"""Bias of each row's expert, then the activation, in one pass; backward with the biases' gradient in one pass too."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS, _WIDTH = 32, 128  # of a program's tile
_PROGRAMS = 1056  # eight for each of an H200's processors: an expert's rows are divided to have about this many


def bias_activation(
    rows: Tensor,
    bias: Tensor | None,
    row_expert: Tensor,
    ends: Tensor,
    activation: Literal["none", "relu", "gelu"],
) -> Tensor:
    """act(rows + bias[e]) of each row's expert e: [N, h] in the rows' type, computed in fp32.

    Rows after ``ends[-1]`` have undefined values, and the gradient 0.

    Args:
        rows: [N, h] in expert order.
        bias: [E, h] in the rows' type; None: 0.
        row_expert: [N] int64, E for rows after ``ends[-1]``.
        ends: [E] int32, one past the last row of each expert.
        activation: ``gelu`` is the exact one, x Φ(x).
    """
    return _BiasActivation.apply(rows, bias, row_expert, ends, activation)  # type: ignore[no-any-return, no-untyped-call]


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bias: Tensor | None, row_expert: Tensor, ends: Tensor, activation: str
    ) -> Tensor:
        rows, row_expert = rows.contiguous(), row_expert.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = torch.empty_like(rows)
        if rows.numel():
            grid = triton.cdiv(rows.shape[0], _ROWS), triton.cdiv(rows.shape[1], _WIDTH)
            numbers = *rows.shape, ends.shape[0]
            _forward[grid](
                rows,
                rows if bias is None else bias,
                row_expert,
                out,
                *numbers,
                bias is not None,
                activation,
                _ROWS,
                _WIDTH,
            )
        # ReLU's gradient follows from its output, which the next product keeps anyway.
        kept = {"none": None, "relu": out, "gelu": rows}[activation]
        ctx.save_for_backward(kept, bias, ends)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        kept, bias, ends = ctx.saved_tensors
        grad = grad.contiguous()
        (rows, width), experts = grad.shape, ends.shape[0]
        activates, adds = ctx.activation != "none", bias is not None and ctx.needs_input_grad[1]
        out = torch.empty_like(grad) if activates else grad
        columns = triton.cdiv(width, _WIDTH)
        parts = max(min(_PROGRAMS // (experts * columns), triton.cdiv(rows, experts * _ROWS)), 1)
        sums = grad.new_zeros(parts, experts, width, dtype=torch.float32) if adds else None
        if rows and (activates or adds):
            pointers = [grad if each is None else each for each in (kept, bias, sums)]
            numbers = rows, width, experts, bias is not None, adds, ctx.activation, _ROWS, _WIDTH
            _backward[(experts + 1, parts, columns)](grad, *pointers, ends, out, *numbers)
        return out, None if sums is None else sums.sum(0).to(bias.dtype), None, None, None


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    rows,
    bias,
    row_expert,
    out,
    num_rows,
    width,
    experts,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        expert = tl.load(row_expert + row, mask=row < num_rows, other=experts)
        known = inside & (expert < experts)[:, None]
        x += tl.load(bias + expert[:, None] * width + column[None, :], mask=known, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        x = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out + at, x, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    grad,
    kept,
    bias,
    sums,
    ends,
    out,
    num_rows,
    width,
    experts,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    within = (column < width)[None, :]
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert, mask=expert < experts, other=num_rows)
    total = tl.zeros((WIDTH,), tl.float32)
    if BIASED:
        own = tl.load(bias + expert * width + column, mask=(column < width) & (expert < experts), other=0.0)
    first = start + part * ROWS
    while first < end:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < end)[:, None] & within
        at = row[:, None] * width + column[None, :]
        # Rows after the last expert: 0, whatever their gradient is.
        g = tl.load(grad + at, mask=inside & (expert < experts), other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            x = tl.load(kept + at, mask=inside & (expert < experts), other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                g = tl.where(x <= 0.0, 0.0, g)
            if ACTIVATION == "gelu":
                if BIASED:
                    x += own.to(tl.float32)[None, :]
                density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
                g *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
            tl.store(out + at, g, mask=inside)
        if ADDS:
            total += tl.sum(g, 0)
        first += parts * ROWS
    if ADDS:
        at = (part * experts + expert) * width + column
        tl.store(sums + at, total, mask=(column < width) & (expert < experts))
