"""The feed-forward of all local experts by a kernel in C (amx_mlp.c): bf16 and ReLU, on CPUs with AMX.

Expert by expert, each in one call that keeps what it can in caches, fetches the next weights while it multiplies, and
writes weight gradients past the caches. Rows need no padding; hidden rows, kept for backward, stand in blocks of 32 for
each expert. Shapes: rows [N, d] in expert order, of which ``counts`` says how many each expert has; w1 [E, d, h],
b1 [E, h], w2 [E, h, d], b2 [E, d].
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.huge_pages import empty
from moe_train.kernels.cpu.thread_pool import parallel_for

LOG = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("amx_mlp.c")
_BLOCK = 32  # rows and columns that the kernel computes at a time


def is_supported(like: Tensor) -> bool:
    """Whether the kernel takes rows like these, as things are."""
    return library_for(like, _SOURCE) is not None and _amx_granted()


def check_shapes(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, counts: Sequence[int]
) -> None:
    """The kernel would read and write wherever it is sent.

    Raises:
        ValueError: shapes or types do not fit each other or the counts.
    """
    experts, d, h = w1.shape
    wanted = {"rows": (sum(counts), d), "w1": (len(counts), d, h), "b1": (experts, h)}
    wanted |= {"w2": (experts, h, d), "b2": (experts, d)}
    for tensor, (name, shape) in zip((rows, w1, b1, w2, b2), wanted.items(), strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not bfloat16 {shape}")


def forward(
    rows: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    scale: Tensor | None,
    counts: Sequence[int],
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [N, d], and the hidden rows for :func:`backward` where ``keeps_hidden``.

    Args:
        rows, w1, b1, w2, b2: contiguous.
        scale: [N, h], what dropout multiplies the hidden rows by; None: nothing.

    Raises:
        MemoryError: no room for one expert's hidden rows.
    """
    y = torch.empty_like(rows)
    row_start, block_start, expert = _starts(counts), _block_starts(counts), range(len(counts) + 1)
    hidden = empty((block_start[-1], _whole_blocks(w1.shape[2])), rows) if keeps_hidden else None
    _run(
        _functions()["moe_forward"],
        (
            *(_addresses(y, row_start), _addresses(hidden, block_start), _addresses(rows, row_start)),
            *(_addresses(parameter, expert) for parameter in (w1, b1, w2, b2)),
            _addresses(scale, row_start),
        ),
        w1,
        counts,
    )
    return y, hidden


def backward(
    grad: Tensor,
    rows: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    into: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    dropout_scale: float,
    counts: Sequence[int],
) -> None:
    """Writes the gradients of rows, w1, b1 (fp32), w2, b2 (fp32) into the given tensors; None: not wanted.

    Args:
        grad: of y, [N, d], contiguous.
        dropout_scale: what dropout multiplies what it leaves by.
    """
    row_start, block_start, expert = _starts(counts), _block_starts(counts), range(len(counts) + 1)
    by_rows, *by_parameters = into
    _run(
        _functions()["moe_backward"],
        (
            *(_addresses(by_rows, row_start), *(_addresses(gradient, expert) for gradient in by_parameters)),
            *(_addresses(grad, row_start), _addresses(hidden, block_start), _addresses(rows, row_start)),
            *(_addresses(w1, expert), _addresses(w2, expert)),
            [dropout_scale] * len(counts),
        ),
        w1,
        counts,
    )


def _starts(sizes: Sequence[int]) -> Sequence[int]:
    """Where each expert's part starts, and where the last one ends."""
    return list(accumulate(sizes, initial=0))


def _block_starts(counts: Sequence[int]) -> Sequence[int]:
    return _starts([_whole_blocks(count) for count in counts])


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _addresses(buffer: Tensor | None, starts: Sequence[int]) -> Sequence[int | None]:
    """The address of each expert's part of a contiguous buffer; None for each where there is none."""
    if buffer is None:
        return [None] * (len(starts) - 1)
    begin, step = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    return [begin + start * step for start in starts[:-1]]


def _run(
    function: Callable[..., int], arguments: Sequence[Sequence[int | float | None]], w1: Tensor, counts: Sequence[int]
) -> None:
    """Calls the kernel for each expert that has rows; arguments [argument][expert]."""
    _, d, h = w1.shape
    calls = [(*of_expert, count, d, h) for *of_expert, count in zip(*arguments, counts, strict=True)]

    def work(experts: Iterable[int]) -> None:
        for e in experts:
            if function(*calls[e]):
                raise MemoryError(f"no room for the hidden rows of an expert with {counts[e]} rows of {h} numbers")

    parallel_for(work, counts, 8.0 * d * h)


@functools.cache
def _functions() -> Mapping[str, Callable[..., int]]:
    kernels = library(_SOURCE)
    assert kernels is not None and _amx_granted()
    pointer, size = ctypes.c_void_p, ctypes.c_long
    forward, backward = kernels.moe_forward, kernels.moe_backward
    forward.argtypes = [pointer] * 8 + [size] * 3
    backward.argtypes = [pointer] * 10 + [ctypes.c_float] + [size] * 3
    return {"moe_forward": forward, "moe_backward": backward}


@functools.cache
def _amx_granted() -> bool:
    """Whether Linux lets this process use the matrix unit."""
    kernels = library(_SOURCE)
    if kernels is None or kernels.moe_ask() == 0:
        return kernels is not None
    LOG.warning("Linux does not lend this process the matrix unit (AMX): bf16 experts take torch's products")
    return False
