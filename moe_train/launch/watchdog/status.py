"""Where this process stands: its threads' stacks, and how many collectives of each group it has come to.

torch counts the collectives that a process has entered, group by group, gloo and NCCL alike. All ranks enter the same
ones in the same order, so whoever has the smaller number keeps the others waiting; no collective is needed to find out.
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

from moe_train.launch.job.failures import agents_file
from moe_train.training.runtime.world import ProgressMarker

FLIGHT_RECORDER = "TORCH_FR_BUFFER_SIZE"  # torch's own record of collectives; off for gloo unless this is set
_DEPTH = 16
_IDLE = ("threading.py", "queue.py", "concurrent/futures/thread.py")  # where a thread stands that waits for work
_HOMES = (str(Path.cwd()) + os.sep, sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("stdlib") + os.sep)


@dataclass(frozen=True)
class RankStatus:
    """What a rank says of itself every few seconds.

    Attributes:
        number: grows with every beat, from 0 (-1: it was never heard): a process that is stopped or gone falls silent.
        still: seconds without a mark, a collective, or an update; as everything here, at the time of the beat.
        update, phase: of its :class:`ProgressMarker`.
        entered: collectives that it has entered, by name of group.
        pending: the first collective that it has entered and not left; said once it has stood still for some beats.
        stack: ``file:line in function``, innermost first: of the main thread, then of others that do something.
        host, pid, born: who to look for; ``born`` tells a process from a later one with its number.
        report: the file of this host where its agent looks for why it ended.
        said: when, in seconds of its host's clock; who hears it may have another one, so only messages tell by it.
        altered: nothing is known of the rank, because somebody else has overwritten what it said.
    """

    rank: int
    number: int
    still: float
    update: int
    phase: str
    entered: dict[str, int] = field(default_factory=dict)
    pending: str = ""
    stack: list[str] = field(default_factory=list)
    host: str = ""
    pid: int = 0
    born: str = ""
    report: str = ""
    said: float = 0.0
    altered: bool = False


def rank_status(
    rank: int, number: int, still: float, pulse: ProgressMarker, counts: dict[str, int], look: bool
) -> RankStatus:
    """This process's beat.

    Args:
        counts: :func:`entered`, by which ``still`` was judged.
        look: whether to ask torch for the pending collective, which costs a millisecond.
    """
    return RankStatus(
        rank=rank,
        number=number,
        still=still,
        update=pulse.update,
        phase=pulse.phase,
        entered=counts,
        pending=pending() if look else "",
        stack=stacks(),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=born(os.getpid()),
        report=agents_file(),
        said=time.time(),
    )


def entered() -> dict[str, int]:
    """Collectives entered so far by group."""
    return {group.group_name: int(group._get_sequence_number_for_group()) for group in groups()}


def groups() -> list[Any]:
    """The process groups that this rank is a member of (torch's stubs do not know that they count)."""
    return list(distributed_c10d._world.pg_map)


def set_time_limit(known: set[str], limit: timedelta) -> None:
    """Gives groups that are not in ``known`` the limit, and puts them there.

    torch gives every group but the first one limits of its own (half an hour), whoever makes it.
    """
    for group in groups():
        if group.group_name not in known:
            with suppress(RuntimeError, ValueError):
                distributed_c10d._set_pg_timeout(limit, group)
            known.add(group.group_name)


def stacks() -> list[str]:
    """The main thread's frames, innermost first, and below those of other threads that do something."""
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
    for home in _HOMES:
        if path.startswith(home):
            return path.removeprefix(home)
    return path


def pending() -> str:
    """The first collective that was entered and not left, from torch's flight recorder; empty where it knows none."""
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


def born(pid: int) -> str:
    """When a process of this host began, in the kernel's ticks; empty where there is none."""
    return _stat(pid)[19:20][0] if _stat(pid) else ""


def condition(pid: int) -> str:
    """What the kernel says of a process of this host."""
    stat = _stat(pid)
    return _CONDITIONS.get(stat[0], ALIVE) if stat else "gone"


ALIVE = "alive"
_CONDITIONS = {
    "T": "stopped by a signal (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "waiting in the kernel (a disk, a network file system, a driver)",
    "Z": "dead",
}


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
