"""Checkpoints written in the background: the same files, while training goes on, and nothing lost where it fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.config import CheckpointConfig, EngineConfig, RunConfig, TrainingConfig
from moe_train.errors import CheckpointError
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.background_job import BackgroundJob
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.store import CheckpointStore, load_model
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.world import World
from tests.small_disks import mounted_disk
from tests.training.toy import ToyModel, toy_config
from tests.training.toy_run import assert_same_bits, final_tensors, lines, start, weights


def checkpoints(folder: Path, **keys: int) -> CheckpointManager:
    torch.manual_seed(1)
    engine = build_engine(EngineInputs(ToyModel(0.0), EngineConfig(), TrainingConfig(), World()))
    return CheckpointManager(CheckpointStore(folder), engine, CheckpointConfig(asynchronous=True, **keys), {"world": 1})


def step(kept: CheckpointManager) -> None:
    logits, _ = kept.engine.module(torch.arange(12))
    kept.engine.backward(logits.square().mean())
    kept.engine.step(0.1)


class Gate:
    """Holds the writer before it seals a checkpoint, as a slow disk would."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.seal = checksums.write_manifest
        patch.setattr(checksums, "write_manifest", self)

    def __call__(self, folder: Path, files: Any) -> None:
        self.reached.set()
        assert self.open.wait(60)
        self.seal(folder, files)


def test_updates_go_on_and_do_not_leak_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, kept = Gate(monkeypatch), checkpoints(tmp_path)
    step(kept)
    before = weights(kept.engine.module)
    path = kept.save(RunState(update=1))
    assert gate.reached.wait(60) and not path.exists(), "it has no name before it is whole"
    step(kept)
    gate.open.set()
    kept.finish()
    read = ToyModel(0.0)
    load_model(kept.store.resolve("1"), read)
    assert_same_bits(weights(read), before)
    assert not torch.equal(kept.engine.module.output.weight, before["output.weight"])
    kept.close()


def test_the_next_save_waits_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, kept = Gate(monkeypatch), checkpoints(tmp_path, keep=2)
    kept.save(RunState(update=1))
    gate.reached.wait(60)
    second = threading.Thread(target=lambda: [kept.save(RunState(update=n, best_update=1)) for n in (2, 3, 4)])
    second.start()
    second.join(0.3)
    assert second.is_alive() and kept.store.updates() == []
    gate.open.set()
    second.join(60)
    kept.close()
    assert kept.store.updates() == [1, 3, 4]
    assert (tmp_path / "last").resolve().name == "step_4" and (tmp_path / "best").resolve().name == "step_1"


@pytest.mark.parametrize("told", ["next save", "end"])
def test_a_failure_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(RunState(update=1))
    kept.finish()

    def full(folder: Path, files: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checksums, "write_manifest", full)
    kept.save(RunState(update=2))
    with pytest.raises(CheckpointError, match=r"step_2: .*No space left.*step_1 is whole"):
        kept.save(RunState(update=3)) if told == "next save" else kept.finish()
    assert kept.store.updates() == [1] and not list(tmp_path.glob("*.partial"))
    assert kept.store.resolve("last").name == "step_1"
    kept.finish()  # said once
    kept.close()


def test_closing_after_another_error_says_nothing(tmp_path: Path) -> None:
    background = BackgroundJob()
    background.start(lambda: 1 / 0)
    background.close()
    background.close()


def config(**keys: Any) -> RunConfig:
    checkpoint = {"every_updates": 3, "asynchronous": True, **keys.pop("checkpoint", {})}
    return toy_config(max_updates=11, log_every=4, checkpoint=checkpoint, **keys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that wait for the disk."""
    path = tmp_path_factory.mktemp("plain") / "run"
    start(config(checkpoint={"asynchronous": False, "average": 2}), path, processes=2)
    return path


@pytest.mark.processes
@pytest.mark.warm_start
def test_two_processes_end_in_the_same_files(plain: Path, tmp_path: Path) -> None:
    """One of them is asked to stop on the way; what it had begun to write is whole, and the run resumes from it."""
    path = tmp_path / "run"
    averaging = config(checkpoint={"average": 2})
    outcome = start(averaging, path, processes=2, trouble={"rank": 1, "update": 5, "what": "term"})
    assert outcome.status == "interrupted"
    assert CheckpointStore(path / "checkpoints").resolve("last").name == f"step_{outcome.update}"
    assert start(averaging, path, processes=2).status == "finished"
    for which in ("last", "best", "averaged"):
        assert_same_bits(final_tensors(path, which), final_tensors(plain, which))
    assert lines(path) == lines(plain)
    assert not list((path / "checkpoints").glob("*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB, where this user may mount one: room for some of the toy's checkpoints."""
    with mounted_disk(tmp_path, "256k") as disk:
        yield disk


def test_a_disk_that_fills(small_disk: Path) -> None:
    kept = checkpoints(small_disk / "checkpoints", keep=100)
    with pytest.raises(CheckpointError, match=r"No space left on device.*is whole: the run resumes from it"):
        for update in range(1, 100):
            step(kept)
            kept.save(RunState(update=update))
    written = kept.store.updates()
    assert written and written == list(range(1, written[-1] + 1))
    assert kept.store.resolve("last").name == f"step_{written[-1]}"
    again = checkpoints(small_disk / "checkpoints")
    state = again.restore()
    assert state is not None and state.update == written[-1]
    kept.close()
