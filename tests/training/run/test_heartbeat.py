from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from moe_train.training import RunFolder, train
from moe_train.training.run.heartbeat import FRESH, alive, heartbeat, other_host
from moe_train.training.run.run_folder import ALIVE
from tests.training.toy import ToyTask, toy_config


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_beats_while_entered(tmp_path: Path) -> None:
    path = tmp_path / ALIVE
    path.write_text("elsewhere 1\n")
    with heartbeat(path, every=0.02):
        wait_until(lambda: path.exists() and path.read_text() == f"{os.uname().nodename} {os.getpid()}\n")
        os.utime(path, (0, 0))
        wait_until(lambda: alive(path))
        assert other_host(path) == ""
        path.unlink()  # somebody tidied up
        wait_until(path.exists)
    assert not path.exists() and not alive(path)


def test_it_grows_old(tmp_path: Path) -> None:
    """As of a run that was killed."""
    path = tmp_path / ALIVE
    assert not alive(path) and other_host(path) == ""
    path.write_text("elsewhere 1\n")
    assert alive(path) and other_host(path) == "elsewhere"
    os.utime(path, (time.time() - FRESH - 1,) * 2)
    assert not alive(path) and other_host(path) == ""


def test_a_heartbeat_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / ALIVE
    for content, host in (
        (b"\xff\xfe 1", "\ufffd\ufffd"),
        (b"\x1b[2Jx 1", "␛[2Jx"),
        (b"x" * 5000, "x" * 255),
        (b" ", ""),
    ):
        path.write_bytes(content)
        assert other_host(path) == host
    path.unlink()
    os.mkfifo(path)
    assert other_host(path) == ""


@pytest.mark.processes
def test_a_run_that_validates_is_alive(tmp_path: Path) -> None:
    """Whatever the age of its log lines; one that has ended is not."""
    config = toy_config(max_updates=2, validation={"every_updates": 2, "bleu": True, "metric": "bleu"})
    folder = RunFolder(tmp_path)
    folder.begin(config)

    def score(model: nn.Module, between: Callable[[], None]) -> dict[str, float]:
        wait_until(lambda: alive(tmp_path / ALIVE))
        return {"a-b": 1.0}

    assert train(config, ToyTask(config), folder, validate_bleu=score).status == "finished"
    assert not (tmp_path / ALIVE).exists()


def test_a_folder_that_another_host_uses_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    with caplog.at_level(logging.WARNING, "moe_train"), folder.claimed():
        assert not caplog.text
    (tmp_path / ALIVE).write_text("elsewhere 1\n")
    with caplog.at_level(logging.WARNING, "moe_train"), folder.claimed():
        assert "in use by elsewhere a moment ago" in caplog.text


def test_a_folder_that_cannot_be_locked_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails as a file system without locks does, of which there is none to mount everywhere."""

    def refuse(stream: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "moe_train"), RunFolder(tmp_path).claimed():
        assert "cannot be locked" in caplog.text and "No locks available" in caplog.text
