"""A rank that hangs is found by a time limit, by a thread of each rank that needs no collective.

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
from moe_train.launch.job.failures import Failure, leave_failure, tell_agent
from moe_train.launch.job.hard_exit import leave, within
from moe_train.launch.job.job_channel import JobChannel
from moe_train.launch.watchdog.diagnosis import blocking_ranks, failure, failure_of_silent, silent_ranks
from moe_train.launch.watchdog.status import ALIVE, RankStatus, born, condition, entered, rank_status, set_time_limit
from moe_train.safe_text import for_terminal
from moe_train.training.run.run_folder import FAILURE
from moe_train.training.runtime.world import World

MARGIN = 15.0  # seconds that torch's own limits come after ours, since it knows who waits but not for whom
_SLOWEST, _QUICKEST = 5.0, 0.2  # seconds between beats
_HEARING = 3.0  # seconds, at least, within which a rank must say something new, or it is silent
_TELLING = 3.0  # seconds that each step of telling the others and the user may take, whatever disk, screen and store do
_LOG = logging.getLogger(__name__)
_STILL = 3  # beats without progress until a rank says which collective it stands in


@contextmanager
def hang_watchdog(world: World, channel: JobChannel, limit: float, silence: float = 0.0) -> Iterator[None]:
    """While entered, this rank tells how far it has come, and ends with the others when one of them hangs.

    Args:
        limit: seconds that a rank may wait for the others.
        silence: seconds that it may wait for one of which nothing is heard; 0: there is no such limit.
    """
    thread = _Watchdog(world, channel, limit, silence)
    thread.say()  # so that nobody is unknown to the others, whatever happens next
    thread.start()
    try:
        yield
    finally:
        thread.done.set()
        thread.join(_SLOWEST)


class _Watchdog(threading.Thread):
    def __init__(self, world: World, channel: JobChannel, limit: float, silence: float = 0.0) -> None:
        super().__init__(name="watch", daemon=True)
        self.world, self.channel, self.limit, self.silence = world, channel, limit, silence
        # Thousands of ranks share one store: each speaks less often then.
        self.pause = max(_QUICKEST, min(_SLOWEST, min(limit, silence or limit) / 20), world.size / 400)
        self.done = threading.Event()
        self.number = 0
        # When this thread first saw the marks and collectives that it sees now: up to a pause after they came.
        self.moved, self.progress = time.monotonic(), (-1, dict[str, int]())
        self.limited: set[str] = set()
        # When, and what the others said then: what the next reading is compared with. None unless this rank waits.
        self.heard: tuple[float, dict[int, RankStatus]] | None = None
        # The last time that this thread came to look: long ago means that the store or this host was slow, not others.
        self.turn = time.monotonic()

    def run(self) -> None:
        while not self.done.wait(self.pause):
            # The store may be gone because the run is over, or with the host that held it: torch's own limits remain.
            # Nothing else may end this thread either, on which the others' end depends.
            try:
                set_time_limit(self.limited, timedelta(seconds=self.limit + MARGIN))
                verdict = self._verdict()
            except (dist.DistError, RuntimeError, OSError):
                self.heard = None
                continue
            except Exception:
                _LOG.exception("the watch for ranks that hang goes on after an error")
                continue
            if verdict is not None and not self.done.is_set():
                self._execute(verdict)

    def _verdict(self) -> Failure | None:
        """The verdict that holds, which may be ours."""
        still = self.say()
        if verdict := self.channel.verdict():
            return verdict
        if still > self.limit and (found := self._diagnose()):
            return self.channel.first_verdict(found)
        if self.silence and (found := self._fallen_silent(still)):
            return self.channel.first_verdict(found)
        return None

    def _fallen_silent(self, still: float) -> Failure | None:
        """Whether ranks have said nothing for the shorter limit, while this one waited and the store was quick.

        Here silence itself is the fault, so two readings a whole limit apart are compared. :meth:`_diagnose` knows that
        its rank has waited for the limit, and only asks who still speaks: two readings seconds apart tell.
        """
        before, self.turn = self.turn, time.monotonic()
        late = self.turn - before > 3 * self.pause + 1  # then the others may not have come to a word either
        if late or still < self.pause:
            self.heard = None
            return None
        if self.heard is None:
            self.heard = self.turn, self._statuses()
        since, earlier = self.heard
        if self.turn - since < max(self.silence, 3 * self.pause):
            return None
        later = self._statuses()
        self.heard = self.turn, later
        silent = silent_ranks(earlier, later)
        if not silent or self.world.rank in silent or not later[self.world.rank].pending:
            return None
        first = later[silent[0]]
        return failure_of_silent(later, silent, self.silence, self._look(first, True), _age(first))

    def say(self) -> float:
        """Tells the others; gives the seconds that this rank has stood still."""
        progress = self.world.pulse.beats, entered()
        if progress != self.progress:
            self.moved, self.progress = time.monotonic(), progress
        still = time.monotonic() - self.moved  # after the reset: a beat tells of one moment
        look = still > _STILL * self.pause
        own = rank_status(self.world.rank, self.number, still, self.world.pulse, progress[1], look)
        self.number += 1
        self.channel.put(f"beat/{own.rank}", json.dumps(asdict(own)))
        return still

    def _diagnose(self) -> Failure | None:
        """Reads what all ranks said, twice: who says nothing new in between is silent."""
        earlier = self._statuses()
        deadline = time.monotonic() + max(_HEARING, 2.5 * self.pause)
        while time.monotonic() < deadline:
            if self.done.wait(self.pause) or self.say() < self.limit:
                return None
        later = self._statuses()
        silent = silent_ranks(earlier, later)
        blocking = blocking_ranks(later, silent)
        if not blocking or self.world.rank in blocking:
            return None
        first = later[blocking[0]]
        ago = _age(first) if first.rank in silent else None
        return failure(later, blocking, self.limit, self._look(first, ago is not None), ago)

    def _statuses(self) -> dict[int, RankStatus]:
        found = self.channel.get_all([f"beat/{rank}" for rank in range(self.world.size)])
        return {rank: _status_of(rank, text) for rank, text in enumerate(found)}

    def _look(self, other: RankStatus, silent: bool) -> str:
        here = other.host == socket.gethostname() and born(other.pid) in ("", other.born)
        known = condition(other.pid) if here else ""
        if silent and known in ("", ALIVE):
            return "silent: it is stuck, or its host or the network between the hosts is down"
        return known

    def _execute(self, verdict: Failure) -> NoReturn:
        """Ends this process, whatever fails on the way; the main thread stands in a collective and cannot do it."""
        try:
            hanging = verdict.rank, *verdict.beside  # they may be unable to say anything
            speaker = self.world.rank == next(rank for rank in range(self.world.size) if rank not in hanging)
            self._tell(verdict, speaker)
            # The first end makes an agent end the rest, the speaker too.
            if speaker:
                within(_TELLING, self.channel.shown)
            else:
                within(2 * _TELLING, lambda: self.channel.wait_until_shown(_TELLING))
            if not has_our_parent() and self.world.rank not in hanging:
                statuses = within(_TELLING, self._statuses) or {}
                for rank in hanging:
                    if rank in statuses:
                        kill_process(statuses[rank], verdict)
        finally:
            leave(1)

    def _tell(self, found: Failure, speaker: bool) -> None:
        folder = self.world.pulse.run
        record = folder / FAILURE if speaker and folder is not None else None
        leave_failure(found if speaker or has_our_parent() else found.retold(), self.world.rank, record)
        if speaker and not has_our_parent():
            within(_TELLING, lambda: print(for_terminal(f"Failed: {found.text()}"), file=sys.stderr, flush=True))


def _status_of(rank: int, text: str | None) -> RankStatus:
    if text:
        return RankStatus(**json.loads(text))
    return RankStatus(rank, -1, 0.0, 0, "getting ready", altered=text is None)


def _age(last: RankStatus) -> float:
    """Seconds since a beat was said, by two hosts' clocks."""
    return max(0.0, time.time() - last.said)


def kill_process(hanging: RankStatus, verdict: Failure) -> None:
    """Ends a process of this host that hangs: launchers give it half a minute more, or for ever.

    The cause is left in its name: its agent may notice its end before that of those who waited for it.
    """
    if hanging.host == socket.gethostname() and born(hanging.pid) == hanging.born:
        if hanging.report:
            with suppress(OSError):  # such as a full disk
                tell_agent(verdict.retold(), Path(hanging.report))
        with suppress(ProcessLookupError, PermissionError):
            os.kill(hanging.pid, signal.SIGKILL)
