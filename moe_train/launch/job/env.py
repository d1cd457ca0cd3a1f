"""Reads the environment variables that a launcher sets. Does not import torch, so that commands start quickly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moe_train.errors import LaunchError

# Variables that a launcher sets, with the smallest valid number.
_NUMBERS = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 1,
    "TORCHELASTIC_RESTART_COUNT": 0,
}
_REMEDY = "start with torchrun, srun or launch.processes=N, which set all of these variables, or unset them"
_LARGEST = 65535  # ranks of a job and ports
JOB = "MOE_TRAIN_JOB"  # folder of a job, set for the processes that moe_train.launch.local starts


def check_environment() -> None:
    """Checks a launcher's variables.

    Raises:
        LaunchError: one is not a number, some are missing, or they contradict each other.
    """
    found = {name: env_number(os.environ, name, least) for name, least in _NUMBERS.items() if name in os.environ}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in found and size in found and found[rank] >= found[size]:
            raise LaunchError(f"{rank}={found[rank]} is not below {size}={found[size]}", "environment", _REMEDY)
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if under_launcher() and missing:
        raise LaunchError(f"RANK is set without {', '.join(missing)}", "environment", _REMEDY)


def env_number(environment: Mapping[str, str], name: str, least: int = 0, most: int = _LARGEST) -> int:
    """The whole number in an environment variable.

    Raises:
        LaunchError: it is missing, not a whole number, or out of range.
    """
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        invalid = f"{name}={text!r} is not a whole number from {least} to {most}"
        raise LaunchError(invalid if name in environment else f"{name} is not set", "environment", _REMEDY)
    return int(text)


def under_launcher() -> bool:
    """Whether torchrun or a similar launcher has started this process as one of several."""
    return "RANK" in os.environ


def has_our_parent() -> bool:
    """Whether moe_train.launch.local has started this process; it then shows the user why the process ended."""
    return JOB in os.environ


def job_folder() -> Path:
    """The folder in which processes of moe_train.launch.local find each other; only their user may enter it."""
    return Path(os.environ[JOB])


def under_agent() -> bool:
    """Whether an agent of torchrun has started this process: it restarts and ends processes, and shows failures."""
    return "TORCHELASTIC_RUN_ID" in os.environ and not has_our_parent()


def agent_holds_store() -> bool:
    """Whether torchrun's agent holds the rendezvous store, which then outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launched_rank() -> int:
    """This process's rank; 0 where no launcher gave one."""
    return int(os.environ.get("RANK", "0"))


def launched_world() -> int | None:
    """How many processes the launcher has started; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if under_launcher() else None


def launched_per_host() -> int | None:
    """How many processes the launcher has started on each host; None without a launcher, or where it does not say."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_launcher() and "LOCAL_WORLD_SIZE" in os.environ else None


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def requested_threads() -> int | None:
    """CPU threads per process that the user has set (OMP_NUM_THREADS; of ``4,2`` the first); None: not set.

    torchrun sets 1 for its ranks where the user has set none: its own environment is read to tell the two apart.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not value.isdecimal() or int(value) < 1:
        return None
    if value == "1" and under_agent() and not _set_for_agent():
        return None
    return int(value)


def _set_for_agent() -> bool:
    with suppress(OSError):  # no /proc, or another user's process
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)
    return False
