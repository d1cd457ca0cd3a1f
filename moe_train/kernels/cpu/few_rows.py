"""Products of few fp32 rows with each expert's matrix by a C kernel (few_rows.c), for inference on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_for

_SOURCE = Path(__file__).with_name("few_rows.c")
_MAX_ROWS = 24  # of an expert; with more, BLAS is faster (measured)
_COST = 8.0  # FLOPs of a large product in the time of one FLOP here, where memory decides


def is_supported(rows: Tensor, counts: Sequence[int]) -> bool:
    """Whether the kernel can be used, and is faster, for rows [N, k] of which expert e has ``counts[e]``."""
    return bool(counts) and max(counts) <= _MAX_ROWS and library_for(rows, _SOURCE, torch.float32) is not None


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int], relu: bool = False) -> Tensor:
    """rows [N, k] in expert order, times weight [E, k, m], plus bias [E, m] → [N, m]; optionally with ReLU.

    Raises:
        ValueError: shapes or types do not match each other or the counts.
    """
    experts, k, m = weight.shape
    wanted = {"rows": (sum(counts), k), "weight": (len(counts), k, m), "bias": (experts, m)}
    for tensor, (name, shape) in zip((rows, weight, bias), wanted.items(), strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}")
    rows, weight, bias = rows.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    out, starts, function = rows.new_empty(rows.shape[0], m), list(accumulate(counts, initial=0)), _function()
    places = tuple((tensor.data_ptr(), 4 * tensor.stride(0)) for tensor in (out, rows, weight))

    def work(busy: Iterable[int]) -> None:
        for e in busy:
            y, x, w = (begin + step * i for (begin, step), i in zip(places, (starts[e], starts[e], e), strict=True))
            b = None if bias is None else bias.data_ptr() + 4 * m * e
            function(y, x, w, b, counts[e], k, m, relu)

    parallel_for(work, counts, _COST * 2 * k * m)
    return out


@functools.cache
def _function() -> Callable[..., None]:
    kernels = library(_SOURCE)
    assert kernels is not None
    function = kernels.moe_few_rows
    function.argtypes, function.restype = [*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int], None
    return function  # type: ignore[no-any-return]
