"""Rows of bf16 added up and multiplied by kernels of our own (segment_sum.c), where these serve."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_for

_SOURCE = Path(__file__).with_name("segment_sum.c")
_COST = 100.0  # of a number in FLOPs of a product, which a thread does in the time: these passes wait for memory


def is_supported(like: Tensor) -> bool:
    """Whether these kernels take tensors of this type and place, as things are."""
    return library_for(like, _SOURCE) is not None


def add_up(values: Tensor, ids: Tensor, starts: Tensor, weight: Tensor | None) -> Tensor:
    """[T, d]: token t's is the sum of the rows ``ids[starts[t]:starts[t + 1]]`` of values [N, d], in fp32 inside.

    Args:
        values: [N, d] bf16.
        ids: [P] int64.
        starts: [T] int64.
        weight: [P] fp32, of each of ``ids``; None: all 1.
    """
    _check_ids(ids, starts)
    values, ids, starts = values.contiguous(), ids.contiguous(), starts.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    out = values.new_empty(starts.shape[0], values.shape[1])
    _run("moe_add_up", (out, values, ids, starts, weight), (starts.shape[0], ids.shape[0]), *out.shape)
    return out


def add_up_backward(grad: Tensor, values: Tensor, weight: Tensor, token: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights in y_t = Σ over rows i of token t of weight_pair[i] · values_i.

    Args:
        grad: of y, [T, d] bf16.
        values: [N, d] bf16.
        weight: [P] fp32, each of one row.
        token: [N] int64, of each row.
        pair: [N] int64, which weight is each row's; P for rows that have none.

    Returns:
        That of values [N, d], bf16, 0 for rows without a weight, and that of weight [P], fp32.
    """
    _check_ids(token, pair)
    grad, values, token, pair = grad.contiguous(), values.contiguous(), token.contiguous(), pair.contiguous()
    weight = weight.float().contiguous()
    by_values, by_weight = torch.empty_like(values), torch.empty_like(weight)
    tensors = by_values, by_weight, grad, values, weight, token, pair
    _run("moe_add_up_backward", tensors, (weight.shape[0],), *values.shape)
    return by_values, by_weight


def _check_ids(*ids: Tensor) -> None:
    """The kernels would read them as what they are not."""
    for tensor in ids:
        if tensor.dtype != torch.int64:
            raise ValueError(f"ids are int64, not {tensor.dtype}")


def _run(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], rows: int, dim: int) -> None:
    """Calls a kernel for all rows, in parts where there are several threads."""
    function = _functions()[name]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    step = max(1, -(-rows // torch.get_num_threads()))
    starts = range(0, rows, step)

    def work(parts: Iterable[int]) -> None:
        for part in parts:
            function(*pointers, *sizes, starts[part], min(starts[part] + step, rows), dim)

    parallel_for(work, [min(start + step, rows) - start for start in starts], _COST * dim)


@functools.cache
def _functions() -> Mapping[str, Callable[..., None]]:
    kernels = library(_SOURCE)
    assert kernels is not None
    functions = {"moe_add_up": (5, 5), "moe_add_up_backward": (7, 4)}  # pointers, sizes
    for name, (pointers, sizes) in functions.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = [ctypes.c_void_p] * pointers + [ctypes.c_long] * sizes, None
    return {name: getattr(kernels, name) for name in functions}
