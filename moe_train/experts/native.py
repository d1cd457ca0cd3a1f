"""The feed-forward of all local experts by a kernel of our own (feed_forward.c): bf16 and ReLU, on CPUs with AMX.

Expert by expert, as :mod:`moe_train.experts.feed_forward`, but each in one call that keeps what it can in caches,
fetches the next weights while it multiplies, and writes weight gradients past the caches. Rows need no padding; hidden
rows, kept for backward, stand in blocks of 32 for each expert.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.experts.feed_forward import Inner, gradient_of
from moe_train.experts.plan import RowPlan
from moe_train.experts.spec import Activation
from moe_train.parallel.memory import empty
from moe_train.parallel.native import library, library_for
from moe_train.parallel.threads import over_parts

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("feed_forward.c")
_BLOCK = 32  # rows and columns that the kernel computes at a time


def serves(like: Tensor, activation: Activation) -> bool:
    """Whether the kernel takes rows like these, as things are."""
    return activation == "relu" and library_for(like, _SOURCE) is not None and _granted()


def native_feed_forward(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan, inner: Inner
) -> Tensor:
    """rows [N, d] in expert order → [N, d], all bf16. w1 [E, d, h], b1 [E, h], w2 [E, h, d], b2 [E, d]; ReLU.

    Raises:
        ValueError: shapes or types do not fit each other or the plan.
        MemoryError: no room for one expert's hidden rows.
    """
    _check(rows, w1, b1, w2, b2, plan)
    keeps = torch.is_grad_enabled()  # inside the function it never is
    return NativeFeedForward.apply(rows, w1, b1, w2, b2, plan, inner, keeps)  # type: ignore[no-any-return, no-untyped-call]


def _check(rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: RowPlan) -> None:
    """The kernel would read and write wherever it is sent."""
    experts, d, h = w1.shape
    wanted = {"rows": (sum(plan.rows), d), "w1": (len(plan.rows), d, h), "b1": (experts, h)}
    wanted |= {"w2": (experts, h, d), "b2": (experts, d)}
    for tensor, (name, shape) in zip((rows, w1, b1, w2, b2), wanted.items(), strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not bfloat16 {shape}")


class NativeFeedForward(torch.autograd.Function):
    """:func:`native_feed_forward`. ``keeps``: whether there may be a backward."""

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
        keeps: bool,
    ) -> Tensor:
        rows, w1, w2 = rows.contiguous(), w1.contiguous(), w2.contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        at, y, scale = _Places.of(plan.rows), torch.empty_like(rows), inner.draw(rows, w1.shape[2])
        hidden = empty((at.blocks[-1], _filled(w1.shape[2])), rows) if keeps and any(ctx.needs_input_grad) else None
        _run(
            _functions()["moe_forward"],
            (
                *(_each(y, at.rows), _each(hidden, at.blocks), _each(rows, at.rows)),
                *(_each(parameter, at.experts) for parameter in (w1, b1, w2, b2)),
                _each(scale, at.rows),
            ),
            w1,
            plan,
        )
        ctx.plan, ctx.inner, ctx.at, ctx.biased = plan, inner, at, b1 is not None
        ctx.save_for_backward(rows, w1, w2, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        rows, w1, w2, hidden = ctx.saved_tensors
        plan, at, grad = ctx.plan, ctx.at, grad.contiguous()
        learns = any(ctx.needs_input_grad[1:5])
        by_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        by_w1, by_w2 = (gradient_of(w, plan) if learns else None for w in (w1, w2))
        by_b1, by_b2 = (_sums_of(w) if learns and ctx.biased else None for w in (w1, w2))
        _run(
            _functions()["moe_backward"],
            (
                *(_each(by_rows, at.rows), *(_each(gradient, at.experts) for gradient in (by_w1, by_b1, by_w2, by_b2))),
                *(_each(grad, at.rows), _each(hidden, at.blocks), _each(rows, at.rows)),
                *(_each(w1, at.experts), _each(w2, at.experts)),
                [_scale_of_dropout(ctx.inner, rows)] * len(plan.rows),
            ),
            w1,
            plan,
        )
        by_b1, by_b2 = (None if by is None else by.to(w1.dtype) for by in (by_b1, by_b2))
        return by_rows, by_w1, by_b1, by_w2, by_b2, None, None, None


@dataclass(frozen=True)
class _Places:
    """Where each expert's part starts in buffers of rows, of rows of whole blocks, and of experts; then their ends."""

    rows: Sequence[int]
    blocks: Sequence[int]
    experts: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[int]) -> _Places:
        return cls(_starts(rows), _starts([_filled(count) for count in rows]), range(len(rows) + 1))


def _starts(sizes: Sequence[int]) -> Sequence[int]:
    return list(accumulate(sizes, initial=0))


def _filled(size: int) -> int:
    """Whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


def _each(buffer: Tensor | None, starts: Sequence[int]) -> Sequence[int | None]:
    """The address of each expert's part of a contiguous buffer; None for each where there is none."""
    if buffer is None:
        return [None] * (len(starts) - 1)
    begin, step = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    return [begin + start * step for start in starts[:-1]]


def _sums_of(weight: Tensor) -> Tensor:
    """Zeros for the sums that become the gradient of the bias behind a weight [E, in, out]: [E, out], fp32."""
    return torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float32, device=weight.device)


def _scale_of_dropout(inner: Inner, like: Tensor) -> float:
    """What it multiplies what it leaves by, in the type of the rows."""
    return float(like.new_ones(()).div_(1 - inner.dropout))


def _run(
    function: Callable[..., int], arguments: Sequence[Sequence[int | float | None]], w1: Tensor, plan: RowPlan
) -> None:
    """Calls the kernel for each expert that has rows; arguments [argument][expert]."""
    _, d, h = w1.shape
    calls = [(*of_expert, count, d, h) for *of_expert, count in zip(*arguments, plan.rows, strict=True)]

    def work(experts: Iterable[int]) -> None:
        for e in experts:
            if function(*calls[e]):
                raise MemoryError(f"no room for the hidden rows of an expert with {plan.rows[e]} rows of {h} numbers")

    over_parts(work, plan.rows, 8.0 * d * h)


@functools.cache
def _functions() -> Mapping[str, Callable[..., int]]:
    kernels = library(_SOURCE)
    assert kernels is not None and _granted()
    pointer, size = ctypes.c_void_p, ctypes.c_long
    forward, backward = kernels.moe_forward, kernels.moe_backward
    forward.argtypes = [pointer] * 8 + [size] * 3
    backward.argtypes = [pointer] * 10 + [ctypes.c_float] + [size] * 3
    return {"moe_forward": forward, "moe_backward": backward}


@functools.cache
def _granted() -> bool:
    """Whether Linux lets this process use the matrix unit."""
    kernels = library(_SOURCE)
    if kernels is None or kernels.moe_ask() == 0:
        return kernels is not None
    _log.warning("Linux does not lend this process the matrix unit (AMX): bf16 experts take torch's products")
    return False
