"""Starts processes on this host and waits for them: forwards signals, ends the others when one fails."""

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
        arguments: JSON values; the function must return a JSON value, too.
        logs: folder of rank_N.log of each rank; ranks other than 0 print into theirs.

    Raises:
        LaunchError: files in the system's temporary folder cannot be locked.
        UserError: raised by the first failing rank.
        WorkerError: any other error of the first failing rank; the other ranks have been ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    if config.port:
        print(
            "note: launch.port is ignored: processes of one host use a folder for rendezvous, not a port",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(prefix="moe_train-") as name:  # mode 0700: no other user may enter
        job = Path(name)
        _check_locks(job)
        content = json.dumps({"target": target, "arguments": dict(arguments), "command": sys.argv})
        job.joinpath("job.json").write_text(content, encoding="utf-8")
        secret = os.environ.get(SECRET) or secrets.token_hex(32)
        workers = [_start(job, rank, config.processes, secret, logs) for rank in range(config.processes)]
        try:
            with _forwarding_signals(workers) as received:
                _wait(workers)
            if received and any(worker.poll() for worker in workers):
                raise SystemExit(128 + received[0])  # interrupted before anything was saved
            _raise_first_failure(workers, job, logs)
        finally:
            for worker in workers:  # SIGKILL: after SIGTERM it would try to save, which needs the other ranks
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        results = (job / f"result_{rank}.json" for rank in range(len(workers)))
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _check_locks(folder: Path) -> None:
    """Checks that files in the folder can be locked, which torch's FileStore needs.

    Raises:
        LaunchError: the file system has no locks.
    """
    with folder.joinpath("lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"files cannot be locked here ({error.strerror}), which the rendezvous of the processes needs",
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
def _forwarding_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forwards stopping signals to the workers and yields the list of those received.

    Workers have their own sessions, so that a Ctrl-C reaches them only once, from here.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended, or one has failed and the others had time to write their failures."""
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
