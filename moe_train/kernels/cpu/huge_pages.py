"""Large buffers in huge pages, if Linux provides them on request (madvise).

The operating system maps and clears a new buffer of many megabytes in pages of 4 KiB as it is first written, which for
the gradients of a layer's experts takes as long as a matrix product (docs/decisions/0009). With pages of 2 MiB it takes
a fraction of that. torch requests huge pages only if THP_MEM_ALLOC_ENABLE=1 is set; these buffers need no setting.
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
    """Requests huge pages for ``size`` bytes of memory from address ``begin``."""
    if (madvise := _madvise()) is not None:
        page = mmap.PAGESIZE
        start = -(-begin // page) * page
        madvise(start, (begin + size - start) // page * page, _MADV_HUGEPAGE)


def empty_like(like: Tensor) -> Tensor:
    """:func:`empty` in ``like``'s shape."""
    return empty(like.shape, like)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``; None if the system does not provide huge pages on request."""
    try:
        enabled = sys.platform == "linux" and "[never]" not in _SWITCH.read_text(encoding="ascii")
        madvise = ctypes.CDLL(None).madvise if enabled else None
    except (OSError, AttributeError):
        return None
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise.restype = ctypes.c_int
    return madvise
