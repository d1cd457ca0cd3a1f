"""An ordered, bounded map over processes: the parent never reads further ahead than the workers need."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from moe_train.plugins import import_user_dir
from moe_train.utils.process import children_uninterrupted

A = TypeVar("A")
B = TypeVar("B")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LONGEST_BLOCK = 1 << 24


def blocks(items: Iterable[A], size: int, length: Callable[[A], int]) -> Iterator[list[A]]:
    """Cuts into lists of ``size``, and of fewer items where these have 16 million characters; the last may be shorter.

    Args:
        length: characters of an item.
    """
    block: list[A] = []
    characters = 0
    for item in items:
        block.append(item)
        characters += length(item)
        if len(block) == size or characters >= _LONGEST_BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


class Workers:
    """Worker processes that start when there is enough to do, and serve until the ``with`` block ends.

    Args:
        processes: how many (1: everything happens in the calling process).
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Like ``map``: results in the order of the items, at most three items a worker in flight.

        A single item is worked off in the calling process.
        """
        iterator = iter(items)
        head = list(islice(iterator, 2))
        if self.processes <= 1 or len(head) < 2:
            yield from map(function, head)
            yield from map(function, iterator)
            return
        pool = self._started()
        flying: deque[Future[B]] = deque()
        for item in chain(head, iterator):
            if len(flying) >= 3 * self.processes:
                yield flying.popleft().result()
            with children_uninterrupted():  # the pool starts its processes one by one, as items come
                flying.append(pool.submit(function, item))
        while flying:
            yield flying.popleft().result()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not fork: a progress bar's thread may hold a lock at that moment.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=import_user_dir)
        return self._pool
