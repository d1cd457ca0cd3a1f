"""A rank ends when it is to end, whatever its streams and the others' store do. Real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_train.launch.job.env import JOB

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
LEAVES = "from moe_train.launch.job.hard_exit import exit_now; print('x', end=''); exit_now(3)"
# A diagnosis is carried out: the store that brought it has gone meanwhile, and the screen takes nothing.
ENDS = """
    import os, sys
    sys.excepthook = lambda *error: os._exit(9)
    from datetime import timedelta
    import torch.distributed as dist
    from moe_train.launch.job.job_channel import JobChannel
    from moe_train.launch.job.failures import Failure
    from moe_train.launch.job.job_store import MessageSigner, SignedStore
    from moe_train.launch.watchdog.watchdog import _Watchdog
    from moe_train.training.runtime.world import World

    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    patience = timedelta(seconds=5)
    store = dist.TCPStore("127.0.0.1", master.port, is_master=False, wait_for_workers=False, timeout=patience)
    channel = JobChannel(SignedStore(store, MessageSigner(b"of this job alone"), "job"))
    watch = _Watchdog(World(rank=0, size=2), channel, 1.0)
    diagnosis = channel.diagnosis
    def last_word():
        global master
        found = diagnosis()
        del master
        return found
    channel.first_diagnosis(Failure(1, 0.0, "it hangs"))
    channel.diagnosis = last_word
    print("x", end="")
    watch.start()
    watch.join(60)
"""


def run(program: str, out: int) -> int:
    """The exit code of a program that speaks to ``out``."""
    without = (JOB, "TORCHELASTIC_ERROR_FILE", "PYTHONUNBUFFERED")  # what is printed waits until it leaves
    environment = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(
        command, stdout=out, stderr=out, timeout=60, check=False, cwd=ROOT, env=environment
    ).returncode


@pytest.mark.parametrize("screen", ["full disk", "closed pipe", "full pipe"])
def test_it_leaves_whatever_its_screen_does(screen: str) -> None:
    if screen == "full disk":
        with open("/dev/full", "w") as full:
            assert run(LEAVES, full.fileno()) == 3
        return
    reader, writer = os.pipe()
    if screen == "closed pipe":
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        while True:
            try:
                os.write(writer, bytes(65536))
            except BlockingIOError:
                break
        os.set_blocking(writer, True)
    assert run(LEAVES, writer) == 3
    os.close(writer)


def test_a_diagnosis_is_carried_out_though_store_and_screen_are_gone() -> None:
    with open("/dev/full", "w") as full:
        assert run(ENDS, full.fileno()) == 1
