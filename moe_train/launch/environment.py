"""What a launcher has told this process through its environment. Needs no torch, so commands can look at once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

JOB = "MOE_TRAIN_JOB"  # names the folder of a job to the processes that moe_train.launch.local starts
SECRET = "MOE_TRAIN_SECRET"  # what the ranks of a job sign their entries of torch's store with


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
