"""Dropout with a quarter of torch's cost for random numbers on the CPU, and the sum of a residual connection with it.

One pass by a C kernel (dropout.c) in fp32 and bf16 on CPUs with AMX, torch's operators elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_DRAWS = 1 << 16
_SOURCE = Path(__file__).with_name("dropout.c")
_COST = 20.0  # FLOPs of a matrix product in the time that one number takes here


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zeroes elements of x with probability p and scales the others by 1 / (1 - p); returns x outside training.

    On the CPU each 64-bit number of torch's default generator is used for four elements, so p is rounded to a multiple
    of 2^-16, and the scale uses the rounded p, so that the expectation is x. Elsewhere this is torch's dropout.
    """
    return x if not p or not training else _dropout(x, p, None)


def add_dropout(x: Tensor, y: Tensor, p: float, training: bool = True) -> Tensor:
    """x + dropout(y), rounded once in 16 bits where the C kernel is used; x and y have one shape and type."""
    return x + y if not p or not training else _dropout(y, p, x)


def _dropout(y: Tensor, p: float, residual: Tensor | None) -> Tensor:
    if y.device.type != "cpu":
        return _plus(residual, F.dropout(y, p))
    dropped = min(round(p * _DRAWS), _DRAWS)
    if dropped == _DRAWS:
        return _plus(residual, y * 0.0)
    draws = torch.empty(-(-y.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    least, scale = dropped - _DRAWS // 2, _DRAWS / (_DRAWS - dropped)
    alike = residual is None or (residual.dtype == y.dtype and residual.shape == y.shape)
    if alike and library_for(y, _SOURCE, torch.float32) is not None:
        return _Dropout.apply(y, residual, draws, least, scale)  # type: ignore[no-any-return, no-untyped-call]
    drop = (draws[: y.numel()] < least).view(y.shape)
    return _plus(residual, torch.where(drop, torch.zeros((), dtype=y.dtype), y * scale))


def _plus(residual: Tensor | None, y: Tensor) -> Tensor:
    return y if residual is None else residual + y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, residual: Tensor | None, draws: Tensor, least: int, scale: float) -> Tensor:
        ctx.save_for_backward(draws)
        ctx.least, ctx.scale = least, scale
        return _kernel(y, residual, draws, least, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (draws,) = ctx.saved_tensors
        of_y, of_residual, *_ = ctx.needs_input_grad
        grad_y = _kernel(grad, None, draws, ctx.least, ctx.scale) if of_y else None
        return grad_y, grad if of_residual else None, None, None, None


def _kernel(y: Tensor, residual: Tensor | None, draws: Tensor, least: int, scale: float) -> Tensor:
    y = y.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, function = torch.empty_like(y), _function()
    pointers = [None if x is None else x.data_ptr() for x in (out, y, residual, draws)]
    settings = least, scale, y.dtype == torch.bfloat16
    parallel_ranges(lambda start, end: function(*pointers, *settings, start, end), y.numel(), _COST)
    return out


@functools.cache
def _function() -> Callable[..., None]:
    kernels = library(_SOURCE)
    assert kernels is not None
    function, size = kernels.moe_dropout, ctypes.c_long
    function.argtypes = [*[ctypes.c_void_p] * 4, size, ctypes.c_float, *[size] * 3]
    function.restype = None
    return function  # type: ignore[no-any-return]
