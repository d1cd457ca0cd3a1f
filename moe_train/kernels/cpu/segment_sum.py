"""Weighted segment sums of bf16 rows by C kernels (segment_sum.c), forward and backward."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_SOURCE = Path(__file__).with_name("segment_sum.c")
_COST = 100.0  # FLOPs of a matrix product in the time that one number takes here (these passes wait for memory)


def is_supported(like: Tensor) -> bool:
    """Whether the kernels can be used for tensors of this type and device in this process."""
    return library_for(like, _SOURCE) is not None


def weighted_sums(values: Tensor, ids: Tensor, starts: Tensor | None, weight: Tensor | None) -> Tensor:
    """[T, d]: row t is the weighted sum of the rows ``ids[starts[t]:starts[t + 1]]`` of values, accumulated in fp32.

    Args:
        values: [N, d] bf16.
        ids: [P] int64.
        starts: [T] int64; None: one id for each row of the result.
        weight: [P] fp32, weight of each id; None: all 1.
    """
    _check_ids(ids, *(() if starts is None else (starts,)))
    values, ids, starts = values.contiguous(), ids.contiguous(), None if starts is None else starts.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    sums = ids.shape[0] if starts is None else starts.shape[0]
    out = values.new_empty(sums, values.shape[1])
    _run("moe_weighted_sums", (out, values, ids, starts, weight), (sums, ids.shape[0]), *out.shape)
    return out


def weighted_sums_grad(
    grad: Tensor, values: Tensor, weight: Tensor, token: Tensor, pair: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of values and weights in y_t = Σ over rows i of token t of weight[pair[i]] · values_i.

    Args:
        grad: gradient of y, [T, d] bf16.
        values: [N, d] bf16.
        weight: [P] fp32, each used by one row.
        token: [N] int64, token of each row.
        pair: [N] int64, index of each row's weight; P: the row has none.

    Returns:
        Gradient of values [N, d] bf16 (0 for rows without a weight), gradient of weight [P] fp32.
    """
    _check_ids(token, pair)
    grad, values, token, pair = grad.contiguous(), values.contiguous(), token.contiguous(), pair.contiguous()
    weight = weight.float().contiguous()
    grad_values, grad_weight = torch.empty_like(values), torch.empty_like(weight)
    tensors = grad_values, grad_weight, grad, values, weight, token, pair
    _run("moe_weighted_sums_grad", tensors, (weight.shape[0],), *values.shape)
    return grad_values, grad_weight


def _check_ids(*ids: Tensor) -> None:
    """Checks the types, since the kernels do not."""
    for tensor in ids:
        if tensor.dtype != torch.int64:
            raise ValueError(f"ids are int64, not {tensor.dtype}")


def _run(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], rows: int, dim: int) -> None:
    """Calls a kernel for all rows, divided over threads."""
    function = _functions()[name]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    parallel_ranges(lambda start, end: function(*pointers, *sizes, start, end, dim), rows, _COST * dim)


@functools.cache
def _functions() -> Mapping[str, Callable[..., None]]:
    kernels = library(_SOURCE)
    assert kernels is not None
    functions = {"moe_weighted_sums": (5, 5), "moe_weighted_sums_grad": (7, 4)}  # pointers, sizes
    for name, (pointers, sizes) in functions.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = [ctypes.c_void_p] * pointers + [ctypes.c_long] * sizes, None
    return {name: getattr(kernels, name) for name in functions}
