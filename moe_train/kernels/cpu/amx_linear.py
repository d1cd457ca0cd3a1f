"""Products of bf16 matrices by a C kernel (amx_linear.c), on CPUs with AMX.

oneDNN, which torch's products are in bf16, generates code for every new shape: 1 to 7 ms each, and lengths of sentences
make new shapes all the time. This kernel has no code to generate.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.compile import library
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_SOURCE = Path(__file__).with_name("amx_linear.c")


def is_supported(like: Tensor) -> bool:
    """Whether the kernel can compute products of tensors like these in this process."""
    return amx_mlp.is_supported(like) and library(_SOURCE) is not None


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    kept: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """act(a b + bias), [n, m]; 0 where ``kept`` is 0.

    Args:
        a, b: [n, k] and [k, m] bf16; each is contiguous in rows or in columns (the transpose of such a matrix).
        bias: [m] bf16.
        kept: [n, m] bf16.
        out: [n, m], contiguous in rows. bf16: the result is written there. fp32: the product is added to it, without
            bias, ReLU and ``kept``.

    Raises:
        ValueError: shapes or types do not match each other.
        MemoryError: the workspace cannot be allocated.
    """
    (n, k), m = a.shape, b.shape[1]
    out = a.new_empty(n, m) if out is None else out
    wide = out.dtype == torch.float32
    bias, kept = (None if t is None else t.contiguous() for t in (bias, kept))
    if b.shape[0] != k or out.shape != (n, m) or not out.is_contiguous() or (wide and (relu or bias is not None)):
        raise ValueError(f"cannot multiply {list(a.shape)} by {list(b.shape)} into {list(out.shape)} of {out.dtype}")
    for tensor, shape in ((a, (n, k)), (b, (k, m)), (bias, (m,)), (kept, (n, m)), (None if wide else out, (n, m))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bfloat16):
            raise ValueError(f"a matrix is {tensor.dtype} {tuple(tensor.shape)}, not bfloat16 {shape}")
    if not k:  # a micro-batch without rows, in the gradient of a weight
        return out if wide else _finished(out.zero_(), bias, relu, kept)
    (a, a_turned, a_stride), (b, b_turned, b_stride) = _stored(a), _stored(b)
    function, size = _functions()["moe_linear"], out.element_size()
    into, left, right, of_bias, zero = (_address(t) for t in (out, a, b, bias, kept))

    def rows(start: int, end: int) -> None:
        at = into + start * m * size
        failed = function(
            *((None, at) if wide else (at, None)),
            left + 2 * start * (1 if a_turned else a_stride),
            right,
            of_bias or None,
            zero + 2 * start * m if zero else None,
            *(end - start, m, k, a_stride, b_stride, a_turned, b_turned, relu),
        )
        if failed:
            raise MemoryError(f"cannot allocate the workspace of a product [{n}, {k}] x [{k}, {m}]")

    parallel_ranges(rows, n, 2.0 * k * m)
    return out


def column_sums(x: Tensor) -> Tensor:
    """[m]: the sums over the rows of x [n, m] bf16, added up in fp32."""
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    if x.stride(1) != 1:
        x = x.contiguous()
    rounded = torch.empty_like(sums, dtype=x.dtype)
    _functions()["moe_column_sums"](rounded.data_ptr(), sums.data_ptr(), x.data_ptr(), *x.shape, x.stride(0))
    return rounded


def _stored(x: Tensor) -> tuple[Tensor, bool, int]:
    """A matrix, whether it is stored as its transpose, and the distance of stored rows."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, False, x.stride(0)
    if x.stride(0) == 1 and x.stride(1) >= x.shape[0]:
        return x, True, x.stride(1)
    x = x.contiguous()
    return x, False, x.shape[1]


def _finished(y: Tensor, bias: Tensor | None, relu: bool, kept: Tensor | None) -> Tensor:
    """What the kernel does to a product before it writes it, in place."""
    if bias is not None:
        y += bias
    if relu:
        y.relu_()
    return y if kept is None else y.masked_fill_(kept == 0, 0.0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@functools.cache
def _functions() -> Mapping[str, Callable[..., int]]:
    kernels = library(_SOURCE)
    assert kernels is not None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    linear, sums = kernels.moe_linear, kernels.moe_column_sums
    linear.argtypes = [pointer] * 6 + [size] * 8
    sums.argtypes, sums.restype = [pointer] * 3 + [size] * 3, None
    return {"moe_linear": linear, "moe_column_sums": sums}
