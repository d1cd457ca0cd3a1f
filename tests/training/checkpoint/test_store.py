from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.config import CheckpointConfig, EngineConfig, TrainingConfig
from moe_train.errors import CheckpointError
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.dcp import load_tensors, shapes
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.state_dict import empty_optimizer_state, model_tensors, optimizer_tensors
from moe_train.training.checkpoint.store import STATE, CheckpointStore, load_model, read_state
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.world import World
from tests.small_disks import mounted_disk
from tests.training.toy import EXPERTS, ToyModel
from tests.training.toy_run import assert_same_bits, weights


def checkpoints(folder: Path, **keys: Any) -> CheckpointManager:
    torch.manual_seed(1)
    engine = build_engine(EngineInputs(ToyModel(0.0), EngineConfig(), TrainingConfig(), World()))
    return CheckpointManager(CheckpointStore(folder), engine, CheckpointConfig(**keys), {"world": 1})


def step(kept: CheckpointManager) -> None:
    logits, _ = kept.engine.module(torch.arange(12))
    kept.engine.backward(logits.square().mean())
    kept.engine.step(0.1)


@pytest.fixture
def filled(tmp_path: Path) -> CheckpointManager:
    """Checkpoints of updates 1, 2 and 3."""
    kept = checkpoints(tmp_path / "checkpoints", keep=3)
    for update in (1, 2, 3):
        step(kept)
        kept.save(RunState(update=update, best_update=2, best=0.5))
    return kept


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_is_saved_comes_back(filled: CheckpointManager) -> None:
    again = checkpoints(filled.store.folder)
    before = weights(again.engine.module)
    state = again.restore()
    assert state is not None and (state.update, state.best, state.best_update) == (3, 0.5, 2)
    assert_same_bits(weights(again.engine.module), weights(filled.engine.module))
    assert not torch.equal(before["experts"], again.engine.module.experts)
    for kept in (again, filled):
        step(kept)  # with the same moments the next step is the same
    assert_same_bits(weights(again.engine.module), weights(filled.engine.module))


def test_experts_are_stored_one_by_one_under_their_global_ids(filled: CheckpointManager) -> None:
    names = set(shapes(filled.store.path(3)))
    assert {f"model.experts.@{e}" for e in range(EXPERTS)} <= names
    assert {f"optimizer.experts.@{e}.exp_avg" for e in range(EXPERTS)} <= names
    assert "optimizer.experts.step" in names and "model.experts" not in names


def test_a_rank_that_holds_some_experts_reads_those(filled: CheckpointManager) -> None:
    class Half(ToyModel):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.experts = torch.nn.Parameter(self.experts.detach()[:2].clone())
            self.experts.expert, self.experts.expert_ids = True, (1, 3)  # type: ignore[attr-defined]

    half = Half()
    path = filled.store.path(3)
    load_model(path, half)
    whole = filled.engine.module.experts
    assert torch.equal(half.experts, whole.detach()[[1, 3]])
    state = empty_optimizer_state(half, shapes(path))
    load_tensors(path, optimizer_tensors(half, state))
    moments = filled.engine.optimizer_tensors()["experts"]
    assert torch.equal(state["experts"]["exp_avg_sq"], moments["exp_avg_sq"][[1, 3]])
    assert float(state["experts"]["step"]) == 3.0


