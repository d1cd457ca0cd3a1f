"""What a launcher has told this process through its environment. Needs no torch, so commands can look at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moe_train.errors import LaunchError

# What a launcher sets, and the smallest number that it can be.
_NUMBERS = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 1,
    "TORCHELASTIC_RESTART_COUNT": 0,
}
_REMEDY = (
    "start with torchrun, srun or launch.processes=N, which set all that belongs together, or unset these variables"
)
_LARGEST = 65535  # ranks of a job and ports
JOB = "MOE_TRAIN_JOB"  # names the folder of a job to the processes that moe_train.launch.local starts


def check_environment() -> None:
    """Refuses a launcher's variables that are no numbers, that contradict each other, or of which some are missing.

    Raises:
        LaunchError: names them.
    """
    found = {name: told_number(os.environ, name, least) for name, least in _NUMBERS.items() if name in os.environ}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in found and size in found and found[rank] >= found[size]:
            raise LaunchError(f"{rank}={found[rank]} is not below {size}={found[size]}", "environment", _REMEDY)
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if under_launcher() and missing:
        raise LaunchError(f"RANK is set without {', '.join(missing)}", "environment", _REMEDY)


def told_number(told: Mapping[str, str], name: str, least: int = 0, most: int = _LARGEST) -> int:
    """The whole number that a variable of a launcher says.

    Raises:
        LaunchError: it is missing, no number, or out of range.
    """
    text = told.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        said = f"{name}={text!r} is no whole number from {least} to {most}" if name in told else f"{name} is not set"
        raise LaunchError(said, "environment", _REMEDY)
    return int(text)


def under_launcher() -> bool:
    """Whether torchrun or its like has started this process as one of several."""
    return "RANK" in os.environ


def has_our_parent() -> bool:
    """Whether moe_train.launch.local has started this process, and tells the user why it ended."""
    return JOB in os.environ


def job_folder() -> Path:
    """Where the processes of moe_train.launch.local meet: a folder that only their user may enter."""
    return Path(os.environ[JOB])


def under_agent() -> bool:
    """Whether an agent of torchrun stands by this process: it restarts and ends processes, and tells failures."""
    return "TORCHELASTIC_RUN_ID" in os.environ and not has_our_parent()


def agent_holds_store() -> bool:
    """Whether the store where ranks meet is the launcher's, and so outlives them."""
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
    """CPU threads of a process that the user wants (OMP_NUM_THREADS; of ``4,2`` the first); None: they have not said.

    torchrun sets 1 for its ranks where nothing is set. The environment that it was started with tells.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not said.isdecimal() or int(said) < 1:
        return None
    if said == "1" and under_agent() and not _agent_was_told():
        return None
    return int(said)


def _agent_was_told() -> bool:
    with suppress(OSError):  # no /proc, or another user's process
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        return any(word.startswith(b"OMP_NUM_THREADS=") for word in started_with)
    return False
