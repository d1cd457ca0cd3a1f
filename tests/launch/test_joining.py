from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError
from moe_train.launch.joining import joined_world, logging_to, world_size
from moe_train.parallel.loopback import LOOPBACK
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
    monkeypatch.setattr("moe_train.launch.joining._MEETING", 1.0)
    config = LaunchConfig(device="cpu", timeout_minutes=0.03)
    with pytest.raises(LaunchError, match=r"127\.0\.0\.1:1: the other processes cannot be found"), joined_world(config):
        pass


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
    said = r"=none0: the processes have met but cannot connect.*NCCL_SOCKET_IFNAME"
    with pytest.raises(LaunchError, match=said), joined_world(LaunchConfig(device="cpu")):
        pass
    assert not dist.is_initialized()
