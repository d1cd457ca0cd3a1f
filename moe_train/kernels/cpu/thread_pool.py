"""Work side by side on the CPU: each thread takes whole experts, instead of all threads sharing every product.

A layer's products are small and many; dividing each over threads costs a rendezvous a product. Batched products spare
that, but loads differ, so they would need padding; whole experts per thread need neither. Each thread computes with one
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

_WORTHWHILE_FLOPS = 1e8  # below this, handing work over costs more than it saves
_UNEVEN = 1.3  # where the fullest thread has more than this times its share, all threads share every product


def parallel_for(work: Callable[[Iterable[int]], None], rows: Sequence[int], flops_per_row: float) -> None:
    """Calls ``work`` on all experts (or other pieces) that have rows, in several threads where that pays.

    Args:
        work: gets numbers of experts, the fullest first; experts must not touch the same memory, and gradients are not
            recorded in it.
        rows: of each expert.
        flops_per_row: how much work a row is.
    """
    busy = sorted((e for e, count in enumerate(rows) if count), key=lambda e: -rows[e])
    threads = min(_threads(sum(rows) * flops_per_row), len(busy))
    if threads < 2 or largest_part(busy, rows, threads) * threads > _UNEVEN * sum(rows):
        work(busy)
        return
    inference = torch.is_inference_mode_enabled()
    queue = iter(busy)  # each thread takes the next, so that a slow core takes fewer

    def call(_: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(queue)

    futures: list[Future[None]] = []
    try:
        for number in range(threads):
            futures.append(_executor(threads).submit(call, number))
        for future in futures:
            future.result()
    except BaseException:  # Ctrl-C too: whoever called must not let go of memory that is being written
        for _ in queue:
            pass
        wait(futures)
        raise


def largest_part(experts: Sequence[int], rows: Sequence[int], parts: int) -> int:
    """Rows of the fullest of ``parts`` parts, where each expert in turn goes to the emptiest."""
    filled = [0] * parts
    for e in experts:
        heapq.heapreplace(filled, filled[0] + rows[e])
    return max(filled)


def _threads(flops: float) -> int:
    """How many threads to use: those of torch, unless the work is small or someone watches this thread's operators."""
    hang_watchdog = _get_current_dispatch_mode() is not None
    return 1 if hang_watchdog or flops < _WORTHWHILE_FLOPS else torch.get_num_threads()


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
    """Computes with one core from now on, and makes OpenMP's other threads leave the cores while they have no work.

    After each of its loops, GNU OpenMP's threads wait for the next one awake (5 to 7 ms, measured), and our threads
    would lack their cores. With more threads than there are cores it waits a 300th of that (its GOMP_SPINCOUNT).
    Hence one loop here over two threads, the second of which then sleeps for good: with those of torch that makes more
    than there are cores wherever half of the cores or more are in use.
    """
    torch.get_num_threads()  # a thread's own number is first set from the default, and that only once
    torch.set_num_threads(2)
    torch.zeros(1 << 17).add_(1)
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_executor.cache_clear)  # threads do not live on in a forked process
