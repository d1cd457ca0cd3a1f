"""Pool that reuses the memory of freed weight gradients from step to step, on the CPU.

Otherwise the operating system allocates a gradient of many megabytes in every step and clears each page, which
takes a quarter of a step with many small experts (docs/decisions/0009). Here the memory of a freed gradient is used for
the next gradient of the same size, in training that of the same parameter one step later. So between steps a process
keeps the memory of its gradients, as if they were set to zero instead of being freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moe_train.kernels.cpu.huge_pages import LARGE, advise, empty_like

# Memory unused for this many acquisitions is freed: more than one step of a hundred sparse layers makes.
_MAX_IDLE_ACQUISITIONS = 256


def gradient_like(weight: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor like ``weight``; from the pool if it is large and on the CPU."""
    size = weight.numel() * weight.element_size()
    if size < LARGE or weight.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return empty_like(weight)
    buffer = _memory().acquire(size)
    return torch.frombuffer(buffer, dtype=weight.dtype, count=weight.numel()).view(weight.shape)


class _Memory:
    """Free mappings by size, each with the number of acquisitions at its release, the oldest first.

    Deques, because a tensor may be freed at any time, in any thread.
    """

    def __init__(self) -> None:
        self.free: dict[int, deque[tuple[int, mmap.mmap]]] = {}
        self.acquisitions = 0

    def acquire(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """Memory of ``size`` bytes, which returns to the pool when it is no longer referenced."""
        self.acquisitions += 1
        self._free_idle()
        try:
            _, mapping = self.free[size].pop()
        except (KeyError, IndexError):
            mapping = self._new(size)
        buffer = (ctypes.c_char * size).from_address(_address(mapping))
        weakref.finalize(buffer, self._release, size, mapping).atexit = False
        return buffer

    def _release(self, size: int, mapping: mmap.mmap) -> None:
        self.free.setdefault(size, deque()).append((self.acquisitions, mapping))

    def _free_idle(self) -> None:
        """Frees memory unused for many acquisitions, which belonged to an earlier model."""
        for mappings in list(self.free.values()):
            with contextlib.suppress(IndexError):  # another thread may have taken it meanwhile
                while mappings[0][0] < self.acquisitions - _MAX_IDLE_ACQUISITIONS:
                    mappings.popleft()[1].close()

    def _new(self, size: int) -> mmap.mmap:
        """A new mapping, in huge pages if Linux provides them."""
        mapping = mmap.mmap(-1, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
        advise(_address(mapping), len(mapping))
        return mapping


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@functools.cache
def _memory() -> _Memory:
    return _Memory()
