"""Which device a rank takes. This machine's GPUs are counted by torch; what is tested here is what follows."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError
from moe_train.launch.job.devices import agree_on_devices, check_devices, device_of_rank
from moe_train.launch.job.env import JOB
from moe_train.launch.job.job_store import MessageSigner

ONE_EACH = {"SLURM_GPUS_PER_TASK": "1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there() -> None:
    check_devices(LaunchConfig(device="auto"))
    with pytest.raises(LaunchError, match=r"wants 2 GPUs, this host has 0.*launch\.device=cpu"):
        check_devices(LaunchConfig(device="cuda", processes=2))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The third of four tasks of a host, which sees one GPU."""
    for name in (JOB, "TORCHELASTIC_RUN_ID", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    return monkeypatch


@pytest.mark.parametrize(
    "told", [ONE_EACH, {"SLURM_TRES_PER_TASK": "cpu=2,gres/gpu=1"}, {"SLURM_GPU_BIND": "single:1"}]
)
def test_a_gpu_for_each_task(told: dict[str, str], task: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        task.setenv(name, value)
    check_devices(LaunchConfig(device="cuda"))
    assert str(device_of_rank(LaunchConfig())) == str(device_of_rank(LaunchConfig(device="cuda"))) == "cuda:0"
    assert str(device_of_rank(LaunchConfig(device="cpu"))) == "cpu"
    assert os.environ["LOCAL_RANK"] == "0"  # which picks the GPU for DeepSpeed and in evaluation
    task.setenv(JOB, "/tmp/job")  # our own processes see the GPUs of the one that started them
    assert str(device_of_rank(LaunchConfig())) == "cpu"


def test_one_gpu_for_all_is_none_for_each(task: pytest.MonkeyPatch) -> None:
    assert str(device_of_rank(LaunchConfig())) == "cpu"
    with pytest.raises(LaunchError, match="wants 4 GPUs, this host has 1"):
        check_devices(LaunchConfig(device="cuda"))


def test_enough_gpus_are_shared_out(task: pytest.MonkeyPatch) -> None:
    task.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(device_of_rank(LaunchConfig())) == "cuda:2" and os.environ["LOCAL_RANK"] == "2"


@pytest.mark.parametrize(
    ("kinds", "agree"), [(("cuda", "cpu", "cpu"), False), (("cuda",) * 3, True), (("cpu",) * 3, True)]
)
def test_all_ranks_take_the_same_kind(kinds: tuple[str, ...], agree: bool) -> None:
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def one(rank: int) -> str:
        store = dist.TCPStore("127.0.0.1", master.port, is_master=False, wait_for_workers=False)
        try:
            agree_on_devices(
                store, rank, len(kinds), torch.device(kinds[rank]), MessageSigner(b"of this job alone"), 30.0
            )
        except LaunchError as error:
            return str(error)
        return "agreed"

    with ThreadPoolExecutor(len(kinds)) as ranks:
        said = list(ranks.map(one, range(len(kinds))))
    assert len(set(said)) == 1 and (said[0] == "agreed") == agree
    if not agree:
        assert "has no GPU of its own (nor 1 more), other ranks have" in said[0] and said[0].startswith("rank 1 on ")
