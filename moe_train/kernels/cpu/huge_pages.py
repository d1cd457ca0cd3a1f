"""Large buffers in huge pages, where Linux lends them to those that ask.

A fresh buffer of many megabytes is mapped page by page as it is first written, 4 KiB at a time, and the kernel clears
each: for the gradients of a layer's experts that takes as long as a matrix product (docs/decisions/0009). In pages of
2 MiB it takes a fraction of that. torch asks for them itself where THP_MEM_ALLOC_ENABLE=1 is set; for these buffers
there is nothing to set.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

LARGE = 8 << 20  # bytes: four huge pages
_MADV_HUGEPAGE = 14
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s type and device, in huge pages if it is large and on the CPU."""
    buffer = like.new_empty(shape)
    size = buffer.numel() * buffer.element_size()
    if size >= LARGE and buffer.device.type == "cpu":
        advise(buffer.data_ptr(), size)
    return buffer


def advise(begin: int, size: int) -> None:
    """Asks for huge pages for so many bytes of memory from an address on."""
    if (ask := _advice()) is not None:
        page = mmap.PAGESIZE
        start = -(-begin // page) * page
        ask(start, (begin + size - start) // page * page, _MADV_HUGEPAGE)


def empty_like(like: Tensor) -> Tensor:
    """The same in ``like``'s shape."""
    return empty(like.shape, like)


@functools.cache
def _advice() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``; None where it has no huge pages for those that ask."""
    try:
        lent = sys.platform == "linux" and "[never]" not in _SWITCH.read_text(encoding="ascii")
        madvise = ctypes.CDLL(None).madvise if lent else None
    except (OSError, AttributeError):
        return None
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise.restype = ctypes.c_int
    return madvise
