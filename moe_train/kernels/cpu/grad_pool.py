"""Weight gradients in memory that is used again when they are freed, step after step, on the CPU.

A gradient of many megabytes comes from the kernel anew in every step, which clears each page first: of a step of many
small experts that is a quarter (docs/decisions/0009). Here the memory of a freed gradient waits for the next of the
same size, which in training is the same parameter's, one step later. So between steps a process keeps what its
gradients took, as it would if they were set to zero instead of being freed.
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

_PATIENCE = 256  # loans: more than one step of a hundred sparse layers makes


def gradient_like(weight: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor like ``weight``; if it is large and on the CPU, in memory used again."""
    size = weight.numel() * weight.element_size()
    if size < LARGE or weight.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return empty_like(weight)
    lent = _memory().acquire(size)
    return torch.frombuffer(lent, dtype=weight.dtype, count=weight.numel()).view(weight.shape)


class _Memory:
    """Mappings by size, each with the number of the loan at which it came back, the oldest first.

    Deques, because a tensor may be freed at any time, in any thread.
    """

    def __init__(self) -> None:
        self.free: dict[int, deque[tuple[int, mmap.mmap]]] = {}
        self.loans = 0

    def acquire(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """Memory of so many bytes, which comes back when nobody has it any more."""
        self.loans += 1
        self._give_up_old()
        try:
            _, mapping = self.free[size].pop()
        except (KeyError, IndexError):
            mapping = self._new(size)
        lent = (ctypes.c_char * size).from_address(_address(mapping))
        weakref.finalize(lent, self._take_back, size, mapping).atexit = False
        return lent

    def _take_back(self, size: int, mapping: mmap.mmap) -> None:
        self.free.setdefault(size, deque()).append((self.loans, mapping))

    def _give_up_old(self) -> None:
        """What has waited for many loans is some earlier model's."""
        for mappings in list(self.free.values()):
            with contextlib.suppress(IndexError):  # another thread may have taken it meanwhile
                while mappings[0][0] < self.loans - _PATIENCE:
                    mappings.popleft()[1].close()

    def _new(self, size: int) -> mmap.mmap:
        """A mapping that stands in huge pages where Linux lends them."""
        mapping = mmap.mmap(-1, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
        advise(_address(mapping), len(mapping))
        return mapping


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@functools.cache
def _memory() -> _Memory:
    return _Memory()
