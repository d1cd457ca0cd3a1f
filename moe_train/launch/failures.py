"""What a process leaves behind when it fails, so that its parent can show the first failure and not the echo of it."""

from __future__ import annotations

import json
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_train.errors import UserError


@dataclass(frozen=True)
class Failure:
    """How a rank ended.

    Attributes:
        time: seconds since the epoch.
        what, where, remedy: of a :class:`UserError`; ``what`` alone otherwise.
        trace: the traceback; empty for a UserError and for a process that was killed.
        user: whether it is the user's to mend.
        killed: whether a signal ended it. Then other ranks' errors are echoes.
    """

    rank: int
    time: float
    what: str
    where: str = ""
    remedy: str = ""
    trace: str = ""
    user: bool = False
    killed: bool = False


class WorkerError(Exception):
    """A process that training started has failed, and it is not a mistake of the user's that we know of."""

    def __init__(self, failure: Failure, log: Path | None) -> None:
        self.failure, self.log = failure, log
        super().__init__(failure, log)

    def __str__(self) -> str:
        failure = self.failure
        log = f"\nIts log: {self.log}" if self.log is not None and self.log.is_file() else ""
        trace = f"\n{failure.trace.rstrip()}" if failure.trace else ""
        remedy = f" {failure.remedy}" if failure.remedy else ""
        return f"rank {failure.rank} failed first: {failure.what}.{remedy}{trace}{log}"


def write_failure(path: Path, rank: int, error: BaseException) -> None:
    """Called by the failing process, or by its parent, which hands on what it has read."""
    if isinstance(error, WorkerError):
        failure = error.failure
    elif isinstance(error, UserError):
        failure = Failure(rank, time.time(), error.what, error.where, error.remedy, user=True)
    else:
        trace = "".join(traceback.format_exception(error))
        failure = Failure(rank, time.time(), f"{type(error).__name__}: {error}".splitlines()[0], trace=trace)
    path.write_text(json.dumps(asdict(failure)), encoding="utf-8")


def read_failure(path: Path, rank: int, code: int, noticed: float) -> Failure:
    """Called by the parent, for a process that ended with ``code`` (negative: by a signal)."""
    if path.is_file():
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    if code >= 0:
        return Failure(rank, noticed, f"it ended with exit code {code}")
    name = signal.Signals(-code).name
    remedy = "Perhaps the host ran out of memory: lower training.tokens_per_update or raise training.accumulation."
    return Failure(rank, noticed, f"it was killed by {name}", remedy=remedy if name == "SIGKILL" else "", killed=True)


def first_failure(failures: list[Failure]) -> Failure:
    """A killed process comes before its neighbours' errors, otherwise the earliest."""
    return min(failures, key=lambda failure: (not failure.killed, failure.time))
