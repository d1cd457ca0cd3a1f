"""Adam's step and the norm of gradients on the CPU, each in one pass over memory by a C kernel (adam.c).

An update of a model with 16-bit compute weights would otherwise read and write its numbers in four passes: the 16-bit
gradients become fp32 ones, their norm is taken, Adam steps, and the parameters are copied to 16 bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_SOURCE = Path(__file__).with_name("adam.c")
_COST = 400.0  # FLOPs of a matrix product in the time of one number's step (it waits for memory)
_BLOCK = 1 << 16  # numbers whose squares are summed together, so that the norm is the same with any number of threads


@dataclass(frozen=True)
class AdamPart:
    """One parameter's step; all tensors have its shape and are contiguous.

    Attributes:
        parameter, first_moment, second_moment: fp32, changed in place.
        gradient: fp32 or bf16.
        copy: bf16, gets the new parameter; None: there is none.
        kept: the parameter is multiplied by it before the step (AdamW's weight decay: 1 - lr · decay).
        decay: times the parameter is added to the gradient (Adam's weight decay).
        step: learning rate / (1 - beta1^t).
        root: √(1 - beta2^t).
    """

    parameter: Tensor
    gradient: Tensor
    first_moment: Tensor
    second_moment: Tensor
    copy: Tensor | None
    kept: float
    decay: float
    step: float
    root: float


class _Part(ctypes.Structure):
    """As in adam.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parameter", "gradient", "first", "second", "copy")),
        *((name, ctypes.c_int64) for name in ("end", "half")),
        *((name, ctypes.c_float) for name in ("kept", "decay", "step", "root")),
    )


def is_supported(like: Tensor) -> bool:
    """Whether the kernels can be used for an fp32 parameter on this device in this process."""
    return library_for(like, _SOURCE, torch.float32) is not None


def adam_step(parts: Sequence[AdamPart], betas: tuple[float, float], eps: float, divisor: float = 1.0) -> None:
    """Steps all parameters with their gradients divided by ``divisor``, as torch's fused Adam does."""
    found, total = _array(len(parts))(), 0
    for row, part in zip(found, parts, strict=True):
        total += part.parameter.numel()
        row.parameter, row.gradient = part.parameter.data_ptr(), part.gradient.data_ptr()
        row.first, row.second = part.first_moment.data_ptr(), part.second_moment.data_ptr()
        row.copy = None if part.copy is None else part.copy.data_ptr()
        row.end, row.half = total, part.gradient.dtype == torch.bfloat16
        row.kept, row.decay, row.step, row.root = part.kept, part.decay, part.step, part.root
    function, numbers = _kernels().moe_adam, (1 - betas[0], betas[1], 1 - betas[1], eps, divisor)
    parallel_ranges(lambda start, end: function(found, *numbers, start, end), total, _COST)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all numbers of contiguous fp32 and bf16 gradients, 0-dim fp32; the same with any number of threads."""
    found, total = _array(len(gradients))(), 0
    for row, gradient in zip(found, gradients, strict=True):
        total += gradient.numel()
        row.gradient, row.end, row.half = gradient.data_ptr(), total, gradient.dtype == torch.bfloat16
    sums = torch.empty(-(-total // _BLOCK), dtype=torch.float64)
    function = _kernels().moe_square_sums
    parallel_ranges(
        lambda start, end: function(found, sums.data_ptr(), _BLOCK, total, start, end), len(sums), _COST * _BLOCK / 8
    )
    return sums.sum().sqrt().float()


@functools.cache
def _array(length: int) -> type[ctypes.Array[_Part]]:
    """The type of an array; types that are made in every update would be left to the garbage collector."""
    return _Part * length


@functools.cache
def _kernels() -> ctypes.CDLL:
    kernels = library(_SOURCE)
    assert kernels is not None
    parts, size, number = ctypes.POINTER(_Part), ctypes.c_long, ctypes.c_float
    kernels.moe_adam.argtypes = [parts, *[number] * 5, size, size]
    kernels.moe_square_sums.argtypes = [parts, ctypes.c_void_p, *[size] * 4]
    kernels.moe_adam.restype = kernels.moe_square_sums.restype = None
    return kernels
