"""A rank that hangs, fails or runs out of memory among four, under our own launcher and under torchrun. Real ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from moe_train.config import LaunchConfig
from moe_train.launch.job.failures import WorkerError
from moe_train.launch.job.job_channel import JobChannel
from moe_train.launch.job.job_store import FolderStore
from moe_train.launch.local import launch
from moe_train.launch.watchdog.status import RankStatus
from moe_train.launch.watchdog.watchdog import _Watchdog
from moe_train.training.runtime.world import World
from tests.distributed.world import free_port
from tests.launch import torchrun
from tests.launch.jobs import CONFIG, in_time

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]

JOBS = "tests.launch.jobs"
SLOW = pytest.mark.slow  # half a minute each: the same road for the other kind of hang


def hung(text: str, how: str) -> None:
    """The message of a hang of rank 2, which started when all had done four collectives and made a group's fifth."""
    assert re.search(
        r"rank 2 failed first: it hangs: ranks 0, 1 and 3 have waited for it for 6 s, in all_reduce \d", text
    )
    assert "in _fall_asleep" in text or how == "stop"  # a stopped process may have said its last word before
    state = {"sleep": "alive", "stop": "stopped by a signal"}[how]
    heard = {"sleep": r"update 7", "stop": r"last status [1-9]\d* s ago: update \d"}[how]
    assert re.search(rf"rank 2 hangs \(process \d+ on \S+, {state}.*\): {heard}, .*no progress for", text)
    assert len(re.findall(r"rank \d waits in all_reduce \d+ of group 0: update 7, warming up, at", text)) >= 3
    assert "What to do: See the stack of rank 2" in text and "raise launch.timeout_minutes (now 0.1)" in text


def test_a_beat_tells_of_one_moment(tmp_path: Path) -> None:
    """The seconds of standing still belong to the update and place beside them: none after progress."""
    world, channel = World(), JobChannel(FolderStore(tmp_path))
    watch = _Watchdog(world, channel, limit=60.0)

    def told() -> RankStatus:
        watch.write_status()
        return RankStatus(**json.loads(channel.get_all(["status/0"])[0] or ""))

    world.progress.mark("reading samples", 3)
    told()
    time.sleep(0.1)
    stood = told()
    world.progress.mark("computing the update", 4)
    moved = told()
    assert (stood.update, moved.update, moved.sequence) == (3, 4, 2)
    assert stood.seconds_without_progress >= 0.1 > moved.seconds_without_progress
    assert stood.written_at <= moved.written_at <= time.time()


@pytest.mark.parametrize("how", ["sleep", pytest.param("stop", marks=SLOW)])
def test_a_rank_that_hangs_under_our_launcher(how: str, tmp_path: Path) -> None:
    with in_time(tmp_path, 6) as note, pytest.raises(WorkerError) as raised:
        launch(f"{JOBS}:hang", {"rank": 2, "how": how, "note": note}, LaunchConfig(processes=4), tmp_path)
    hung(str(raised.value), how)


@pytest.mark.parametrize("how", ["stop", pytest.param("sleep", marks=SLOW)])
def test_a_rank_that_hangs_under_torchrun(how: str, tmp_path: Path) -> None:
    """Also the one that is stopped is gone at once: torchrun alone would wait half a minute for it."""
    with in_time(tmp_path, 6) as note:
        done = torchrun.job(4, "hang", 2, how, 0.1, note)
    assert done.returncode == 1
    hung(done.stderr, how)
    root_cause = done.stderr.split("Root Cause")[1]
    assert "rank 2 failed first: it hangs" in root_cause


def test_the_lowest_rank_that_can_speaks_where_no_launcher_does(tmp_path: Path) -> None:
    """As under plain srun. Both that hang, rank 0 among them, are ended too: nobody else on their host would do it."""
    call = f"from tests.launch import jobs; jobs.hang((0, 1), 'lock', 0.05, {str(tmp_path / 'note')!r})"
    with in_time(tmp_path, 3):
        ended = _without_launcher(3, call)
    said = [text for text, _ in ended]
    assert "Failed: rank 0 failed first: it hangs (so does rank 1): rank 2 has waited for it for 3 s" in said[2]
    assert [code for _, code in ended] == [-signal.SIGKILL, -signal.SIGKILL, 1], said


def _without_launcher(processes: int, call: str) -> list[tuple[str, int]]:
    """What each of some ranks says on standard error, and its exit code."""
    told = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as started:
        ranks = []
        for rank in range(processes):
            place = {**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [sys.executable, "-c", call]
            process = subprocess.Popen(words, env=place, cwd=torchrun.ROOT, stderr=subprocess.PIPE, text=True)
            started.callback(process.kill)
            ranks.append(process)
        return [(process.communicate(timeout=200)[1], process.returncode) for process in ranks]


@SLOW
@pytest.mark.parametrize("how", ["stop", "sleep"])
def test_a_rank_that_falls_silent(how: str, tmp_path: Path) -> None:
    """It is found by the shorter limit; one that is alive, and says so, by the other. Two minutes on a busy machine."""
    arguments = {"rank": 2, "how": how, "minutes": 0.3, "silent": 0.1}
    with in_time(tmp_path, 6 if how == "stop" else 18) as note, pytest.raises(WorkerError) as raised:
        launch(f"{JOBS}:hang", {**arguments, "note": note}, LaunchConfig(processes=4), tmp_path)
    text = str(raised.value)
    if how == "stop":
        assert "rank 2 failed first: it sends no status: ranks 0, 1 and 3 have received nothing from it for 6 s" in text
        assert "stopped by a signal" in text and "raise launch.silent_minutes (now 0.1)" in text
    else:
        assert "rank 2 failed first: it hangs: ranks 0, 1 and 3 have waited for it for 18 s" in text


@pytest.mark.warm_start(False)  # which rank ends first decides what torchrun shows
def test_a_rank_out_of_memory_under_torchrun(tmp_path: Path) -> None:
    """Its cause and what to do are what torchrun shows last."""
    with in_time(tmp_path, 60 * CONFIG.timeout_minutes) as note:
        done = torchrun.job(4, "fail", 2, "memory", "wait", note)
    root_cause = done.stderr.split("Root Cause")[1]
    assert done.returncode == 1 and "rank      : 2" in root_cause
    assert "rank 2 failed first: RuntimeError:" in root_cause and "can't allocate memory" in root_cause
    assert "What to do: Lower training.tokens_per_update or raise training.accumulation" in root_cause


def test_ranks_that_compute_for_longer_than_the_limit_are_let_be(tmp_path: Path) -> None:
    """Nobody waits for anybody: each rank alone stands still for three times the limit."""
    started = time.monotonic()
    assert launch(f"{JOBS}:busy", {"minutes": 0.02}, LaunchConfig(processes=2), tmp_path) == [3.0, 3.0]
    assert time.monotonic() - started > 3.6
