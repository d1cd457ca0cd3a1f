"""An ordered map over processes with bounded read-ahead."""

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
    """Splits items into lists of ``size``, or shorter lists that have reached 16 million characters.

    Args:
        length: number of characters of an item.
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
    """Worker processes, started on the first :meth:`map` of several items and stopped at the end of the ``with`` block.

    Args:
        processes: number of processes (1: everything runs in the calling process).
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
        """Like ``map``: results in the order of the items, with at most three pending items per worker.

        A single item is processed in the calling process.
        """
        iterator = iter(items)
        head = list(islice(iterator, 2))
        if self.processes <= 1 or len(head) < 2:
            yield from map(function, head)
            yield from map(function, iterator)
            return
        pool = self._started()
        pending: deque[Future[B]] = deque()
        for item in chain(head, iterator):
            if len(pending) >= 3 * self.processes:
                yield pending.popleft().result()
            with children_uninterrupted():  # submit may start a process
                pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not fork: a progress bar's thread may hold a lock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=import_user_dir)
        return self._pool
