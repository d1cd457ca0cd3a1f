"""What a process does that was asked to stop and has saved. With submitit on a real Slurm: tests/slurm."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from moe_train.launch.requeue import INTERRUPTED, exit_saved


@pytest.fixture
def handed_on() -> Iterator[list[int]]:
    """Signals that reach the handler of SIGUSR2, which would be submitit's."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGUSR2, handler)
    yield received
    signal.signal(signal.SIGUSR2, before)


def code(*arguments: int) -> object:
    with pytest.raises(SystemExit) as left:
        exit_saved(*arguments)
    return left.value.code


def test_without_submitit_the_exit_code_says_it(handed_on: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert code() == INTERRUPTED == 75 and code(143) == 143 and not handed_on


def test_submitit_is_told_by_rank_0_alone(handed_on: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert code() == 75 and handed_on == [signal.SIGUSR2]
    monkeypatch.setenv("RANK", "1")
    exit_saved()
    assert len(handed_on) == 1


BUSY = """#!/bin/sh
echo "$*" >> {asked}
[ "$(wc -l < {asked})" -gt {times} ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
echo "JobId=9 ArrayJobId=7 ArrayTaskId=2 JobState={state}"
"""


@pytest.mark.processes
@pytest.mark.parametrize(("times", "state", "handed"), [(0, "RUNNING", 1), (1, "RUNNING", 1), (0, "CANCELLED", 0)])
def test_a_controller_that_is_busy_is_no_reason_to_stay_out_of_the_queue(
    times: int,
    state: str,
    handed: int,
    handed_on: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And it is asked about this element of an array, not about all."""
    asked = tmp_path / "asked"
    program = tmp_path / "scontrol"
    program.write_text(BUSY.format(asked=asked, times=times, state=state))
    program.chmod(0o755)
    told = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for name, value in {**told, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    assert code() == 75 and len(handed_on) == handed
    assert set(asked.read_text().splitlines()) == {"--oneliner show job 7_2"}
    assert ("assumed to be running" in capsys.readouterr().err) == (times > 0)


@pytest.mark.processes
def test_submitit_is_asked_again_where_slurm_does_not_take_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its handler does: scontrol's failure is raised."""
    times: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        times.append(number)
        subprocess.run(["false" if len(times) < 3 else "true"], check=True)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setattr("moe_train.launch.requeue._PAUSE", 0.01)
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        assert code() == 75 and len(times) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert capsys.readouterr().err.count("did not requeue the job") == 2
