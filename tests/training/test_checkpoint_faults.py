"""Checkpoints that some rank cannot read, that cannot be removed, or that are damaged when they are averaged."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from moe_train.config import CheckpointConfig, EngineConfig, TrainingConfig
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.store import CheckpointStore, load_model, read_state
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.world import World
from tests.distributed.world import Worlds
from tests.small_disks import mounted_disk
from tests.training.checkpoint_jobs import refused, restore
from tests.training.toy import ToyModel
from tests.training.toy_run import assert_same_bits, weights

UNREADABLE = "y" * 300  # no file system takes such a name: what points to it gives an error, not "no such file"


def saved(folder: Path, *updates: int, **keys: int) -> tuple[CheckpointManager, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(1)
    engine = build_engine(EngineInputs(ToyModel(0.0), EngineConfig(), TrainingConfig(), World()))
    checkpoints, snapshots = CheckpointManager(CheckpointStore(folder), engine, CheckpointConfig(**keys), {}), []
    for update in updates:
        engine.backward(engine.module(torch.arange(12))[0].square().mean())
        engine.step(0.1)
        checkpoints.save(RunState(update=update))
        snapshots.append(weights(engine.module))
    return checkpoints, snapshots


def spoil(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))


@pytest.mark.parametrize("unreadable", ["all", "manifest"])
def test_one_rank_that_cannot_read_speaks_for_all(worlds: Worlds, tmp_path: Path, unreadable: str) -> None:
    """Rank 1 sees another folder, where the newest checkpoint gives errors: both ranks take the same checkpoint."""
    _, snapshots = saved(tmp_path / "0", 1, 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1", symlinks=True)
    for file in (tmp_path / "1" / "step_2").iterdir():
        if unreadable == "all" or file.name == "manifest.json":
            file.unlink()
            file.symlink_to(UNREADABLE)
    (one, loaded, notes), (other, too, _) = worlds(2).run_each(
        restore, [(str(tmp_path / "0"),), (str(tmp_path / "1"),)]
    )
    expected = 1 if unreadable == "all" else 2  # rank 0 reads manifests for all
    assert one == other == expected
    assert_same_bits(loaded, too)
    assert_same_bits(loaded, snapshots[expected - 1])
    assert [("cannot be read" in note and "set aside" in note) for note in notes] == [True] * (2 - expected)


def test_ranks_share_the_search_for_a_way_out(worlds: Worlds, tmp_path: Path) -> None:
    """The damaged one and the one before it are read once, not once a rank."""
    (said, read), (too, other) = worlds(2).run(refused, str(tmp_path), 4)
    assert said == too and "step_2, is whole" in said
    assert 2.0 < (read + other) / (4 << 20) < 2.5


def test_what_cannot_be_removed_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mount in an old checkpoint keeps it busy, as a reader on NFS would; the save after it is good all the same."""
    checkpoints, _ = saved(tmp_path, 1, keep=1)
    old, rest = tmp_path / "step_1", tmp_path / "step_1.removed.partial"
    with mounted_disk(old, "64k"), caplog.at_level(logging.WARNING, "moe_train"):
        checkpoints.save(RunState(update=2))
        assert checkpoints.store.updates() == [2] and (rest / "disk").is_dir()
        assert f"{rest} cannot be removed yet: Device or resource busy" in caplog.text
        checkpoints.save(RunState(update=3))
        assert checkpoints.store.resolve("last").name == "step_3" and rest.is_dir()
        rest.rename(old)  # where its mount is to be ended
    old.rename(rest)
    checkpoints.save(RunState(update=4))
    assert checkpoints.store.updates() == [4] and not list(tmp_path.glob("*.partial"))


def test_a_damaged_one_is_left_out_of_the_mean(tmp_path: Path) -> None:
    checkpoints, snapshots = saved(tmp_path, 1, 2, 3, average=3)
    spoil(tmp_path / "step_2")
    path = checkpoints.average(3)
    assert path is not None and read_state(path)["averaged"] == [1, 3]
    assert [("step_2" in note and "without it" in note) for note in checkpoints.notes()] == [True]
    model = ToyModel(0.0)
    load_model(checkpoints.store.resolve("averaged"), model)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, ((snapshots[0][name].double() + snapshots[2][name].double()) / 2).float())
    spoil(tmp_path / "step_1")
    spoil(tmp_path / "step_3")
    assert checkpoints.average(3) is None and len(checkpoints.notes()) == 3
