"""What a process does that was asked to stop and has saved. With submitit on a real Slurm: tests/slurm."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from moe_train.launch.requeue import INTERRUPTED, leave_saved


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
        leave_saved(*arguments)
    return left.value.code


def test_without_submitit_the_exit_code_says_it(handed_on: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert code() == INTERRUPTED == 75 and code(143) == 143 and not handed_on


def test_submitit_is_told_by_rank_0_alone(handed_on: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert code() == 75 and handed_on == [signal.SIGUSR2]
    monkeypatch.setenv("RANK", "1")
    leave_saved()
    assert len(handed_on) == 1
