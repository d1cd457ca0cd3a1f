"""Work side by side on the CPU: each thread takes whole experts, instead of all threads sharing every product.

A layer's products are small and many; dividing each over threads costs a rendezvous a product. Batched products spare
that, but loads differ, so they would need padding; whole experts per thread need neither. Each thread computes with one
core, so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_WORTHWHILE_FLOPS = 1e7  # below this, handing work over costs more than it saves
_UNEVEN = 1.3  # where the fullest thread has more than this times its share, all threads share every product


def over_parts(work: Callable[[Sequence[int]], None], rows: Sequence[int], flops_per_row: float) -> None:
    """Calls ``work`` on all experts (or other pieces) that have rows, in parts, at the same time where that pays.

    Args:
        work: gets numbers of experts; parts must not touch the same memory, and gradients are not recorded in it.
        rows: of each expert.
        flops_per_row: how much work a row is.
    """
    busy = [e for e, count in enumerate(rows) if count]
    parts = divide(busy, rows, _threads(sum(rows) * flops_per_row))
    if len(parts) < 2 or max(sum(rows[e] for e in part) for part in parts) * len(parts) > _UNEVEN * sum(rows):
        work(busy)
        return
    inference = torch.is_inference_mode_enabled()

    def call(part: Sequence[int]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    list(_executor(len(parts)).map(call, parts))


def divide(experts: Sequence[int], rows: Sequence[int], parts: int) -> list[list[int]]:
    """Experts in at most ``parts`` parts of about equal rows: the fullest first, each to the emptiest part."""
    divided: list[list[int]] = [[] for _ in range(max(1, min(parts, len(experts))))]
    filled = [0] * len(divided)
    for e in sorted(experts, key=lambda e: -rows[e]):
        emptiest = filled.index(min(filled))
        divided[emptiest].append(e)
        filled[emptiest] += rows[e]
    return divided


def _threads(flops: float) -> int:
    """How many threads to use: those of torch, unless the work is small or someone watches this thread's operators."""
    watched = _get_current_dispatch_mode() is not None
    return 1 if watched or flops < _WORTHWHILE_FLOPS else torch.get_num_threads()


@functools.lru_cache(maxsize=4)
def _executor(threads: int) -> ThreadPoolExecutor:
    """Threads that compute with one core each."""
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, "expert", initializer=_use_one_core)
    started = threading.Barrier(threads)
    list(executor.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(before)  # each start has set torch's default for threads to come
    return executor


def _use_one_core() -> None:
    torch.get_num_threads()  # a thread's own number is first set from the default, and that only once
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_executor.cache_clear)  # threads do not live on in a forked process
