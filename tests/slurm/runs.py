"""Small runs on the cluster, and a hand on their processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from moe_train.data.folder import DataFolder
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds for what takes ten on a machine that does nothing else
# Two ranks, 40 updates, a checkpoint nowhere but at the end: what a signal does not save is lost and would show.
SMALL = [
    *("model.embed_dim=32", "model.ffn_dim=64", "model.num_heads=2", "routing.num_experts=4"),
    *("training.max_updates=40", "training.tokens_per_update=600", "training.log_every=2", "training.threads=1"),
    *("training.checkpoint.every_updates=100", "training.validation.every_updates=40", "training.optimizer.lr=0.01"),
    *("training.schedule.warmup_updates=5", "training.validation.max_sentences=10"),
]


def keys(data: DataFolder, *more: str) -> list[str]:
    """Of a small run."""
    return [f"data={data.path}", *SMALL, *more]


def moe_train(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command, started."""
    command = [sys.executable, "-m", "moe_train.commands.train", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def under_way(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, for as long as the block lasts."""
    command = moe_train(*words, cwd=cwd)
    try:
        yield command
    finally:
        command.kill()


def ended(command: subprocess.Popen[str], code: int = 0, timeout: float = PATIENCE) -> str:
    """What it said; it must leave with ``code``."""
    try:
        said, _ = command.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    assert command.returncode == code, said
    return said


def until(is_so: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    """Waits."""
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.02)


def holders(file: Path) -> list[int]:
    """Processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(file):
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return sorted(found)


@contextmanager
def held_at_first_line(folder: Path, ranks: int = 2) -> Iterator[list[int]]:
    """Once the run has logged, its ranks stand still inside: whatever comes then finds them training.

    Gives their processes.
    """
    until((folder / "train.jsonl").is_file, f"the first log line in {folder}")
    held = [process for rank in range(ranks) for process in holders(folder / "logs" / f"rank_{rank}.log")]
    assert len(held) == ranks
    for process in held:
        os.kill(process, signal.SIGSTOP)
    until(lambda: all("State:\tT" in Path(f"/proc/{process}/status").read_text() for process in held), "the halt")
    try:
        yield held
    finally:
        for process in held:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def has_been_told(process: int) -> bool:
    """Whether a process that stands still has a signal waiting, or no longer stands still: Slurm sends CONT, too."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    waiting = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", status, flags=re.MULTILINE)
    return "State:\tT" not in status or any(int(mask, 16) for mask in waiting)


def urgent_job(cluster: Cluster) -> str:
    """The number of a job that wants all of both nodes at once, and is done in a moment."""
    return cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def show_cost(folder: Path, told: float) -> None:
    """Prints what an interruption cost on this machine (pytest -s), from rank 0's log; no test judges seconds.

    Args:
        told: when the ranks were let go with the signal in their hands, as time.time() gives it.
    """
    log = (folder / "logs" / "rank_0.log").read_text().splitlines()
    place = next(number for number, line in enumerate(log) if "interrupted at update" in line)
    saved, again = (datetime.fromisoformat(log[number][:19]).timestamp() for number in (place, place + 1))
    print(f"\n{folder}: saved {saved - told:.0f} s after the signal, training again {again - told:.0f} s after it")


def sessions(said: str) -> list[tuple[int, int]]:
    """From a run's output: (update at which a session stopped, update from which the next went on)."""
    stopped = [int(number) for number in re.findall(r"interrupted at update (\d+)", said)]
    resumed = [int(number) for number in re.findall(r"resumes from +update (\d+)", said)]
    return list(zip(stopped, resumed, strict=True))
