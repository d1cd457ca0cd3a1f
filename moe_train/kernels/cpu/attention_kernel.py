"""Attention over a few hundred keys by a C kernel (attention.c): fp32 and bf16, computed in fp32, on CPUs with AMX.

It reads and writes rows as the projections do, so that nothing is transposed, copied or cast between them.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

MAX_LENGTH = 512  # queries or keys: scores of one head and their gradients are 2 MB of fp32 numbers
_SOURCE = Path(__file__).with_name("attention.c")
_COST = 20.0  # FLOPs of a matrix product in the time that one of these takes


def is_supported(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel can be used for query [B, S, d] and key [B, K, d] in this process."""
    lengths = query.shape[1], key.shape[1]
    return (
        query.dtype == key.dtype
        and 0 < min(lengths) <= max(lengths) <= MAX_LENGTH
        and library_for(query, _SOURCE, torch.float32) is not None
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, heads: int
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / √(d / heads)) V, and what :func:`gradients` needs.

    Args:
        query: [B, S, d], the heads side by side; as key and value with any strides of the first two dimensions.
        key, value: [B, K, d].
        mask: [B, K] bool, True where a key is visible; None: all are.
        causal: query i sees the keys 0 .. i only.

    Returns:
        [B, S, d], contiguous; the logarithms of the softmax's sums, [B, heads, S] fp32.
    """
    out = query.new_empty(query.shape)
    log_sums = query.new_empty(query.shape[0], heads, query.shape[1], dtype=torch.float32)
    _run("moe_attention", (out,), log_sums, (query, key, value), mask, causal, heads)
    return out, log_sums


def gradients(
    into: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    out: Tensor,
    log_sums: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    heads: int,
) -> None:
    """Writes the gradients of query, key and value, the ``inputs``, from the gradient [B, S, d] of ``out``."""
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    _run("moe_attention_gradients", (*into, grad, out), log_sums, inputs, mask, causal, heads)


class _Matrix(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "row", "narrow")))


def _matrix(x: Tensor) -> _Matrix:
    assert x.stride(2) == 1 and x.dtype in (torch.float32, torch.bfloat16)
    return _Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16)


def _run(
    name: str,
    tensors: tuple[Tensor, ...],
    log_sums: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    heads: int,
) -> None:
    (sentences, queries, width), keys = inputs[0].shape, inputs[1].shape[1]
    if any(x.shape != (sentences, keys, width) for x in inputs[1:]) or width % heads:
        raise ValueError(f"key and value do not fit queries {list(inputs[0].shape)} of {heads} heads")
    if mask is not None:
        if mask.shape != (sentences, keys) or mask.dtype != torch.bool:
            raise ValueError(f"a mask is bool [{sentences}, {keys}], not {mask.dtype} {list(mask.shape)}")
        mask = mask.contiguous()
    before, after = [_matrix(x) for x in tensors], [_matrix(x) for x in inputs]
    dim, function = width // heads, _functions()[name]
    arguments = *map(ctypes.byref, before), log_sums.data_ptr(), *map(ctypes.byref, after)
    settings = None if mask is None else mask.data_ptr(), heads, queries, keys, dim, causal, 1 / math.sqrt(dim)

    def pairs(start: int, end: int) -> None:
        if function(*arguments, *settings, start, end):
            raise MemoryError(f"cannot allocate the workspace of attention, {queries} queries and {keys} keys")

    parallel_ranges(pairs, sentences * heads, _COST * queries * keys * dim)


@functools.cache
def _functions() -> Mapping[str, Callable[..., int]]:
    kernels = library(_SOURCE)
    assert kernels is not None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    found = {"moe_attention": 5, "moe_attention_gradients": 9}
    for name, pointers in found.items():
        getattr(kernels, name).argtypes = [*[pointer] * (pointers + 1), *[size] * 5, ctypes.c_float, size, size]
    return {name: getattr(kernels, name) for name in found}
