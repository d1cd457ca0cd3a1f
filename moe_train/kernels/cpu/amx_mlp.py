"""Feed-forward of all local experts by a C kernel (amx_mlp.c): bf16 and ReLU, on CPUs with AMX.

One call per expert, which works in cache, prefetches the next weights while it multiplies, and writes weight gradients
with non-temporal stores. Rows need no padding; hidden rows, kept for backward, are stored in blocks of 32 per expert.
Shapes: rows [N, d] in expert order, ``counts[e]`` of them for expert e; w1 [E, d, h], b1 [E, h], w2 [E, h, d],
b2 [E, d].
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class GatheredRows:
    """Rows that the kernel takes from a matrix x [T, d] of tokens itself, instead of rows in expert order.

    Attributes:
        token: [N] int64, token of each row.
        weight: [N] fp32, factor of each row's output.
        placed: each token has one row; outputs, multiplied by their weights, and gradients are written to its place.
    """

    token: Tensor
    weight: Tensor
    placed: bool


def is_supported(like: Tensor) -> bool:
    """Whether the kernel can compute rows like these in this process."""
    return library_for(like, _SOURCE) is not None and _amx_permitted()


def check_shapes(
    rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, counts: Sequence[int]
) -> None:
    """Checks the arguments, since the kernel does not check bounds.

    Raises:
        ValueError: shapes or types do not match each other or the counts.
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
    keep_hidden: bool,
    of_tokens: GatheredRows | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [N, d], and the hidden rows for :func:`backward` if ``keep_hidden``.

    Args:
        rows, w1, b1, w2, b2: contiguous.
        scale: [N, h], factors of dropout on the hidden rows; None: no dropout.
        of_tokens: ``rows`` is x [T, d], and so is y if they are ``placed``; else y [N, d] is without weights.

    Raises:
        MemoryError: the hidden rows of one expert cannot be allocated.
    """
    token, weight, placed = _parts(of_tokens)
    y = torch.empty_like(rows) if of_tokens is None or placed else empty((sum(counts), rows.shape[1]), rows)
    row_start, block_start, expert = _starts(counts), _block_starts(counts), range(len(counts) + 1)
    hidden = empty((block_start[-1], _whole_blocks(w1.shape[2])), rows) if keep_hidden else None
    _run(
        _functions()["moe_forward"],
        (
            *(_addresses(y, [0] * len(expert) if placed else row_start), _addresses(hidden, block_start)),
            _addresses(rows, [0] * len(expert) if of_tokens else row_start),
            *(_addresses(parameter, expert) for parameter in (w1, b1, w2, b2)),
            *(_addresses(part, row_start) for part in (scale, token, weight if placed else None)),
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
    b2: Tensor | None = None,
    of_tokens: GatheredRows | None = None,
) -> Tensor | None:
    """Writes the gradients of rows, w1, b1 (fp32), w2, b2 (fp32) into the tensors ``into``; None: not computed.

    Args:
        grad: gradient of y, [N, d], contiguous.
        dropout_scale: 1 / (1 - p) of dropout.
        b2: needed with ``of_tokens``.
        of_tokens: ``rows`` is x [T, d] and ``grad`` is that of the tokens' weighted sums, [T, d]; the gradient of rows
            is [T, d] if they are ``placed``, else [N, d].

    Returns:
        With ``of_tokens`` the gradient of their weights, [N] fp32.
    """
    row_start, block_start, expert = _starts(counts), _block_starts(counts), range(len(counts) + 1)
    grad_rows, *grad_parameters = into
    by_weight = None if of_tokens is None else torch.empty_like(of_tokens.weight)
    token, weight, placed = _parts(of_tokens)
    first = [0] * len(expert)
    _run(
        _functions()["moe_backward"],
        (
            _addresses(grad_rows, first if placed else row_start),
            *(_addresses(gradient, expert) for gradient in grad_parameters),
            *(_addresses(grad, first if of_tokens else row_start), _addresses(hidden, block_start)),
            _addresses(rows, first if of_tokens else row_start),
            *(_addresses(parameter, expert) for parameter in (w1, w2, b2)),
            *(_addresses(part, row_start) for part in (token, weight, by_weight)),
            *([dropout_scale] * len(counts), [placed] * len(counts)),
        ),
        w1,
        counts,
    )
    return by_weight


def _parts(of_tokens: GatheredRows | None) -> tuple[Tensor | None, Tensor | None, bool]:
    return (None, None, False) if of_tokens is None else (of_tokens.token, of_tokens.weight, of_tokens.placed)


def _starts(sizes: Sequence[int]) -> Sequence[int]:
    """Start of each expert's part, and the end of the last one."""
    return list(accumulate(sizes, initial=0))


def _block_starts(counts: Sequence[int]) -> Sequence[int]:
    return _starts([_whole_blocks(count) for count in counts])


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _addresses(buffer: Tensor | None, starts: Sequence[int]) -> Sequence[int | None]:
    """Address of each expert's part of a contiguous buffer; a list of None if there is no buffer."""
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
                raise MemoryError(f"cannot allocate the hidden rows of an expert: {counts[e]} rows of {h} numbers")

    parallel_for(work, counts, 8.0 * d * h)


@functools.cache
def _functions() -> Mapping[str, Callable[..., int]]:
    kernels = library(_SOURCE)
    assert kernels is not None and _amx_permitted()
    pointer, size = ctypes.c_void_p, ctypes.c_long
    forward, backward = kernels.moe_forward, kernels.moe_backward
    forward.argtypes = [pointer] * 10 + [size] * 3
    backward.argtypes = [*[pointer] * 14, ctypes.c_float, ctypes.c_int, *[size] * 3]
    return {"moe_forward": forward, "moe_backward": backward}


@functools.cache
def _amx_permitted() -> bool:
    """Whether Linux permits this process to use the matrix unit."""
    kernels = library(_SOURCE)
    if kernels is None or kernels.moe_request_amx() == 0:
        return kernels is not None
    LOG.warning("Linux does not permit this process to use the matrix unit (AMX): bf16 experts use torch's products")
    return False
