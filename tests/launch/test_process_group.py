from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError
from moe_train.launch.process_group import joined_world, logging_to, world_size
from moe_train.parallel.isolation import LOOPBACK
from tests.distributed.world import free_port
from tests.launch.intruder import listening


def test_alone() -> None:
    before = torch.get_num_threads()
    with joined_world(LaunchConfig(device="cpu"), threads=1) as world:
        assert (world.rank, world.size, world.main, str(world.device)) == (0, 1, True, "cpu")
        assert torch.get_num_threads() == 1
        value = torch.ones(2)
        assert world.sum(value) is value and world.gather(3) == [3] and world.broadcast("x") == "x"
        world.barrier()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("said", "wanted", "threads"),
    [("5", 0, 5), ("5,2", 0, 5), ("5", 3, 3), (None, 0, None), ("many", 0, None), ("0", 0, None)],
)
def test_whose_number_of_threads_counts(
    said: str | None, wanted: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key's, else OMP_NUM_THREADS, else this host's cores divided by its processes."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    with joined_world(LaunchConfig(device="cpu"), threads=wanted):
        assert torch.get_num_threads() == (threads or 8)


@pytest.mark.processes
def test_a_thread_that_torchrun_has_set_is_not_the_users(tmp_path: Path) -> None:
    """It does so where nothing is set; what it was started with tells."""
    code = "import os; from moe_train.launch.job.env import requested_threads as threads"
    (tmp_path / "say.py").write_text(f"{code}; os.write(1, b'threads %a\\n' % threads())")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "say.py"]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    running = [
        subprocess.Popen(torchrun, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for variables in (clean, {**clean, "OMP_NUM_THREADS": "1"})
    ]
    said = [process.communicate(timeout=100)[0].splitlines() for process in running]
    assert said == [["threads None"] * 2, ["threads 1"] * 2]


def test_who_counts_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size(LaunchConfig(processes=3)) == 3
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size(LaunchConfig(processes=3)) == 8


def test_each_rank_has_a_log(tmp_path: Path) -> None:
    logger = logging.getLogger("moe_train")
    with logging_to(tmp_path, 3) as path:
        logger.info("seen \x1b[2J")
    logger.info("not seen")
    assert path.name == "rank_3.log" and "INFO moe_train: seen ␛[2J" in path.read_text()
    assert "not seen" not in path.read_text() and not logger.handlers


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("moe_train.launch.process_group._MIN_RENDEZVOUS", 1.0)
    config = LaunchConfig(device="cpu", timeout_minutes=0.03)
    with (
        pytest.raises(LaunchError, match=r"127\.0\.0\.1:1: the other .* cannot be reached"),
        joined_world(config),
    ):
        pass


@pytest.mark.processes
def test_a_store_at_loopback_listens_there_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of submitit's local executor, where rank 0 holds the store."""
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**place, **LOOPBACK}.items():
        monkeypatch.setenv(name, value)
    with joined_world(LaunchConfig(device="cpu")):
        assert [address for address, number in listening([os.getpid()]) if number == port] == ["127.0.0.1"]


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    held = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "none0"}
    for name, value in {**place, **held}.items():
        monkeypatch.setenv(name, value)
    said = r"=none0: the processes found each other but cannot connect.*NCCL_SOCKET_IFNAME"
    with pytest.raises(LaunchError, match=said), joined_world(LaunchConfig(device="cpu")):
        pass
    assert not dist.is_initialized()
