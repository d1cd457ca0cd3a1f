"""Label-smoothed cross-entropy of bf16 or fp32 logits by a C kernel, which writes the gradient in place."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_SOURCE = Path(__file__).with_name("smoothed_loss.c")
_COST = 50.0  # FLOPs of a matrix product in the time that one logit takes here


def is_supported(like: Tensor) -> bool:
    """Whether the kernel can be used for logits of this type and device in this process."""
    return library_for(like, _SOURCE, torch.float32) is not None


def smoothed_loss_(logits: Tensor, target: Tensor, eps: float, ignore: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """nll and the sum over the vocabulary of -log p, [N] fp32 each, 0 in ignored rows.

    Args:
        logits: [N, V] bf16 or fp32, contiguous. If ``gradient``, they become the gradient of the label-smoothed loss
            (see :mod:`moe_train.kernels.cross_entropy`).
        target: [N] int64, ``ignore`` or below V.

    Raises:
        ValueError: a shape or type does not fit, or a target is out of range.
    """
    rows, vocabulary = logits.shape
    if not logits.is_contiguous() or logits.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"logits are contiguous bfloat16 or float32, not {logits.dtype} with strides {logits.stride()}"
        )
    if target.dtype != torch.int64 or target.shape != (rows,):
        raise ValueError(f"targets are int64 [{rows}], not {target.dtype} {list(target.shape)}")
    target = target.contiguous()
    if bool((target.ne(ignore) & (target.lt(0) | target.ge(vocabulary))).any()):
        raise ValueError(f"a target is not below the vocabulary's {vocabulary} entries")
    each = eps / max(vocabulary - 1, 1)
    nll, smooth = target.new_empty(2, rows, dtype=torch.float32).unbind(0)
    pointers = [tensor.data_ptr() for tensor in (logits, nll, smooth, target)]
    function, settings = _function(), (ignore, each, 1.0 - eps, gradient, logits.dtype == torch.bfloat16)
    parallel_ranges(lambda start, end: function(*pointers, *settings, start, end, vocabulary), rows, _COST * vocabulary)
    return nll, smooth


@functools.cache
def _function() -> Callable[..., None]:
    kernels = library(_SOURCE)
    assert kernels is not None
    function = kernels.moe_smoothed_loss
    size, number = ctypes.c_long, ctypes.c_float
    function.argtypes = [*[ctypes.c_void_p] * 4, size, number, number, *[size] * 5]
    function.restype = None
    return function  # type: ignore[no-any-return]