def test_no_pickle_in_a_checkpoint(filled: CheckpointManager) -> None:
    kinds = {path.suffix for path in filled.store.path(3).iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_links_and_names(filled: CheckpointManager) -> None:
    store = filled.store
    assert store.updates() == [1, 2, 3]
    assert os.readlink(store.folder / "last") == "step_3" and os.readlink(store.folder / "best") == "step_2"
    for which, update in {"last": 3, "best": 2, "step_1": 1, "1": 1}.items():
        assert store.resolve(which).name == f"step_{update}"
    with pytest.raises(CheckpointError, match=r"no checkpoint '9'.*step_1, step_2, step_3"):
        store.resolve("9")


@pytest.mark.parametrize("links", ["folders", "left out"])
def test_a_copy_without_links_has_the_same_best_checkpoint_and_goes_on(
    filled: CheckpointManager, tmp_path: Path, links: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`cp -rL` makes folders of links, other programs leave them out. The newest checkpoint is not the best."""
    folder = tmp_path / "copy"
    shutil.copytree(filled.store.folder, folder, symlinks=links == "left out")
    if links == "left out":
        for name in ("best", "last"):
            (folder / name).unlink()
    again = checkpoints(folder, keep=1)
    assert again.store.resolve("best") == folder / "step_2" and again.store.resolve("last") == folder / "step_3"
    assert (state := again.restore()) is not None and state.best_update == 2
    step(again)
    again.save(RunState(update=4, best_update=2, best=0.5))
    assert again.store.updates() == [2, 4], "the best one is kept"
    assert os.readlink(folder / "best") == "step_2" and os.readlink(folder / "last") == "step_4"
    if links == "folders":
        again.store.verify(folder / "best.copied")
        assert "best was a folder and not a link: it is now best.copied" in caplog.text


def test_a_folder_that_stands_for_the_best_checkpoint_is_taken_where_there_is_no_other(
    filled: CheckpointManager,
) -> None:
    folder = filled.store.folder
    (folder / "best").unlink()
    os.replace(folder / "step_2", folder / "best")
    assert filled.store.resolve("best") == folder / "best"


def test_another_checkpoint_does_not_stand_for_the_best_without_a_word(filled: CheckpointManager) -> None:
    shutil.rmtree(filled.store.path(2))
    with pytest.raises(CheckpointError, match=r"best: the best checkpoint is step_2, and that is not there.*last"):
        filled.store.resolve("best")


@pytest.mark.parametrize(
    "content", ["[]", "{", "[" * 100_000, '{"update": "3"}', '{"update": -1}', '{"best": []}', '{"engine": 1}', "\xff"]
)
def test_a_damaged_state_is_named(filled: CheckpointManager, content: str) -> None:
    """With a manifest that agrees, as hostile hands would leave it."""
    latest = filled.store.path(3)
    (latest / STATE).write_bytes(content.encode("latin1"))
    names = sorted(path.name for path in latest.iterdir() if path.name != checksums.MANIFEST)
    checksums.write_manifest(latest, {name: checksums.digest(latest / name) for name in names})
    with pytest.raises(CheckpointError, match=r"step_3/state\.json: the checkpoint's state"):
        checkpoints(filled.store.folder).restore()


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep=2)
    for update in range(1, 7):
        kept.save(RunState(update=update, best=0.1, best_update=2 if update > 1 else 1))
    assert kept.store.updates() == [2, 5, 6]


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "no manifest", "broken manifest", "state"])
def test_damage_is_named_and_the_one_before_is_offered(filled: CheckpointManager, damage: str) -> None:
    folder = filled.store.path(3)
    victim = {"no manifest": folder / "manifest.json", "broken manifest": folder / "manifest.json"}.get(damage)
    victim = victim or (folder / "state.json" if damage == "state" else files(folder)[0])
    content = victim.read_bytes()
    if damage in ("missing", "no manifest"):
        victim.unlink()
    elif damage in ("truncated", "broken manifest"):
        victim.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(CheckpointError) as raised:
        filled.store.resolve("last")
    assert str(victim) in str(raised.value) and "step_2, is whole" in str(raised.value)
    with pytest.raises(CheckpointError):
        filled.restore()
    assert filled.store.resolve("2").name == "step_2"


@pytest.mark.parametrize("damage", ["cut short", "one byte flipped"])
def test_a_damaged_one_can_be_skipped(filled: CheckpointManager, damage: str) -> None:
    """The run goes on from the newest whole one, to the same bits; the damaged one is kept under another name."""
    store = filled.store
    victim = files(store.path(3))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content[:-9]) if damage == "cut short" else bytes(content))
    again = checkpoints(store.folder, damaged="skip")
    state = again.restore()
    assert state is not None and state.update == 2
    assert store.updates() == [1, 2] and files(store.folder / "step_3.damaged")
    (note,) = again.notes()
    assert str(victim) in note and "set aside as step_3.damaged" in note
    step(again)
    assert_same_bits(weights(again.engine.module), weights(filled.engine.module))


def test_what_was_set_aside_before_and_folders_of_the_users_stay(filled: CheckpointManager) -> None:
    folder = filled.store.folder
    for name in ("step_3.damaged", "best_so_far.partial", "step_x.partial"):
        (folder / name).mkdir()
        (folder / name / "notes").write_text("mine")
    files(filled.store.path(3))[0].write_bytes(b"")
    again = checkpoints(folder, damaged="skip", keep=1)
    again.restore()
    assert again.notes()[0].endswith("step_3 was set aside as step_3.damaged1")
    (folder / "step_1.partial").mkdir()
    again.save(RunState(update=3, best_update=3))
    names = {"last", "best", "step_3", "step_3.damaged", "step_3.damaged1", "best_so_far.partial", "step_x.partial"}
    assert set(os.listdir(folder)) == names
    for name in ("step_3.damaged", "best_so_far.partial", "step_x.partial"):
        assert (folder / name / "notes").read_text() == "mine"


def test_a_mean_that_cannot_be_replaced_stays(filled: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = checkpoints(filled.store.folder, average=2)
    filled.average(2)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name == "averaged.partial":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        filled.average(3)
    assert read_state(filled.store.resolve("averaged"))["update"] == 2


def test_skipping_never_begins_anew(filled: CheckpointManager) -> None:
    for update in (1, 2, 3):
        files(filled.store.path(update))[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="step_1"):
        checkpoints(filled.store.folder, damaged="skip").restore()


def test_only_a_whole_one_is_offered(filled: CheckpointManager) -> None:
    for update in (2, 3):
        files(filled.store.path(update))[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="step_1, is whole"):
        filled.store.resolve("last")
    files(filled.store.path(1))[0].unlink()
    with pytest.raises(CheckpointError, match="No other checkpoint"):
        filled.store.resolve("last")


def test_manifest_cannot_lead_outside(filled: CheckpointManager) -> None:
    manifest = filled.store.path(3) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../step_2/state.json"] = content["files"].pop("state.json")
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="manifest cannot be read"):
        filled.store.resolve("last")


def test_another_model_is_refused(filled: CheckpointManager) -> None:
    path = filled.store.path(3)
    wider = ToyModel(0.0)
    wider.output = torch.nn.Linear(16, 13)
    with pytest.raises(CheckpointError, match=r"output\.weight.*\[12, 16\].*\[13, 16\]"):
        load_model(path, wider)
    larger = ToyModel(0.0)
    larger.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.extra\.weight'"):
        load_model(path, larger)
    smaller = ToyModel(0.0)
    del smaller.norm
    with pytest.raises(CheckpointError, match="2 parameters that the model has not"):
        load_model(path, smaller)


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    model = ToyModel(0.0)
    model.output.weight = model.embed.weight
    store = CheckpointStore(tmp_path)
    path = store.save(model_tensors(model), {"update": 1}, "step_1")
    assert "model.output.weight" not in shapes(path)
    other = ToyModel(0.0)
    other.output.weight = other.embed.weight
    load_model(path, other)
    assert torch.equal(other.output.weight, model.embed.weight)


def test_the_mean_of_the_last(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep=1, average=3)
    snapshots = []
    for update in range(1, 6):
        step(kept)
        kept.engine.module.seen += update
        kept.save(RunState(update=update))
        snapshots.append(weights(kept.engine.module))
    assert kept.store.updates() == [3, 4, 5]
    path = kept.average(5)
    assert path is not None and path.name == "averaged" and read_state(path)["averaged"] == [3, 4, 5]
    model = ToyModel(0.0)
    load_model(kept.store.resolve("averaged"), model)
    for name, tensor in weights(model).items():
        mean = sum(snapshot[name].double() for snapshot in snapshots[2:]) / 3
        torch.testing.assert_close(tensor, mean.float())


def test_a_failed_write_leaves_what_was_there(filled: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal is the last thing before the rename; fails there as a disk would."""
    before = filled.store.path(3).stat().st_mtime_ns

    def full(folder: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moe_train.training.checkpoint.checksums.write_manifest", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step_3 is whole"):
        filled.save(RunState(update=4))
    assert filled.store.updates() == [1, 2, 3] and not list(filled.store.folder.glob("*.partial"))
    assert filled.store.path(3).stat().st_mtime_ns == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, where this user may mount one."""
    with mounted_disk(tmp_path, "3m") as disk:
        yield disk


@pytest.mark.processes
def test_a_disk_that_fills(small_disk: Path) -> None:
    tensors = {"model.weight": torch.randn(500_000)}  # 2 MB: the second one does not fit
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(tensors, {"update": 1}, "step_1")
    with pytest.raises(CheckpointError, match=r"No space left on device.*step_1 is whole: the run resumes from it"):
        store.save(tensors, {"update": 2}, "step_2")
    assert store.updates() == [1]
    read = {"model.weight": torch.empty(500_000)}
    load_tensors(store.resolve("last"), read)
    assert torch.equal(read["model.weight"], tensors["model.weight"])


@pytest.mark.processes
@pytest.mark.warm_start
def test_a_quota_on_file_size(tmp_path: Path) -> None:
    """The same without the right to mount: the kernel refuses files beyond a limit."""
    program = """
        import resource, sys, torch
        from moe_train.errors import CheckpointError
        from moe_train.training.checkpoint.store import CheckpointStore
        store = CheckpointStore(sys.argv[1])
        store.save({"model.weight": torch.zeros(1000)}, {"update": 1}, "step_1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save({"model.weight": torch.zeros(100_000)}, {"update": 2}, "step_2")
        except CheckpointError as error:
            print(error)
        print(store.updates(), store.resolve("last").name)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "File too large" in done.stdout and "[1] step_1" in done.stdout, done.stdout + done.stderr
