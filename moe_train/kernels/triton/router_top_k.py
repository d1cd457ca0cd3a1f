"""Softmax, the k best experts of each token, and the counts of choices in one pass, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 4096  # numbers of a program


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, and the k largest of each token; of equal ones, and of NaNs, the first is taken.

    Args:
        logits: [T, E] fp32.
        k: at most E.

    Returns:
        probabilities [T, E] and weights [T, k], differentiable; choices [T, k] int64; counts [k, E] int64: how often
        each expert is the first, the second … choice.
    """
    return _SoftmaxTopK.apply(logits, k)  # type: ignore[no-any-return, no-untyped-call]


class _SoftmaxTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = logits.contiguous()
        tokens, experts = logits.shape
        rows, columns = _tile(experts)
        blocks = triton.cdiv(tokens, rows)
        probabilities = torch.empty_like(logits)
        weights, choices = logits.new_empty(tokens, k), logits.new_empty(tokens, k, dtype=torch.int64)
        counts = choices.new_empty(blocks, k, experts, dtype=torch.int32)
        if tokens:
            _forward[(blocks,)](logits, probabilities, weights, choices, counts, tokens, experts, k, rows, columns)
        counts = counts.sum(0)
        ctx.save_for_backward(probabilities, choices)
        ctx.mark_non_differentiable(choices, counts)
        ctx.set_materialize_grads(False)
        return probabilities, weights, choices, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_p: Tensor | None, grad_w: Tensor | None, *_: None) -> tuple[Tensor, None]:
        probabilities, choices = ctx.saved_tensors
        (tokens, experts), k = probabilities.shape, choices.shape[1]
        rows, columns = _tile(experts)
        out = torch.empty_like(probabilities)
        if tokens:
            grads = (probabilities if grad is None else grad.contiguous() for grad in (grad_p, grad_w))
            known = grad_p is not None, grad_w is not None
            blocks = triton.cdiv(tokens, rows)
            _backward[(blocks,)](out, probabilities, choices, *grads, tokens, experts, *known, k, rows, columns)
        return out, None


def _tile(experts: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    columns = max(triton.next_power_of_2(experts), 2)
    return max(min(_TILE // columns, 64), 1), columns


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    logits,
    probabilities,
    weights,
    choices,
    counts,
    tokens,
    experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    token = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, COLUMNS)
    real = expert[None, :] < experts
    inside = (token < tokens)[:, None] & real
    at = token[:, None] * experts + expert[None, :]
    x = tl.where(real, tl.load(logits + at, mask=inside, other=0.0), float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    p = e / tl.sum(e, 1)[:, None]
    tl.store(probabilities + at, p, mask=inside)
    # NaN counts as the largest: an index must never be outside of the experts.
    left = tl.where(real, tl.where(p == p, p, 2.0), -2.0)
    for k in tl.static_range(K):
        best = tl.argmax(left, 1)
        chosen = expert[None, :] == best[:, None]
        tl.store(weights + token * K + k, tl.sum(tl.where(chosen, p, 0.0), 1), mask=token < tokens)
        tl.store(choices + token * K + k, best.to(tl.int64), mask=token < tokens)
        count = tl.sum((chosen & inside).to(tl.int32), 0)
        tl.store(counts + (block * K + k) * experts + expert, count, mask=expert < experts)
        left = tl.where(chosen, -1.0, left)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    out,
    probabilities,
    choices,
    grad_p,
    grad_w,
    tokens,
    experts,
    HAS_P: tl.constexpr,
    HAS_W: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    at = token[:, None] * experts + expert[None, :]
    p = tl.load(probabilities + at, mask=inside, other=0.0)
    if HAS_P:
        g = tl.load(grad_p + at, mask=inside, other=0.0)
    else:
        g = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_W:
        for k in tl.static_range(K):
            choice = tl.load(choices + token * K + k, mask=token < tokens, other=-1)
            weight = tl.load(grad_w + token * K + k, mask=token < tokens, other=0.0)
            g += tl.where(expert[None, :] == choice[:, None], weight[:, None], 0.0)
    tl.store(out + at, p * (g - tl.sum(p * g, 1)[:, None]), mask=inside)
