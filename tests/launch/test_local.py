"""Processes started on this host: what they return, and what is seen when one of them fails. Real processes all."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError, UserError
from moe_train.launch.job.failures import Failure, WorkerError, first_failure
from moe_train.launch.local import launch
from tests.launch.jobs import in_time

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]

JOBS = "tests.launch.jobs"


def two(job: str, logs: Path, **arguments: object) -> list[object]:
    return launch(f"{JOBS}:{job}", arguments, LaunchConfig(processes=2), logs)


def test_results_in_rank_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    first, second = two("report", tmp_path, word="hello")
    expected = {
        "size": 2,
        "sum": 3.0,
        "all": [{"rank": 0}, {"rank": 1}],
        "told": "told by 0",
        "threads": 3,  # as the user wants, whatever this host has
        "command": sys.argv,  # of the process that the user started
    }
    assert first == {"rank": 0, **expected} and second == {"rank": 1, **expected}
    assert "hello from 0" in capfd.readouterr().out
    assert re.search(r"hello from 1\n(.*\n)*goodbye$", (tmp_path / "rank_1.log").read_text())


def test_the_first_defect_is_shown_and_the_others_are_ended(tmp_path: Path) -> None:
    with in_time(tmp_path, 0) as note, pytest.raises(WorkerError) as raised:
        two("fail", tmp_path, rank=1, how="defect", others="sleep", note=note)  # the other one sleeps for a minute
    message = str(raised.value)
    assert message.startswith("rank 1 failed first: ZeroDivisionError: planted defect")
    assert "in _fail" in message and "rank_1.log" in message


def test_an_echo_in_another_rank_does_not_hide_the_cause(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed first: it was killed by SIGKILL.*memory"):
        two("fail", tmp_path, rank=1, how="kill")


def test_a_mistake_of_the_user_stays_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        two("fail", tmp_path, rank=0, how="user")
    assert str(raised.value) == "planted.txt: the planted line is too long. Shorten it."


def test_which_failure_came_first() -> None:
    late, early = Failure(0, 2.0, "late"), Failure(1, 1.0, "early")
    killed = Failure(2, 3.0, "killed", killed=True)
    assert first_failure([late, early]) is early
    assert first_failure([late, early, killed]) is killed


def test_a_port_is_no_longer_taken(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs that name one go on: the key is read, and ignored with one note."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        results = launch(f"{JOBS}:report", {"word": "hello"}, LaunchConfig(processes=1, port=port), tmp_path)
    assert results[0]["sum"] == 1.0
    assert capfd.readouterr().err.count("launch.port is ignored") == 1


def test_a_file_system_without_locks_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(LaunchError, match=r"moe_train-\S+: files cannot be locked here.*TMPDIR"):
        two("report", tmp_path, word="no")
    assert not list(tmp_path.glob("rank_*"))


def start_parent(tmp_path: Path) -> subprocess.Popen[str]:
    program = f"""
        from pathlib import Path
        from moe_train.config import LaunchConfig
        from moe_train.launch.local import launch
        print(launch("{JOBS}:sleep", {{"folder": "{tmp_path}"}}, LaunchConfig(processes=2), Path("{tmp_path}")))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    return parent


def workers(tmp_path: Path) -> list[int]:
    return [int((tmp_path / f"ready_{rank}").read_text()) for rank in (0, 1)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_signals_are_passed_on(tmp_path: Path) -> None:
    parent = start_parent(tmp_path)
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=60)
    assert "['rank 0 got [15]', 'rank 1 got [15]']" in out and parent.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children of a killed parent")
def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    parent = start_parent(tmp_path)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
