"""Chooses the device of a rank and checks that all ranks use the same kind."""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import LaunchError
from moe_train.launch.job.env import has_our_parent, local_rank, local_world, under_agent, under_launcher
from moe_train.launch.job.hard_exit import run_with_timeout
from moe_train.launch.job.job_store import MessageSigner

_READ_TIMEOUT = 10.0  # seconds


def check_devices(config: LaunchConfig) -> None:
    """Refuses ``launch.device=cuda`` where this host has too few GPUs.

    Raises:
        LaunchError: ``launch.device=cuda`` without enough GPUs on this host.
    """
    if config.device != "cuda" or (under_launcher() and _has_gpu_per_task()):
        return
    wanted = local_world() if under_launcher() else config.processes
    if torch.cuda.device_count() < wanted:
        raise LaunchError(
            f"launch.device=cuda wants {wanted} GPUs, this host has {torch.cuda.device_count()}",
            remedy="lower launch.processes, or set launch.device=cpu",
        )


def device_of_rank(config: LaunchConfig) -> torch.device:
    """The device of this rank; a GPU becomes torch's current device.

    With ``auto``: a GPU where there are enough for all processes of this host, or where Slurm gives each task one
    (``--gpus-per-task=1``).
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if _has_gpu_per_task():
        # Index of the GPU among those that this task sees; DeepSpeed reads it, too.
        os.environ["LOCAL_RANK"] = "0"
    elif config.device == "auto" and torch.cuda.device_count() < local_world():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def _has_gpu_per_task() -> bool:
    """Whether Slurm has given each task one GPU, which no other task sees; it has index 0 in each task."""
    if has_our_parent() or under_agent() or local_world() < 2 or torch.cuda.device_count() != 1:
        return False
    options = {name: os.environ.get(f"SLURM_{name}", "") for name in ("GPUS_PER_TASK", "TRES_PER_TASK", "GPU_BIND")}
    return bool(options["GPUS_PER_TASK"]) or "gpu" in options["TRES_PER_TASK"] or "single:1" in options["GPU_BIND"]


def agree_on_devices(
    store: dist.Store, rank: int, size: int, device: torch.device, signer: MessageSigner, limit: float
) -> None:
    """Checks that all ranks use the same kind of device, before the process group is made. Every rank calls it.

    Without the check, ranks with GPUs would wait for those without.

    Args:
        limit: seconds that a rank waits for the others.

    Raises:
        LaunchError: on all ranks, where some have GPUs and others have not; names a host without.
        DistStoreError: a rank does not answer in time.
    """
    devices, deadline = dist.PrefixStore("devices", store), time.monotonic() + limit
    devices.set(str(rank), signer.sign(str(rank), f"{device.type} {socket.gethostname()}"))
    if rank == 0:
        found = [signer.wait_for(devices, str(other), deadline).split() for other in range(size)]
        without = [(number, host) for number, (kind, host) in enumerate(found) if kind == "cpu"]
        devices.set("without", signer.sign("without", _error_text(without) if 0 < len(without) < size else "-"))
    error = signer.wait_for(devices, "without", deadline)
    if error != "-":
        devices.set(f"read/{rank}", "1")
        if rank == 0:  # its store may end with it: it waits until the others have read the error
            run_with_timeout(_READ_TIMEOUT, lambda: devices.wait([f"read/{other}" for other in range(size)]))
        raise LaunchError(
            error, remedy="set launch.device=cpu, or look there with nvidia-smi; on Slurm give each task one GPU"
        )


def _error_text(without: list[tuple[int, str]]) -> str:
    number, host = without[0]
    more = f" (nor {len(without) - 1} more)" if without[1:] else ""
    return f"rank {number} on {host} has no GPU of its own{more}, other ranks have"
