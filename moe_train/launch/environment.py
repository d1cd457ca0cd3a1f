"""What a launcher has told this process through its environment. Needs no torch, so commands can look at once."""

from __future__ import annotations

import os
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
