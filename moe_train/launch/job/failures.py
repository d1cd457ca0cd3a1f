"""What a process leaves behind when it fails, so that its parent can show the first failure and not the echo of it."""

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

from moe_train.errors import UserError
from moe_train.launch.job.env import JOB
from moe_train.safe_text import for_terminal


@dataclass(frozen=True)
class Failure:
    """How a rank ended.

    Attributes:
        time: seconds since the epoch.
        what, where, remedy: of a :class:`UserError`; ``what`` alone otherwise.
        trace: the traceback; empty for a UserError and for a process that was killed.
        user: whether it is the user's to mend.
        killed: whether a signal ended it. Then other ranks' errors are echoes.
        beside: other ranks that have failed in the same way at the same time.
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
        """What the user reads: the cause, the trace, and last, where a long trace cannot hide it, the remedy."""
        trace = f"\n{self.trace.rstrip()}" if self.trace else ""
        rest = f"\nIts log: {log}" if log is not None and log.is_file() else ""
        rest += f"\nWhat to do: {self.remedy}" if self.remedy else ""
        where = f"{self.where}: " if self.where else ""
        return f"rank {self.rank} failed first: {where}{self.what}.{trace}{rest}"

    def retold(self) -> Failure:
        """As another rank tells it: without the trace."""
        return replace(self, trace="")


class WorkerError(Exception):
    """A process that training started has failed, and it is not a mistake of the user's that we know of."""

    def __init__(self, failure: Failure, log: Path | None) -> None:
        self.failure, self.log = failure, log
        super().__init__(failure, log)

    def __str__(self) -> str:
        return self.failure.text(self.log)


def failure_of(rank: int, error: BaseException) -> Failure:
    """What is known of an error of this process."""
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
    # By name: this module is read before torch is. GPUs raise torch.OutOfMemoryError, the CPU a RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)
    )


_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "not enough memory")
MEMORY = (
    "Lower training.tokens_per_update or raise training.accumulation (the same update in smaller pieces); set "
    "training.recompute=true; divide the experts over more ranks (layout.expert_parallel); or take engine=deepspeed, "
    "which shares out the optimizer's state. moe-plan tells the memory of each beforehand."
)


def write_failure(path: Path, rank: int, error: BaseException, overrides: Sequence[str] | None = None) -> None:
    """Called by the failing process, or by its parent, which hands on what it has read.

    Args:
        overrides: the words of the command line, for a run that may not have come to write its config; None: left out.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    words = {} if overrides is None else {"overrides": list(overrides)}
    _write_whole(path, asdict(failure_of(rank, error)) | words)


def leave_failure(failure: Failure, rank: int, record: Path | None = None) -> None:
    """Leaves a failure where whoever started this process looks for it: our own parent, or torchrun's agent.

    What cannot be written, such as on a full disk, is left out: the process must end all the same.

    Args:
        record: the run's failure.json, where moe-report looks; None: another rank writes it.
    """
    if record is not None:
        with suppress(OSError):
            _write_whole(record, asdict(failure))
    with suppress(OSError):
        if JOB in os.environ:
            _write_whole(failure_file(Path(os.environ[JOB]), rank), asdict(failure))
        elif path := agents_file():
            tell_agent(failure, Path(path))


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """All of it or nothing: the process may be killed meanwhile, and two threads, or ranks, may write at a time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def agents_file() -> str:
    """Where torchrun's agent looks for the cause when this process has ended; empty without an agent."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "")


def tell_agent(failure: Failure, path: Path) -> None:
    """Writes a failure in the form that torchrun's agent reads and shows under "Root Cause"."""
    text = for_terminal(failure.text())  # the agent prints it as it is
    extra = {"py_callstack": text, "timestamp": str(int(failure.time))}
    _write_whole(path, {"message": {"message": text, "extraInfo": extra}})


def failure_file(job: Path, rank: int) -> Path:
    """Where a rank that :func:`moe_train.launch.local.launch` has started leaves its failure."""
    return job / f"failure_{rank}.json"


def read_failure(path: Path, rank: int, code: int, noticed: float) -> Failure:
    """Called by the parent, for a process that ended with ``code`` (negative: by a signal).

    Where it has left no word that can be read, the code is what is known.
    """
    with suppress(OSError, ValueError, TypeError):
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    if code >= 0:
        return Failure(rank, noticed, f"it ended with exit code {code}")
    name = signal.Signals(-code).name
    remedy = _KILLED + MEMORY if name == "SIGKILL" else ""
    return Failure(rank, noticed, f"it was killed by {name} (exit code {code})", remedy=remedy, killed=True)


_KILLED = (
    "If nobody killed it, the kernel did because the host ran out of memory ('dmesg | grep -i oom' tells, and a "
    "scheduler's memory limit does the same). "
)


def first_failure(failures: list[Failure]) -> Failure:
    """A killed process comes before its neighbours' errors, otherwise the earliest."""
    return min(failures, key=lambda failure: (not failure.killed, failure.time))


_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
)


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another process has gone, or that a network between them is down."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "_DistError" in kinds or "DistError" in kinds or any(word in str(error) for word in _ECHOES)


def lost(rank: int, error: BaseException) -> Failure:
    """The failure of a rank that has lost another one, which left no word."""
    said = str(error).splitlines()[0]
    if "Timed out" in said or "Timeout" in said:
        what = f"a collective did not end in time ({said})"
    else:
        what = f"its connection to another rank broke ({said})"
    return Failure(rank, time.time(), what, remedy=_LOST, trace="".join(traceback.format_exception(error)))


_LOST = (
    "The other rank was killed or stopped, or its host or the network between the hosts is down: look at the other "
    "hosts' screens and logs/rank_N.log. Which interface gloo and NCCL take: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME. "
    "The same command goes on from the last checkpoint."
)
