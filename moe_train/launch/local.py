"""Starts processes on this host and stands by them: signals are passed on, the first failure ends the others."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError, UserError
from moe_train.launch.job.env import JOB
from moe_train.launch.job.failures import Failure, WorkerError, failure_file, first_failure, read_failure
from moe_train.parallel.isolation import LOOPBACK, SECRET
from moe_train.training.runtime.signals import STOPPING

_POLL, _GRACE = 0.05, 2.0


def launch(target: str, arguments: Mapping[str, Any], config: LaunchConfig, logs: Path) -> list[Any]:
    """Runs ``target`` in ``config.processes`` processes and returns what each returned, in rank order.

    Args:
        target: ``package.module:function``; called with ``arguments`` as keywords.
        arguments: anything that JSON can hold; so must be what the function returns.
        logs: where rank_N.log of each rank lies; ranks other than 0 print into theirs.

    Raises:
        LaunchError: the system's folder for temporary files has no locks.
        UserError: what the first failing rank raised, if it was one.
        WorkerError: the first failing rank's error otherwise; the other ranks have been ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    if config.port:
        print("note: launch.port is ignored: processes of one host meet in a folder, not at a port", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="moe_train-") as name:  # of mode 0700: nobody else may enter
        job = Path(name)
        _check_locks(job)
        content = json.dumps({"target": target, "arguments": dict(arguments), "command": sys.argv})
        job.joinpath("job.json").write_text(content, encoding="utf-8")
        secret = os.environ.get(SECRET) or secrets.token_hex(32)
        workers = [_start(job, rank, config.processes, secret, logs) for rank in range(config.processes)]
        try:
            with _passing_on_signals(workers) as received:
                _stand_by(workers)
            if received and any(worker.poll() for worker in workers):
                raise SystemExit(128 + received[0])  # asked to stop before it could save anything
            _raise_first_failure(workers, job, logs)
        finally:
            _end(workers)
        results = (job / f"result_{rank}.json" for rank in range(len(workers)))
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _check_locks(folder: Path) -> None:
    """Refuses a folder in which the processes could not meet: torch's FileStore locks its file.

    Raises:
        LaunchError: its file system has no locks.
    """
    with folder.joinpath("lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"files cannot be locked here ({error.strerror}), so processes cannot meet",
                str(folder),
                "set TMPDIR to a folder of a local disk",
            ) from error


def _start(job: Path, rank: int, size: int, secret: str, logs: Path) -> subprocess.Popen[bytes]:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        JOB: str(job),
        **LOOPBACK,
        SECRET: secret,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // size))),
    }
    command = [sys.executable, "-m", "moe_train.launch.worker", str(job), str(os.getpid())]
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    with logs.joinpath(f"rank_{rank}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@contextmanager
def _passing_on_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """The workers stand in sessions of their own, so a Ctrl-C reaches them once, from here. Gives what was received."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stand_by(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed and the others had a moment to say what they saw."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if deadline == float("inf") and any(worker.poll() for worker in workers):
            deadline = time.monotonic() + _GRACE
        time.sleep(_POLL)


def _raise_first_failure(workers: list[subprocess.Popen[bytes]], job: Path, logs: Path) -> None:
    failures: list[Failure] = []
    for rank, worker in enumerate(workers):
        code = worker.poll()
        if code:
            failures.append(read_failure(failure_file(job, rank), rank, code, time.time()))
    if not failures:
        return
    first = first_failure(failures)
    if first.user:
        raise UserError(first.what, first.where, first.remedy)
    raise WorkerError(first, logs / f"rank_{first.rank}.log")


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ends what is still there. SIGKILL: SIGTERM would ask it to save, which it cannot do without the others."""
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
