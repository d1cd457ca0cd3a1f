"""Tokens to rows and back: gather, and the weighted sum over a token's rows.

Autograd functions because each one's gradient is the other's forward, and because torch's fused gather-and-sum
(``embedding_bag``) is several times faster than gather, multiply and ``index_add`` apart. Each sum runs over a token's
rows in a fixed order, so it never varies from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.kernels.cpu import segment_sum
from moe_train.kernels.cpu.huge_pages import empty

_HALF = (torch.bfloat16, torch.float16)
_CHUNK = 262144  # numbers that are widened at a time, so that their fp32 copies stay in cache
_SUM = 0  # of torch's modes to reduce a bag


@dataclass(frozen=True)
class RowIndex:
    """Which of N rows belong to which of T tokens; rows may belong to none (padding) and tokens may have none.

    Attributes:
        row_token: [N] int64, token of each row (any token for padding).
        row_pair: [N] int64, which of the P weights is the row's; P for padding.
        pair_row: [P] int64, row of each weight.
        by_token: [P] int64, rows in token order, without padding.
        token_start: [T] int64, where each token's rows start in ``by_token``.
        single: each token is known to have exactly one row (and pair t to be token t's): sums are moves.
    """

    row_token: Tensor
    row_pair: Tensor
    pair_row: Tensor
    by_token: Tensor
    token_start: Tensor
    single: bool = False

    @classmethod
    def of_tokens(cls, row_token: Tensor, num_tokens: int) -> RowIndex:
        """Rows without padding: row_token [N], every row its own weight."""
        row = torch.arange(row_token.shape[0], device=row_token.device)
        return cls(row_token, row, row, *_sort_by_token(row, row_token, num_tokens))

    @classmethod
    def of_order(cls, order: Tensor, token: Tensor, num_tokens: int) -> RowIndex:
        """Rows without padding: row n is pair ``order[n]``, a permutation of the pairs [P], whose tokens are given."""
        pair_row = torch.empty_like(order)
        pair_row[order] = torch.arange(order.shape[0], device=order.device)
        return cls.of_pairs(token[order], order, pair_row, token, num_tokens)

    @classmethod
    def of_pairs(
        cls, row_token: Tensor, row_pair: Tensor, pair_row: Tensor, token: Tensor, num_tokens: int
    ) -> RowIndex:
        """From both ways between rows and pairs, and the token [P] of each pair."""
        if _one_pair_each(token, num_tokens):
            return cls(row_token, row_pair, pair_row, pair_row, token, True)
        return cls(row_token, row_pair, pair_row, *_sort_by_token(pair_row, token, num_tokens))


def count_ids(ids: Tensor, size: int) -> Tensor:
    """[size] int64: how often each number stands in ids, any shape, all in 0 .. size - 1.

    ``bincount`` would let the host wait for a GPU, to learn the largest.
    """
    ids = ids.reshape(-1)
    if _free_to_ask(ids):
        return torch.bincount(ids, minlength=size)
    return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def _sort_by_token(pair_row: Tensor, token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """``by_token`` and ``token_start`` from the row [P] and the token [P] of each pair."""
    by_token = pair_row if _in_order(token) else pair_row[torch.argsort(token, stable=True)]
    per_token = count_ids(token, num_tokens)
    return by_token, per_token.cumsum(0) - per_token


def _in_order(token: Tensor) -> bool:
    """Whether tokens are known to stand in order."""
    return _free_to_ask(token) and bool((token[1:] >= token[:-1]).all())


def _one_pair_each(token: Tensor, num_tokens: int) -> bool:
    """Whether pair t is known to be token t's, for every t."""
    if token.shape[0] != num_tokens or not _free_to_ask(token):
        return False
    return torch.equal(token, torch.arange(num_tokens, device=token.device))


def _free_to_ask(numbers: Tensor) -> bool:
    """Whether the host learns what stands there without waiting for a device."""
    return numbers.device.type == "cpu"


def permute_rows(x: Tensor, rows: RowIndex) -> Tensor:
    """x [T, d] → [N, d]."""
    return _Permute.apply(x, rows)  # type: ignore[no-any-return, no-untyped-call]


def unpermute_rows(values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype | None = None) -> Tensor:
    """y_t = Σ over rows of token t of weight · value, in at least fp32 inside.

    Args:
        values: [N, d].
        weight: [P], differentiable; None: all 1.
        rows: whose they are.
        dtype: what the sums are rounded to at the end; None: not at all.

    Returns:
        [T, d].
    """
    return _Unpermute.apply(values, weight, rows, dtype or _wide(values))  # type: ignore[no-any-return, no-untyped-call]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowIndex) -> Tensor:
        ctx.rows = rows
        return _token_of_each_row(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad.contiguous(), None, ctx.rows, grad.dtype), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.dtype = rows, values.dtype
        ctx.save_for_backward(*(() if weight is None else (values, weight)))
        if rows.single and weight is not None and not any(ctx.needs_input_grad) and bool((weight == 1).all()):
            weight = None  # at inference: without a gate there is nothing to multiply
        return _sum(values, weight, rows, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        saved = ctx.saved_tensors
        if saved:
            values, weight = saved
            return *_unpermute_gradients(grad, values, weight, ctx.rows), None, None
        return _token_of_each_row(grad, ctx.rows).to(ctx.dtype), None, None, None


def _token_of_each_row(x: Tensor, rows: RowIndex) -> Tensor:
    """x [T, d] → [N, d]. Where there are no tokens, all rows are padding, and zero."""
    return x.index_select(0, rows.row_token) if x.shape[0] else x.new_zeros(rows.row_token.shape[0], x.shape[1])


def _wide(values: Tensor) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.promote_types(values.dtype, torch.float32)


def _unpermute_gradients(grad: Tensor, values: Tensor, weight: Tensor, rows: RowIndex) -> tuple[Tensor, Tensor]:
    """Of the values: weight · grad, 0 for padding. Of a weight: the product of its value and the gradient."""
    if grad.shape[0] == 0:
        return torch.zeros_like(values), torch.zeros_like(weight)
    grad = grad.contiguous()
    if grad.dtype == values.dtype == torch.bfloat16 and segment_sum.is_supported(values):
        by_values, by_weight = segment_sum.add_up_backward(grad, values, weight, rows.row_token, rows.row_pair)
        return by_values, by_weight.to(weight.dtype)
    row = torch.arange(values.shape[0], device=values.device)
    of_row = torch.cat([weight, weight.new_zeros(1)])[rows.row_pair]
    return _bags(grad, rows.row_token, row, of_row, values.dtype), _dots(grad, values, rows).to(weight.dtype)


def _dots(grad: Tensor, values: Tensor, rows: RowIndex) -> Tensor:
    """[P], in at least fp32: each pair's row of values [N, d] times its token's row of grad [T, d]."""
    wide = _wide(values)
    if grad.dtype != wide:
        grad = empty(grad.shape, grad.new_empty(0, dtype=wide)).copy_(grad)
    if values.dtype == wide or not _free_to_ask(values):
        return _dots_of(grad, values.to(wide), rows.pair_row, rows.row_token[rows.pair_row])
    step, row = max(1, _CHUNK // values.shape[1]), torch.arange(values.shape[0], device=values.device)
    pieces = zip(values.split(step), rows.row_token.split(step), strict=True)
    dots = [_dots_of(grad, value.to(wide), row[: token.shape[0]], token) for value, token in pieces]
    return torch.cat(dots)[rows.pair_row]


def _dots_of(grad: Tensor, values: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """[n]: row ``row[i]`` of values times row ``token[i]`` of grad."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(  # type: ignore[no-any-return]
        grad, values, row, row, token, _SUM
    )


def _sum(values: Tensor, weight: Tensor | None, rows: RowIndex, dtype: torch.dtype) -> Tensor:
    """[T, d]: the (weighted) sum of each token's rows of values [N, d], in at least fp32 and then rounded to dtype."""
    if rows.single:
        moved = values.index_select(0, rows.by_token)
        return (moved if weight is None else weight.to(_wide(values)).unsqueeze(1) * moved).to(dtype)
    by = weight if weight is None or rows.by_token is rows.pair_row else weight[rows.row_pair[rows.by_token]]
    if dtype == values.dtype == torch.bfloat16 and segment_sum.is_supported(values):
        return segment_sum.add_up(values, rows.by_token, rows.token_start, by)
    return _bags(values, rows.by_token, rows.token_start, by, dtype)


def _bags(values: Tensor, ids: Tensor, starts: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[bags, d]: bag i is the (weighted) sum of the rows ``ids[starts[i]:starts[i + 1]]`` of values [N, d].

    The sums are taken in at least fp32 and then rounded to ``dtype``.
    """
    if ids.numel() == 0:
        return values.new_zeros(starts.shape[0], values.shape[1], dtype=dtype)
    if dtype != values.dtype:
        values = values.to(_wide(values))  # the kernel rounds to the type that it reads
    elif weight is not None and values.dtype in _HALF:
        ids, starts, weight = ids.repeat_interleave(2), 2 * starts, _halves(weight, dtype)
    by = None if weight is None else weight.to(values.dtype)
    return torch.embedding_bag(values, ids, starts, False, _SUM, False, by)[0].to(dtype)


def _halves(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[2 P]: each weight [P] as two numbers of a 16-bit type that add up to it, its rounding and what that left.

    The kernel wants weights in the type of the rows, and adds up in fp32.
    """
    high = weight.to(dtype)
    return torch.stack((high, (weight - high).to(dtype)), dim=1).view(-1)
