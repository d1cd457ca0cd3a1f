"""Rows of tokens in expert order: gather, weighted sums over each token's rows, and the gradients of these sums.

Sums are accumulated in fp32, in a fixed order and without atomic additions, so that results are reproducible.
Numbers that change from batch to batch are not specialised: a kernel is compiled once for a width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers of a program's step
_WIDTH = 1024  # columns of a tile, at most


def gather(x: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``index`` [N] int64 of x [T, d], in ``dtype`` (None: x's): [N, d]."""
    x, index = x.contiguous(), index.contiguous()
    out = x.new_empty(index.shape[0], x.shape[1], dtype=dtype or x.dtype)
    rows, width = _tile(x.shape[1])
    if out.numel():
        grid = triton.cdiv(out.shape[0], rows), triton.cdiv(out.shape[1], width)
        _gather[grid](x, index, out, *out.shape, rows, width)
    return out


def weighted_sums(
    values: Tensor, ids: Tensor, starts: Tensor | None, weight: Tensor | None, dtype: torch.dtype, per_token: int = 0
) -> Tensor:
    """[T, d] in ``dtype``: row t is the weighted sum of the rows ``ids[starts[t]:starts[t + 1]]`` of values.

    Args:
        values: [N, d], at most 32 bits.
        ids: [P] int64.
        starts: [T] int64; None with ``per_token``.
        weight: [P] fp32, weight of each id; None: all 1.
        per_token: k if every token has k ids; 0: ``starts`` says how many.
    """
    values, ids = values.contiguous(), ids.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    tokens = ids.shape[0] // per_token if starts is None else starts.shape[0]
    out = values.new_empty(tokens, values.shape[1], dtype=dtype)
    rows, width = _tile(values.shape[1])
    if out.numel():
        grid = triton.cdiv(tokens, rows), triton.cdiv(out.shape[1], width)
        pointers = values, ids, ids if starts is None else starts.contiguous(), ids if weight is None else weight
        _weighted_sums[grid](*pointers, out, *out.shape, ids.shape[0], weight is not None, per_token, rows, width)
    return out


def weighted_sums_grad(
    grad: Tensor, values: Tensor, weight: Tensor, token: Tensor, pair: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of values and weights in y_t = Σ over rows i of token t of weight[pair[i]] · values_i.

    Args:
        grad: gradient of y, [T, d].
        values: [N, d].
        weight: [P] fp32, each used by one row.
        token: [N] int64, token of each row.
        pair: [N] int64, index of each row's weight; P: the row has none.

    Returns:
        Gradient of values [N, d] in their type (0 for rows without a weight), gradient of weight [P] fp32.
    """
    grad, values, token, pair = grad.contiguous(), values.contiguous(), token.contiguous(), pair.contiguous()
    weight = weight.float().contiguous()
    grad_values, grad_weight = torch.empty_like(values), torch.zeros_like(weight)
    rows, width = _tile(values.shape[1])
    if values.numel():
        pointers = grad, values, weight, token, pair, grad_values, grad_weight
        _weighted_sums_grad[(triton.cdiv(values.shape[0], rows),)](
            *pointers, *values.shape, weight.shape[0], rows, width
        )
    return grad_values, grad_weight


def _tile(dim: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    width = min(max(triton.next_power_of_2(dim), 2), _WIDTH)
    return min(_TILE // width, 64), width


@triton.jit(do_not_specialize=["rows"])
def _gather(x, index, out, rows, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    source = tl.load(index + row, mask=row < rows, other=0)
    tl.store(
        out + row[:, None] * dim + column[None, :],
        tl.load(x + source[:, None] * dim + column[None, :], mask=inside, other=0.0),
        mask=inside,
    )


@triton.jit(do_not_specialize=["tokens", "pairs"])
def _weighted_sums(
    values,
    ids,
    starts,
    weight,
    out,
    tokens,
    dim,
    pairs,
    WEIGHTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    within = (column < dim)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if PER_TOKEN:
        for k in tl.static_range(PER_TOKEN):
            pair = token * PER_TOKEN + k
            real = token < tokens
            row = tl.load(ids + pair, mask=real, other=0)
            value = tl.load(values + row[:, None] * dim + column[None, :], mask=real[:, None] & within, other=0.0)
            if WEIGHTED:
                total += tl.load(weight + pair, mask=real, other=0.0)[:, None] * value.to(tl.float32)
            else:
                total += value.to(tl.float32)
    else:
        start = tl.load(starts + token, mask=token < tokens, other=0)
        end = tl.load(starts + token + 1, mask=token + 1 < tokens, other=0)
        length = tl.where(token + 1 < tokens, end, tl.where(token < tokens, pairs, 0)) - start
        longest, k = tl.max(length, 0), 0
        while k < longest:
            real = k < length
            row = tl.load(ids + start + k, mask=real, other=0)
            value = tl.load(values + row[:, None] * dim + column[None, :], mask=real[:, None] & within, other=0.0)
            if WEIGHTED:
                total += tl.load(weight + start + k, mask=real, other=0.0)[:, None] * value.to(tl.float32)
            else:
                total += value.to(tl.float32)
            k += 1
    tl.store(out + token[:, None] * dim + column[None, :], total, mask=(token < tokens)[:, None] & within)


@triton.jit(do_not_specialize=["rows", "pairs"])
def _weighted_sums_grad(
    grad,
    values,
    weight,
    token,
    pair,
    grad_values,
    grad_weight,
    rows,
    DIM: tl.constexpr,
    pairs,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = tl.load(token + row, mask=row < rows, other=0)
    own = tl.load(pair + row, mask=row < rows, other=pairs)
    by = tl.load(weight + own, mask=own < pairs, other=0.0)
    dots = tl.zeros((ROWS,), tl.float32)
    for first in range(0, DIM, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < DIM)[None, :]
        g = tl.load(grad + source[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values + row[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_values + row[:, None] * DIM + column[None, :], by[:, None] * g, mask=inside)
        dots += tl.sum(g * value, 1)
    tl.store(grad_weight + own, dots, mask=own < pairs)
