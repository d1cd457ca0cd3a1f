"""Starts torchrun as a user does, its agents and ranks real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# For agents on this machine that should notice at once what has become of each other.
QUICK = ["--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=3", "--monitor-interval=0.2"]


def command(processes: int, *words: str, options: Sequence[str] = ("--standalone",)) -> list[str]:
    """``torchrun OPTIONS --nproc-per-node=N WORDS``; a word such as ``package.module`` behind ``-m`` is a module."""
    return [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}", *words]


def job(processes: int, function: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs ``tests.launch.jobs:function`` on ranks of torchrun, with these arguments."""
    call = f"from tests.launch import jobs; jobs.{function}(*{arguments!r})"
    words = command(processes, "--no-python", sys.executable, "-c", call)
    return subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
