"""Permute (tokens to rows) and unpermute (weighted sum over each token's rows).

Both are autograd functions because each one's gradient is the other's forward, and because torch's fused gather-and-sum
(``embedding_bag``) is several times faster than separate gather, multiply and ``index_add``. Each sum runs over a
token's rows in a fixed order, so results are reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.kernels.cpu import segment_sum
from moe_train.kernels.cpu.huge_pages import empty
from moe_train.kernels.device_kernels import TORCH, DeviceKernels

_HALF = (torch.bfloat16, torch.float16)
_CHUNK_ELEMENTS = 262144  # elements converted at a time, so that their fp32 copies stay in cache
_BAG_SUM_MODE = 0  # embedding_bag's number for mode="sum"


@dataclass(frozen=True)
class RowIndex:
    """Mapping between N rows, P pairs and T tokens. A row may be padding; a token may have no row.

    Attributes:
        row_token: [N] int64, token of each row (any token for padding).
        row_pair: [N] int64, pair of each row; P for padding.
        pair_row: [P] int64, row of each pair.
        by_token: [P] int64, rows sorted by token, without padding.
        token_start: [T] int64, start of each token's rows in ``by_token``; None: pair t is known to belong to token t,
            for all t, so that sums are copies.
        per_token: k if every token is known to have k rows; 0: not known.
        kernels: the Triton kernels in use.
    """

    row_token: Tensor
    row_pair: Tensor
    pair_row: Tensor
    by_token: Tensor
    token_start: Tensor | None
    per_token: int = 0
    kernels: DeviceKernels = TORCH

    @classmethod
    def of_tokens(cls, row_token: Tensor, num_tokens: int) -> RowIndex:
        """Rows without padding: row_token [N]; row n is pair n."""
        row = torch.arange(row_token.shape[0], device=row_token.device)
        return cls(row_token, row, row, *_rows_by_token(row, row_token, num_tokens))

    @classmethod
    def of_pairs(
        cls,
        row_pair: Tensor,
        pair_row: Tensor,
        token: Tensor,
        num_tokens: int,
        per_token: int = 0,
        kernels: DeviceKernels = TORCH,
    ) -> RowIndex:
        """From both maps between rows and pairs, and the token [P] of each pair.

        Args:
            per_token: k if pair p is known to belong to token p // k, for all p; 0: not known.
        """
        pairs = token.shape[0]
        pair = row_pair if row_pair.shape[0] == pairs else row_pair.clamp(max=max(pairs - 1, 0))
        if not per_token and _is_identity(token, num_tokens):
            per_token = 1
        if per_token == 1:
            return cls(pair, row_pair, pair_row, pair_row, None, 1, kernels)
        if per_token:
            start = torch.arange(0, pairs, per_token, device=token.device)
            return cls(pair // per_token, row_pair, pair_row, pair_row, start, per_token, kernels)
        row_token = token[pair] if pairs else torch.zeros_like(pair)
        return cls(row_token, row_pair, pair_row, *_rows_by_token(pair_row, token, num_tokens), 0, kernels)


def count_ids(ids: Tensor, size: int) -> Tensor:
    """[size] int64: how often each id occurs in ids (any shape, values in 0 .. size - 1).

    Without ``bincount``, which makes the host wait for a GPU to learn the largest id.
    """
    ids = ids.reshape(-1)
    return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def _rows_by_token(pair_row: Tensor, token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """``by_token`` and ``token_start`` from the row [P] and the token [P] of each pair."""
    by_token = pair_row if _is_sorted(token) else pair_row[torch.argsort(token, stable=True)]
    per_token = count_ids(token, num_tokens)
    return by_token, per_token.cumsum(0) - per_token


def _is_sorted(token: Tensor) -> bool:
    """Whether tokens are known to be in ascending order."""
    return _readable_without_sync(token) and bool((token[1:] >= token[:-1]).all())


def _is_identity(token: Tensor, num_tokens: int) -> bool:
    """Whether pair t is known to belong to token t, for all t."""
    if token.shape[0] != num_tokens or not _readable_without_sync(token):
        return False
    return torch.equal(token, torch.arange(num_tokens, device=token.device))


def _all_one(weight: Tensor) -> bool:
    """Whether all weights are known to be 1."""
    return _readable_without_sync(weight) and bool((weight == 1).all())


def _readable_without_sync(numbers: Tensor) -> bool:
    """Whether the host can read the values without waiting for a device, and without breaking a compiled graph."""
    return numbers.device.type == "cpu" and not torch.compiler.is_compiling()


def permute_rows(x: Tensor, rows: RowIndex) -> Tensor:
    """x [T, d] → [N, d]."""
    return _Permute.apply(x, rows)  # type: ignore[no-any-return, no-untyped-call]


def unpermute_rows(values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype | None = None) -> Tensor:
    """y_t = Σ over rows of token t of weight · value, in at least fp32 inside.

    Args:
        values: [N, d].
        weight: [P], differentiable; None: all 1.
        rows: maps rows to pairs and tokens.
        dtype: type of the result; None: at least fp32.

    Returns:
        [T, d].
    """
    return _Unpermute.apply(values, weight, rows, dtype or _accumulation_dtype(values))  # type: ignore[no-any-return, no-untyped-call]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowIndex) -> Tensor:
        ctx.rows = rows
        return _gather_tokens(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_by_token(grad.contiguous(), None, ctx.rows, grad.dtype), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.dtype = rows, values.dtype
        ctx.save_for_backward(*(() if weight is None else (values, weight)))
        if rows.token_start is None and weight is not None and not any(ctx.needs_input_grad) and _all_one(weight):
            weight = None  # inference without a gate
        return sum_by_token(values, weight, rows, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        saved = ctx.saved_tensors
        if saved:
            values, weight = saved
            return *_unpermute_gradients(grad, values, weight, ctx.rows), None, None
        return _gather_tokens(grad, ctx.rows).to(ctx.dtype), None, None, None


def _gather_tokens(x: Tensor, rows: RowIndex) -> Tensor:
    """x [T, d] → [N, d]. With T = 0 all rows are padding, and zero."""
    if x.shape[0] and rows.kernels.uses("gather", x):
        return rows.kernels.gather(x, rows.row_token)
    return x.index_select(0, rows.row_token) if x.shape[0] else x.new_zeros(rows.row_token.shape[0], x.shape[1])


def _accumulation_dtype(values: Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.float32 if values.dtype in _HALF else values.dtype


def _unpermute_gradients(grad: Tensor, values: Tensor, weight: Tensor, rows: RowIndex) -> tuple[Tensor, Tensor]:
    """Gradients of values [N, d] (weight · grad, 0 for padding) and of weight [P] (dot product of value and grad)."""
    if grad.shape[0] == 0:
        return torch.zeros_like(values), torch.zeros_like(weight)
    grad = grad.contiguous()
    if rows.kernels.uses("combine", values):
        return rows.kernels.weighted_sums_grad(grad, values, weight, rows.row_token, rows.row_pair)
    if grad.dtype == values.dtype == torch.bfloat16 and segment_sum.is_supported(values):
        grad_values, grad_weight = segment_sum.weighted_sums_grad(grad, values, weight, rows.row_token, rows.row_pair)
        return grad_values, grad_weight.to(weight.dtype)
    row = torch.arange(values.shape[0], device=values.device)
    padded = weight if values.shape[0] == weight.shape[0] else F.pad(weight, (0, 1))
    of_row = padded[rows.row_pair]
    return _segment_sums(grad, rows.row_token, row, of_row, values.dtype), _weight_gradients(grad, values, rows).to(
        weight.dtype
    )


def _weight_gradients(grad: Tensor, values: Tensor, rows: RowIndex) -> Tensor:
    """[P], in at least fp32: dot product of each pair's row of values [N, d] and its token's row of grad [T, d]."""
    wide = _accumulation_dtype(values)
    if grad.dtype != wide:
        grad = empty(grad.shape, grad.new_empty(0, dtype=wide)).copy_(grad)
    if values.dtype == wide or not _readable_without_sync(values):
        return _row_dot_products(grad, values.to(wide), rows.pair_row, rows.row_token[rows.pair_row])
    step, row = max(1, _CHUNK_ELEMENTS // values.shape[1]), torch.arange(values.shape[0], device=values.device)
    pieces = zip(values.split(step), rows.row_token.split(step), strict=True)
    dots = [_row_dot_products(grad, value.to(wide), row[: token.shape[0]], token) for value, token in pieces]
    return torch.cat(dots)[rows.pair_row]


def _row_dot_products(grad: Tensor, values: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """[n]: dot product of row ``row[i]`` of values and row ``token[i]`` of grad."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(  # type: ignore[no-any-return]
        grad, values, row, row, token, _BAG_SUM_MODE
    )


