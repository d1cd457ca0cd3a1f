"""The link between two hosts breaks for 5 seconds: nothing is lost. It breaks for good: the job ends and says why."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.network.hosts import two_hosts
from tests.training.toy_run import assert_same_bits, final_tensors, lines

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 30
pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]


@pytest.fixture
def hosts() -> Iterator[Any]:
    """Two network hosts on a bridge."""
    with two_hosts("10.213.9") as made:
        yield made


def start(hosts: Any, folder: Path, minutes: float, silent: float = 0.0) -> list[subprocess.Popen[str]]:
    """A rank on each host."""
    command = [sys.executable, "-m", "tests.network.drop_job", str(folder), str(UPDATES), str(minutes), str(silent)]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    meeting = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29557"}
    options = {"stderr": subprocess.PIPE, "cwd": ROOT}
    return [hosts.start(rank, command, {"RANK": str(rank), **world, **meeting}, **options) for rank in (0, 1)]


def wait_for(folder: Path, update: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200
    log = folder / "train.jsonl"
    while not log.exists() or log.read_text().count("\n") < update:
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_link_that_drops_for_5_seconds(hosts: Any, tmp_path: Path) -> None:
    """TCP sends again what was lost: the same bits as without the break, and no update is done twice."""
    endings = {}
    for name in ("whole", "broken"):
        ranks = start(hosts, tmp_path / name, 2.0)
        wait_for(tmp_path / name, 6, ranks)
        if name == "broken":
            done = len(lines(tmp_path / name))
            hosts.link("down")
            time.sleep(5)
            assert len(lines(tmp_path / name)) <= done + 2  # it was the link that all of it went over
            hosts.link("up")
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
        endings[name] = final_tensors(tmp_path / name)
    assert_same_bits(endings["broken"], endings["whole"])
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


@pytest.mark.slow  # the other kind of break: half a minute more
@pytest.mark.parametrize(
    ("minutes", "silent", "how"),
    [
        (0.1, 0.0, "it hangs: rank 0 has waited for it for 6 s, in all_reduce"),
        (5.0, 0.1, "it sends no status: rank 0 has received nothing from it for 6 s"),
    ],
)
def test_a_link_that_stays_down(minutes: float, silent: float, how: str, hosts: Any, tmp_path: Path) -> None:
    """Both ranks end by the limit for those that wait, or by the one for the silent, and rank 0 says what to look at.

    The run goes on from its last checkpoint.

    The hosts share their processes' numbers, so that rank 0 may end rank 1 as it would one of its own host.
    """
    ranks = start(hosts, tmp_path / "run", minutes, silent)
    wait_for(tmp_path / "run", 6, ranks)
    hosts.link("down")
    started = time.monotonic()
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert time.monotonic() - started < 6 + 30 + 10  # the limit, the promise, and a slow machine's leave
    assert all(rank.returncode for rank in ranks)
    assert f"rank 1 failed first: {how}" in said[0], said
    assert "the network between the hosts is down" in said[0]
    assert ranks[1].returncode == -9 or "What to do" in said[1]
    hosts.link("up")
    ranks = start(hosts, tmp_path / "run", 2.0)
    assert [rank.communicate(timeout=200) and rank.returncode for rank in ranks] == [0, 0]
    assert [line["update"] for line in lines(tmp_path / "run")] == list(range(1, UPDATES + 1))
