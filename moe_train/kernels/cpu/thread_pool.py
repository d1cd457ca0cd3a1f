"""Thread pool over experts on the CPU: each thread computes whole experts, instead of all threads sharing each product.

A layer's products are small and many, and dividing each over threads costs a synchronisation per product. Batched
products avoid that but need padding, since loads differ; whole experts per thread need neither. Each thread uses one
core, so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import heapq
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_MIN_PARALLEL_FLOPS = 1e8  # below this, handing work to threads costs more than it saves
_MAX_IMBALANCE = 1.3  # if the largest load exceeds the mean by this factor, all threads share each product instead


def parallel_for(work: Callable[[Iterable[int]], None], rows: Sequence[int], flops_per_row: float) -> None:
    """Calls ``work`` on all experts (or other parts) that have rows, in several threads if that is faster.

    Args:
        work: is called with an iterable of expert ids, the largest first; it must be safe to run for different experts
            in parallel, and runs without gradients.
        rows: number of rows of each expert.
        flops_per_row: FLOPs per row.
    """
    busy = sorted((e for e, count in enumerate(rows) if count), key=lambda e: -rows[e])
    threads = min(_threads(sum(rows) * flops_per_row), len(busy))
    if threads < 2 or largest_load(busy, rows, threads) * threads > _MAX_IMBALANCE * sum(rows):
        work(busy)
        return
    inference = torch.is_inference_mode_enabled()
    queue = iter(busy)  # shared by the threads, so that a slow core takes fewer experts

    def call(_: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(queue)

    futures: list[Future[None]] = []
    try:
        for number in range(threads):
            futures.append(_executor(threads).submit(call, number))
        for future in futures:
            future.result()
    except BaseException:  # including Ctrl-C: the caller must not free memory that threads still write to
        for _ in queue:
            pass
        wait(futures)
        raise


def parallel_ranges(work: Callable[[int, int], None], rows: int, flops_per_row: float) -> None:
    """Calls ``work(start, end)`` on parts of 0 .. rows, one per thread of torch, as :func:`parallel_for` does."""
    step = max(1, -(-rows // torch.get_num_threads()))
    starts = range(0, rows, step)

    def call(parts: Iterable[int]) -> None:
        for part in parts:
            work(starts[part], min(starts[part] + step, rows))

    parallel_for(call, [min(start + step, rows) - start for start in starts], flops_per_row)


def largest_load(experts: Sequence[int], rows: Sequence[int], parts: int) -> int:
    """Rows of the largest of ``parts`` parts, if each expert in turn goes to the smallest part."""
    loads = [0] * parts
    for e in experts:
        heapq.heapreplace(loads, loads[0] + rows[e])
    return max(loads)


def _threads(flops: float) -> int:
    """Number of threads: torch's, or 1 if the work is small or a dispatch mode traces this thread's operators."""
    traced = _get_current_dispatch_mode() is not None
    return 1 if traced or flops < _MIN_PARALLEL_FLOPS else torch.get_num_threads()


@functools.lru_cache(maxsize=4)
def _executor(threads: int) -> ThreadPoolExecutor:
    """Threads that use one core each."""
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, "expert", initializer=_use_one_core)
    started = threading.Barrier(threads)
    list(executor.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(before)  # each start has changed torch's default for new threads
    return executor


def _use_one_core() -> None:
    """Limits this thread to one core, and shortens the busy waiting of GNU OpenMP's other threads.

    After each loop, GNU OpenMP's threads wait actively for the next one (5 to 7 ms, measured), which takes cores from
    this pool. With more threads than cores they wait a 300th of that (GOMP_SPINCOUNT). So each thread of this pool runs
    one loop over two threads, the second of which then sleeps: together with torch's threads that makes more threads
    than cores if half of the cores or more are in use.
    """
    torch.get_num_threads()  # the first call sets this thread's number from the default, only once
    torch.set_num_threads(2)
    torch.zeros(1 << 17).add_(1)
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_executor.cache_clear)  # threads do not exist in a forked process
