"""Failures of processes: written by the process that fails, read by its parent, which shows the first one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_train.errors import UserError, first_line
from moe_train.launch.job.env import JOB
from moe_train.safe_text import for_terminal


@dataclass(frozen=True)
class Failure:
    """How a rank ended.

    Attributes:
        time: seconds since the epoch.
        what, where, remedy: of a :class:`UserError`; only ``what`` otherwise.
        trace: the traceback; empty for a UserError and for a process that was killed.
        user: whether it is a user error.
        killed: whether a signal ended the process; errors of other ranks are then its consequences.
        beside: other ranks that failed in the same way at the same time.
    """

    rank: int
    time: float
    what: str
    where: str = ""
    remedy: str = ""
    trace: str = ""
    user: bool = False
    killed: bool = False
    beside: list[int] = field(default_factory=list)

    def text(self, log: Path | None = None) -> str:
        """The message for the user: cause, trace, and last the remedy, so that a long trace does not hide it."""
        trace = f"\n{self.trace.rstrip()}" if self.trace else ""
        rest = f"\nIts log: {log}" if log is not None and log.is_file() else ""
        rest += f"\nWhat to do: {self.remedy}" if self.remedy else ""
        where = f"{self.where}: " if self.where else ""
        return f"rank {self.rank} failed first: {where}{self.what}.{trace}{rest}"

    def without_trace(self) -> Failure:
        """This failure as another rank reports it."""
        return replace(self, trace="")


class WorkerError(Exception):
    """A process that training started has failed, and not with a UserError."""

    def __init__(self, failure: Failure, log: Path | None) -> None:
        self.failure, self.log = failure, log
        super().__init__(failure, log)

    def __str__(self) -> str:
        return self.failure.text(self.log)


def failure_of(rank: int, error: BaseException) -> Failure:
    """The failure that an error of this process is."""
    if isinstance(error, WorkerError):
        return error.failure
    if isinstance(error, UserError):
        return Failure(rank, time.time(), error.what, error.where, error.remedy, user=True)
    trace = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    remedy = MEMORY if out_of_memory(error) else ""
    return Failure(rank, time.time(), what, remedy=remedy, trace=trace)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or a GPU had no memory left."""
    # By name: this module is imported before torch. GPUs raise torch.OutOfMemoryError, the CPU a RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)
    )


_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "not enough memory")
MEMORY = (
    "Lower training.tokens_per_update or raise training.accumulation (the same update in smaller pieces); set "
    "training.recompute=true; divide the experts over more ranks (layout.expert_parallel); or take engine=deepspeed, "
    "which shards the optimizer state. moe-plan predicts the memory of each of these."
)


def write_failure(path: Path, rank: int, error: BaseException, overrides: Sequence[str] | None = None) -> None:
    """Writes the failure of an error. Called by the failing process, or by its parent.

    Args:
        overrides: of the command line, for a run that may have failed before its config was written; None: left out.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    more = {} if overrides is None else {"overrides": list(overrides)}
    _write_atomically(path, asdict(failure_of(rank, error)) | more)


def store_failure(failure: Failure, rank: int, record: Path | None = None) -> None:
    """Writes a failure where the parent of this process reads it: our own launcher, or torchrun's agent.

    Errors of writing, such as a full disk, are ignored: the process must end all the same.

    Args:
        record: the run's failure.json, which moe-report reads; None: another rank writes it.
    """
    if record is not None:
        with suppress(OSError):
            _write_atomically(record, asdict(failure))
    with suppress(OSError):
        if JOB in os.environ:
            _write_atomically(failure_file(Path(os.environ[JOB]), rank), asdict(failure))
        elif path := agent_error_file():
            write_agent_error(failure, Path(path))


def _write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """The process may be killed while it writes, and two threads or ranks may write at the same time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def agent_error_file() -> str:
    """File from which torchrun's agent reads why this process ended; empty without an agent."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "")


def write_agent_error(failure: Failure, path: Path) -> None:
    """Writes a failure in the form that torchrun's agent reads and shows under "Root Cause"."""
    text = for_terminal(failure.text())  # the agent prints it unchanged
    extra = {"py_callstack": text, "timestamp": str(int(failure.time))}
    _write_atomically(path, {"message": {"message": text, "extraInfo": extra}})


def failure_file(job: Path, rank: int) -> Path:
    """Where a rank that :func:`moe_train.launch.local.launch` has started writes its failure."""
    return job / f"failure_{rank}.json"


def read_failure(path: Path, rank: int, code: int, noticed: float) -> Failure:
    """The failure of a process that ended with ``code`` (negative: by a signal). Called by its parent.

    Made from the code where the process has written no failure that can be read.
    """
    with suppress(OSError, ValueError, TypeError):
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    if code >= 0:
        return Failure(rank, noticed, f"it ended with exit code {code}")
    name = signal.Signals(-code).name
    remedy = _KILLED + MEMORY if name == "SIGKILL" else ""
    return Failure(rank, noticed, f"it was killed by {name} (exit code {code})", remedy=remedy, killed=True)


_KILLED = (
    "If no user killed it, the kernel did because the host ran out of memory (see 'dmesg | grep -i oom'), or the "
    "scheduler did at the job's memory limit. "
)


def first_failure(failures: list[Failure]) -> Failure:
    """That of a killed process before errors of others; otherwise the earliest."""
    return min(failures, key=lambda failure: (not failure.killed, failure.time))


_SECONDARY_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
)


def is_secondary_error(error: BaseException) -> bool:
    """Whether an error only says that another process has ended, or that the network between them is down."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "_DistError" in kinds or "DistError" in kinds or any(word in str(error) for word in _SECONDARY_ERRORS)


def connection_failure(rank: int, error: BaseException) -> Failure:
    """The failure of a rank that has lost the connection to another one, which has reported no cause."""
    message = first_line(error)
    if "Timed out" in message or "Timeout" in message:
        what = f"a collective did not end in time ({message})"
    else:
        what = f"its connection to another rank broke ({message})"
    return Failure(rank, time.time(), what, remedy=_CONNECTION_LOST, trace="".join(traceback.format_exception(error)))


_CONNECTION_LOST = (
    "The other rank was killed or stopped, or its host or the network between the hosts is down: look at the other "
    "hosts' output and logs/rank_N.log. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set the interface of gloo and NCCL. "
    "The same command resumes from the last checkpoint."
)