def sum_by_token(values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype) -> Tensor:
    """[T, d]: (weighted) sum of each token's rows of values [N, d], accumulated in at least fp32, rounded to dtype."""
    by = weight if weight is None or rows.by_token is rows.pair_row else weight[rows.row_pair[rows.by_token]]
    if rows.kernels.uses("combine", values):
        return rows.kernels.weighted_sums(values, rows.by_token, rows.token_start, by, dtype, rows.per_token)
    if rows.token_start is None and by is not None and dtype == values.dtype and segment_sum.is_supported(values):
        return segment_sum.weighted_sums(values, rows.by_token, None, by)
    if rows.token_start is None:
        moved = values.index_select(0, rows.by_token)
        return (moved if by is None else by.to(_accumulation_dtype(values)).unsqueeze(1) * moved).to(dtype)
    if dtype == values.dtype == torch.bfloat16 and segment_sum.is_supported(values):
        return segment_sum.weighted_sums(values, rows.by_token, rows.token_start, by)
    return _segment_sums(values, rows.by_token, rows.token_start, by, dtype)


def _segment_sums(values: Tensor, ids: Tensor, starts: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[segments, d]: segment i is the (weighted) sum of the rows ``ids[starts[i]:starts[i + 1]]`` of values [N, d].

    Sums are accumulated in at least fp32 and rounded to ``dtype``.
    """
    if ids.numel() == 0:
        return values.new_zeros(starts.shape[0], values.shape[1], dtype=dtype)
    if dtype != values.dtype:
        values = values.to(_accumulation_dtype(values))  # the kernel's output type is its input type
    elif weight is not None and values.dtype in _HALF:
        ids, starts, weight = ids.repeat_interleave(2), 2 * starts, _split_weights(weight, dtype)
    by = None if weight is None else weight.to(values.dtype)
    return torch.embedding_bag(values, ids, starts, False, _BAG_SUM_MODE, False, by)[0].to(dtype)


def _split_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[2 P]: each weight [P] as two 16-bit numbers, the rounded weight and the rounding error.

    The kernel takes weights in the type of the rows, and accumulates in fp32.
    """
    high = weight.to(dtype)
    return torch.stack((high, (weight - high).to(dtype)), dim=1).view(-1)
