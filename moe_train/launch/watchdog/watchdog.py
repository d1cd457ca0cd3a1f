"""Finds ranks that hang, by a time limit: a thread in each rank, which needs no collective.

Each rank writes its progress (:class:`RankStatus`) to the job's store every few seconds. A rank without progress for
``launch.timeout_minutes`` reads the status of the others. Where a rank is behind, or no longer writes, the cause is
written for all ranks and every process ends. Ranks that compute for hours while no other rank waits are left alone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from moe_train.launch.job.env import has_our_parent
from moe_train.launch.job.failures import Failure, store_failure, write_agent_error
from moe_train.launch.job.hard_exit import exit_now, run_with_timeout
from moe_train.launch.job.job_channel import JobChannel
from moe_train.launch.watchdog.diagnosis import blocking_ranks, hang_failure, silence_failure, silent_ranks
from moe_train.launch.watchdog.status import (
    ALIVE,
    RankStatus,
    collective_counts,
    process_start_time,
    process_state,
    rank_status,
    set_time_limit,
)
from moe_train.safe_text import for_terminal
from moe_train.training.run.run_folder import FAILURE
from moe_train.training.runtime.world import World

MARGIN = 15.0  # seconds between our limit and torch's, which knows the rank that waits but not the one it waits for
_MAX_INTERVAL, _MIN_INTERVAL = 5.0, 0.2  # seconds between two statuses of a rank
_STATUS_TIMEOUT = 3.0  # seconds, at least, within which a rank must write a new status, or it counts as silent
_STEP_TIMEOUT = 3.0  # seconds for each step of reporting a failure: disk, terminal and store may block
_LOG = logging.getLogger(__name__)
_PENDING_AFTER = 3  # intervals without progress until a rank's status names the collective that it is in


@contextmanager
def hang_watchdog(world: World, channel: JobChannel, limit: float, silence: float = 0.0) -> Iterator[None]:
    """While entered, this rank writes its status, and all ranks end when one of them hangs.

    Args:
        limit: seconds that a rank may wait for the others.
        silence: seconds that a rank may wait for one that writes no status; 0: no such limit.
    """
    thread = _Watchdog(world, channel, limit, silence)
    thread.write_status()  # so that every rank has one, whatever happens next
    thread.start()
    try:
        yield
    finally:
        thread.done.set()
        thread.join(_MAX_INTERVAL)


class _Watchdog(threading.Thread):
    def __init__(self, world: World, channel: JobChannel, limit: float, silence: float = 0.0) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world, self.channel, self.limit, self.silence = world, channel, limit, silence
        # All ranks share one store: with thousands of them each writes less often.
        self.interval = max(_MIN_INTERVAL, min(_MAX_INTERVAL, min(limit, silence or limit) / 20), world.size / 400)
        self.done = threading.Event()
        self.sequence = 0
        # Progress marks and collective counts, and when this thread first saw them, up to an interval after the change.
        self.last_progress, self.progress = time.monotonic(), (-1, dict[str, int]())
        self.limited_groups: set[str] = set()
        # Time and content of the last reading of all statuses, for comparison; None unless this rank waits.
        self.last_reading: tuple[float, dict[int, RankStatus]] | None = None
        # Time of this thread's last check: if that is long ago, the store or this host was slow, not the other ranks.
        self.last_check = time.monotonic()

    def run(self) -> None:
        while not self.done.wait(self.interval):
            # The store is gone when the run is over, or when its host is lost: then torch's own limits remain.
            # No other error may end this thread, since ending the job depends on it.
            try:
                set_time_limit(self.limited_groups, timedelta(seconds=self.limit + MARGIN))
                diagnosis = self._check()
            except (dist.DistError, RuntimeError, OSError):
                self.last_reading = None
                continue
            except Exception:
                _LOG.exception("an error in the hang watchdog; it continues")
                continue
            if diagnosis is not None and not self.done.is_set():
                self._end_process(diagnosis)

    def _check(self) -> Failure | None:
        """The diagnosis of the job, of this rank or of another; None while no rank hangs."""
        idle_seconds = self.write_status()
        if diagnosis := self.channel.diagnosis():
            return diagnosis
        if idle_seconds > self.limit and (found := self._diagnose()):
            return self.channel.first_diagnosis(found)
        if self.silence and (found := self._find_silent(idle_seconds)):
            return self.channel.first_diagnosis(found)
        return None

    def _find_silent(self, idle_seconds: float) -> Failure | None:
        """The failure of ranks that wrote no status for the shorter limit while this rank waited and could read.

        Here the missing status itself is the fault, so two readings a whole limit apart are compared. In
        :meth:`_diagnose` this rank has already waited for the limit, so two readings seconds apart are enough.
        """
        before, self.last_check = self.last_check, time.monotonic()
        late = self.last_check - before > 3 * self.interval + 1  # then the other ranks may have been late, too
        if late or idle_seconds < self.interval:
            self.last_reading = None
            return None
        if self.last_reading is None:
            self.last_reading = self.last_check, self._statuses()
        since, earlier = self.last_reading
        if self.last_check - since < max(self.silence, 3 * self.interval):
            return None
        later = self._statuses()
        self.last_reading = self.last_check, later
        silent = silent_ranks(earlier, later)
        if not silent or self.world.rank in silent or not later[self.world.rank].pending:
            return None
        first = later[silent[0]]
        return silence_failure(later, silent, self.silence, self._process_state(first, True), _age(first))

    def write_status(self) -> float:
        """Writes this rank's status to the job's store; returns the seconds since its last progress."""
        progress = self.world.progress.beats, collective_counts()
        if progress != self.progress:
            self.last_progress, self.progress = time.monotonic(), progress
        idle_seconds = time.monotonic() - self.last_progress  # after the reset: all of a status is of one moment
        with_pending = idle_seconds > _PENDING_AFTER * self.interval
        own = rank_status(self.world.rank, self.sequence, idle_seconds, self.world.progress, progress[1], with_pending)
        self.sequence += 1
        self.channel.put(f"status/{own.rank}", json.dumps(asdict(own)))
        return idle_seconds

    def _diagnose(self) -> Failure | None:
        """Reads the status of all ranks twice: a rank that wrote none in between is silent."""
        earlier = self._statuses()
        deadline = time.monotonic() + max(_STATUS_TIMEOUT, 2.5 * self.interval)
        while time.monotonic() < deadline:
            if self.done.wait(self.interval) or self.write_status() < self.limit:
                return None
        later = self._statuses()
        silent = silent_ranks(earlier, later)
        blocking = blocking_ranks(later, silent)
        if not blocking or self.world.rank in blocking:
            return None
        first = later[blocking[0]]
        age = _age(first) if first.rank in silent else None
        return hang_failure(later, blocking, self.limit, self._process_state(first, age is not None), age)

    def _statuses(self) -> dict[int, RankStatus]:
        found = self.channel.get_all([f"status/{rank}" for rank in range(self.world.size)])
        return {rank: _status_of(rank, text) for rank, text in enumerate(found)}

    def _process_state(self, other: RankStatus, silent: bool) -> str:
        local = other.host == socket.gethostname() and process_start_time(other.pid) in ("", other.started_at)
        state = process_state(other.pid) if local else ""
        if silent and state in ("", ALIVE):
            return "no status received: it is stuck, or its host or the network between the hosts is down"
        return state

    def _end_process(self, diagnosis: Failure) -> NoReturn:
        """Ends this process, whatever fails on the way; the main thread is inside a collective and cannot do it."""
        try:
            hanging = diagnosis.rank, *diagnosis.beside  # they may be unable to report anything
            reports = self.world.rank == next(rank for rank in range(self.world.size) if rank not in hanging)
            self._report(diagnosis, reports)
            # When the first process ends, torchrun's agent ends the rest, the one that reports too.
            if reports:
                run_with_timeout(_STEP_TIMEOUT, self.channel.mark_shown)
            else:
                run_with_timeout(2 * _STEP_TIMEOUT, lambda: self.channel.wait_until_shown(_STEP_TIMEOUT))
            if not has_our_parent() and self.world.rank not in hanging:
                statuses = run_with_timeout(_STEP_TIMEOUT, self._statuses) or {}
                for rank in hanging:
                    if rank in statuses:
                        kill_process(statuses[rank], diagnosis)
        finally:
            exit_now(1)

    def _report(self, diagnosis: Failure, reports: bool) -> None:
        folder = self.world.progress.run
        record = folder / FAILURE if reports and folder is not None else None
        failure = diagnosis if reports or has_our_parent() else diagnosis.without_trace()
        store_failure(failure, self.world.rank, record)
        if reports and not has_our_parent():
            run_with_timeout(
                _STEP_TIMEOUT, lambda: print(for_terminal(f"Failed: {diagnosis.text()}"), file=sys.stderr, flush=True)
            )


def _status_of(rank: int, text: str | None) -> RankStatus:
    if text:
        return RankStatus(**json.loads(text))
    return RankStatus(rank, -1, 0.0, 0, "getting ready", tampered=text is None)


def _age(last: RankStatus) -> float:
    """Seconds since a status was written; the clocks of two hosts may differ."""
    return max(0.0, time.time() - last.written_at)


def kill_process(hanging: RankStatus, diagnosis: Failure) -> None:
    """Ends a process of this host that hangs: launchers would wait half a minute for it, or without end.

    Its error file is written first: its agent may notice its end before that of the ranks that waited for it.
    """
    if hanging.host == socket.gethostname() and process_start_time(hanging.pid) == hanging.started_at:
        if hanging.error_file:
            with suppress(OSError):  # such as a full disk
                write_agent_error(diagnosis.without_trace(), Path(hanging.error_file))
        with suppress(ProcessLookupError, PermissionError):
            os.kill(hanging.pid, signal.SIGKILL)
