"""Status of this process for the hang watchdog: stacks of its threads, number of collectives entered per process group.

torch counts the collectives that a process has entered in each group, under gloo and NCCL. All ranks enter the same
collectives in the same order, so the rank with the lower count is the one the others wait for. Reading the counts needs
no collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import distributed_c10d

from moe_train.launch.job.failures import agent_error_file
from moe_train.training.runtime.world import ProgressMarker

FLIGHT_RECORDER = "TORCH_FR_BUFFER_SIZE"  # torch's own record of collectives; off for gloo unless this is set
_DEPTH = 16
_IDLE = ("threading.py", "queue.py", "concurrent/futures/thread.py")  # innermost frame of a thread that waits for work
_PATH_PREFIXES = (
    str(Path.cwd()) + os.sep,
    sysconfig.get_path("purelib") + os.sep,
    sysconfig.get_path("stdlib") + os.sep,
)


@dataclass(frozen=True)
class RankStatus:
    """Status that each rank writes to the job's store every few seconds.

    Attributes:
        sequence: number of this status, from 0; -1: the rank has not written any. It stops growing when the process is
            stopped or has ended.
        seconds_without_progress: seconds without a progress mark or a collective, when the status was written.
        update, phase: from its :class:`ProgressMarker`.
        collective_counts: collectives entered, by name of the process group.
        pending: the first collective that it has entered and not left; empty until it has made no progress for a few
            statuses.
        stack: ``file:line in function``, innermost first: of the main thread, then of other threads that are not idle.
        host, pid, started_at: identify the process; ``started_at`` tells it from a later process with the same pid.
        error_file: file on its host where torchrun's agent looks for the cause when it ends.
        written_at: seconds since the epoch by its host's clock. Clocks of hosts differ, so only messages use it.
        tampered: another process has overwritten or deleted the status, so nothing is known of the rank.
    """

    rank: int
    sequence: int
    seconds_without_progress: float
    update: int
    phase: str
    collective_counts: dict[str, int] = field(default_factory=dict)
    pending: str = ""
    stack: list[str] = field(default_factory=list)
    host: str = ""
    pid: int = 0
    started_at: str = ""
    error_file: str = ""
    written_at: float = 0.0
    tampered: bool = False


def rank_status(
    rank: int, sequence: int, idle_seconds: float, progress: ProgressMarker, counts: dict[str, int], with_pending: bool
) -> RankStatus:
    """The status of this process.

    Args:
        idle_seconds: seconds without progress.
        counts: :func:`collective_counts`, from which ``idle_seconds`` was computed.
        with_pending: whether to ask torch for the pending collective, which takes a millisecond.
    """
    return RankStatus(
        rank=rank,
        sequence=sequence,
        seconds_without_progress=idle_seconds,
        update=progress.update,
        phase=progress.phase,
        collective_counts=counts,
        pending=pending_collective() if with_pending else "",
        stack=thread_stacks(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=process_start_time(os.getpid()),
        error_file=agent_error_file(),
        written_at=time.time(),
    )


def collective_counts() -> dict[str, int]:
    """Number of collectives that this rank has entered, by name of the process group."""
    return {group.group_name: int(group._get_sequence_number_for_group()) for group in process_groups()}


def process_groups() -> list[Any]:
    """The process groups that this rank is a member of (torch's stubs lack their sequence numbers)."""
    return list(distributed_c10d._world.pg_map)


def set_time_limit(known: set[str], limit: timedelta) -> None:
    """Sets the time limit of process groups that are not in ``known``, and adds them to it.

    torch gives every group except the first its own default limit (30 minutes).
    """
    for group in process_groups():
        if group.group_name not in known:
            with suppress(RuntimeError, ValueError):
                distributed_c10d._set_pg_timeout(limit, group)
            known.add(group.group_name)


def thread_stacks() -> list[str]:
    """The main thread's frames, innermost first, then those of other threads that are not idle."""
    frames = sys._current_frames()
    found = _frames(frames.get(threading.main_thread().ident or 0))
    for thread in threading.enumerate():
        if thread in (threading.main_thread(), threading.current_thread()):
            continue
        own = _frames(frames.get(thread.ident or 0))
        if own and not own[0].startswith(_IDLE):
            found += [f"in thread {thread.name}:", *own]
    return found


def _frames(frame: FrameType | None) -> list[str]:
    if frame is None:
        return []
    found = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_DEPTH, lookup_lines=False)
    return [f"{_short(entry.filename)}:{entry.lineno} in {entry.name}" for entry in found]


def _short(path: str) -> str:
    for prefix in _PATH_PREFIXES:
        if path.startswith(prefix):
            return path.removeprefix(prefix)
    return path


def pending_collective() -> str:
    """The first collective that was entered and not left, from torch's flight recorder; empty where there is none."""
    records: list[dict[str, Any]] = []
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        with suppress(AttributeError, RuntimeError, ValueError):
            records += json.loads(getattr(torch._C._distributed_c10d, dump)(True, False)).get("entries", [])
    waiting = [record for record in records if not record.get("retired") and record.get("state") != "completed"]
    if not waiting:
        return ""
    first = min(waiting, key=lambda record: record["time_created_ns"])
    name = first["profiling_name"].rpartition(":")[2]
    return f"{name} {first['collective_seq_id']} of group {first['process_group'][0]}"


def process_start_time(pid: int) -> str:
    """Start time of a process of this host, in clock ticks since boot; empty where there is no such process."""
    stat = _proc_stat(pid)
    return stat[19] if stat else ""


def process_state(pid: int) -> str:
    """State of a process of this host according to the kernel, as text for messages."""
    stat = _proc_stat(pid)
    return _STATES.get(stat[0], ALIVE) if stat else "gone"


ALIVE = "alive"
_STATES = {
    "T": "stopped by a signal (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "waiting in the kernel (a disk, a network file system, a driver)",
    "Z": "dead",
}


def _proc_stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
