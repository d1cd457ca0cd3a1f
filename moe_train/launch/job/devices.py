"""Which device a rank takes, and that all ranks of a world take the same kind."""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError
from moe_train.launch.job.env import has_our_parent, local_rank, local_world, under_agent, under_launcher
from moe_train.launch.job.hard_exit import within
from moe_train.launch.job.job_store import MessageSigner

_HEARING = 10.0  # seconds


def check_devices(config: LaunchConfig) -> None:
    """Refuses devices that are not there.

    Raises:
        LaunchError: ``launch.device=cuda`` without enough GPUs on this host.
    """
    if config.device != "cuda" or (under_launcher() and _one_of_its_own()):
        return
    wanted = local_world() if under_launcher() else config.processes
    if torch.cuda.device_count() < wanted:
        raise LaunchError(
            f"launch.device=cuda wants {wanted} GPUs, this host has {torch.cuda.device_count()}",
            remedy="lower launch.processes, or set launch.device=cpu",
        )


def device_of_rank(config: LaunchConfig) -> torch.device:
    """This rank's device; a GPU is made torch's current one.

    With ``auto`` a GPU where there are enough for all processes of this host, or where Slurm shows each task one of its
    own (``--gpus-per-task=1``).
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if _one_of_its_own():
        # The number of the GPU among those that this task sees, to others such as DeepSpeed too.
        os.environ["LOCAL_RANK"] = "0"
    elif config.device == "auto" and torch.cuda.device_count() < local_world():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def _one_of_its_own() -> bool:
    """Whether Slurm has given each task a GPU that others do not see; all call theirs number 0."""
    if has_our_parent() or under_agent() or local_world() < 2 or torch.cuda.device_count() != 1:
        return False
    told = {name: os.environ.get(f"SLURM_{name}", "") for name in ("GPUS_PER_TASK", "TRES_PER_TASK", "GPU_BIND")}
    return bool(told["GPUS_PER_TASK"]) or "gpu" in told["TRES_PER_TASK"] or "single:1" in told["GPU_BIND"]


def agree_on_devices(
    store: dist.Store, rank: int, size: int, device: torch.device, seal: MessageSigner, limit: float
) -> None:
    """Every rank calls it, before the process group: one with GPUs would wait for those that have none.

    Args:
        limit: seconds that a rank waits for the others.

    Raises:
        LaunchError: on all ranks, where some have GPUs and others have not; it names the hosts of the latter.
        DistStoreError: a rank does not come.
    """
    channel, deadline = dist.PrefixStore("devices", store), time.monotonic() + limit
    channel.set(str(rank), seal.sign(str(rank), f"{device.type} {socket.gethostname()}"))
    if rank == 0:
        told = [seal.wait_for(channel, str(other), deadline).split() for other in range(size)]
        without = [(number, host) for number, (kind, host) in enumerate(told) if kind == "cpu"]
        channel.set("without", seal.sign("without", _complaint(without) if 0 < len(without) < size else "-"))
    complaint = seal.wait_for(channel, "without", deadline)
    if complaint != "-":
        channel.set(f"heard/{rank}", "1")
        if rank == 0:  # whose store the others read it from
            within(_HEARING, lambda: channel.wait([f"heard/{other}" for other in range(size)]))
        raise LaunchError(
            complaint, remedy="set launch.device=cpu, or look there with nvidia-smi; on Slurm give each task one GPU"
        )


def _complaint(without: list[tuple[int, str]]) -> str:
    number, host = without[0]
    more = f" (nor {len(without) - 1} more)" if without[1:] else ""
    return f"rank {number} on {host} has no GPU of its own{more}, other ranks have"
