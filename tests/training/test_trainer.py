"""The loop in one process, on the toy task."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from moe_train.config import RunConfig, ValidationConfig
from moe_train.errors import CheckpointError, ConfigError, TrainingError
from moe_train.training import RunFolder, RunOutcome, train
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.store import CheckpointStore, load_model
from moe_train.training.early_stopping import patience_spent, update_best
from moe_train.training.step import PendingReport, UpdateReport
from moe_train.training.trainer import Trainer
from tests.training.toy import EXPERTS, ToyModel, ToyTask, toy_config
from tests.training.toy_run import Trouble, assert_same_bits, final_tensors, lines, start


def go(config: RunConfig, path: Path, task: ToyTask | None = None, **keys: Any) -> RunOutcome:
    folder = RunFolder(path)
    folder.check(config)
    folder.begin(config)
    return train(config, task or ToyTask(config, dropout=0.0), folder, **keys)


def test_the_loss_falls_and_everything_is_written(tmp_path: Path) -> None:
    screen = io.StringIO()
    outcome = go(toy_config(max_updates=60), tmp_path, console=Console(file=screen, width=200))
    trained, validated = lines(tmp_path), lines(tmp_path, "valid.jsonl")
    assert outcome == RunOutcome("finished", 60, validated[-1]["loss"], 60)
    assert [line["update"] for line in trained] == list(range(4, 61, 4))
    assert trained[-1]["loss"] < 0.75 * trained[0]["loss"]
    assert all(b["loss"] < a["loss"] for a, b in itertools.pairwise(validated))
    assert validated[0]["directions"].keys() == {"a-b", "b-a"}
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["status"] == "finished" and info["parameters"]["total"] == 1452 and info["world"]["processes"] == 1
    assert {"torch", "python", "moe_train"} <= info["versions"].keys() and info["command"]
    assert list((tmp_path / "tensorboard").iterdir())
    text = screen.getvalue()
    assert "update 4/60: loss" in text and "left" in text and "validation at update 6" in text and "run folder" in text


def test_a_golden_run(tmp_path: Path) -> None:
    """Numbers of the first run that was checked by hand; a change of batching, seeding or scaling shows here."""
    go(toy_config(), tmp_path, ToyTask(toy_config(), dropout=0.1))
    losses = [line["loss"] for line in lines(tmp_path)]
    assert losses == pytest.approx([2.6187, 2.3980, 2.1414], abs=2e-4)
    assert [line["tokens"] for line in lines(tmp_path)] == [344, 387, 396]


def test_an_update_is_the_gradient_of_the_mean_over_its_tokens(tmp_path: Path) -> None:
    """SGD over two micro-batches of unequal size, against one plain step on all of their tokens."""
    keys = {"optimizer": {"name": "sgd", "lr": 0.5}, "schedule": {"warmup_updates": 0}, "tokens_per_update": 200}
    config = toy_config(max_updates=1, clip_norm=0.0, **keys)
    go(config, tmp_path)
    task = ToyTask(config, dropout=0.0)
    plan = task.train_batches().update(0)
    model = task.build_model()
    samples = [task.train_sample(batch) for batch in plan.micro_batches]
    assert len(samples) == 2 and samples[0]["ntokens"] != samples[1]["ntokens"]
    symbols = torch.cat([s["net_input"]["symbols"] for s in samples])
    target = torch.cat([s["target"] for s in samples])
    nn.functional.cross_entropy(model(symbols)[0], target).backward()
    saved = ToyModel(0.0)
    load_model(CheckpointStore(tmp_path / "checkpoints").resolve("last"), saved)
    for (name, before), after in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.5 * before.grad, rtol=1e-5, atol=1e-6, msg=name)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert lines(tmp_path)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_clipping(tmp_path: Path) -> None:
    keys = {"max_updates": 1, "optimizer": {"name": "sgd", "lr": 1.0}, "schedule": {"warmup_updates": 0}}
    config = toy_config(clip_norm=0.01, **keys)
    go(config, tmp_path)
    before, after = ToyTask(config, 0.0).build_model(), ToyModel(0.0)
    load_model(CheckpointStore(tmp_path / "checkpoints").resolve("last"), after)
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    )
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_routers_are_told_what_all_micro_batches_loaded(tmp_path: Path) -> None:
    go(toy_config(), tmp_path)
    seen = final_tensors(tmp_path)["model.seen"]
    loads = [line["tokens"] * torch.tensor(line["load"]["0"]) for line in lines(tmp_path)]
    torch.testing.assert_close(seen, torch.stack(loads).sum(0).to(seen.dtype))
    assert len(seen) == EXPERTS and float(seen.sum()) == sum(line["tokens"] for line in lines(tmp_path))


def test_interrupting_at_every_update_changes_nothing(tmp_path: Path) -> None:
    """The same bits and lines when each session does one update only."""
    config = toy_config(max_updates=7, log_every=3, validation={"every_updates": 2})
    start(config, tmp_path / "whole")
    for _ in range(8):
        outcome = start(config, tmp_path / "pieces", trouble={"rank": 0, "update": 0, "what": "term"})
        if outcome.status == "finished":
            break
    assert outcome.status == "finished"
    assert len(json.loads((tmp_path / "pieces" / "run.json").read_text())["sessions"]) >= 4
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "pieces"))
    for name in ("train.jsonl", "valid.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "pieces", name)


def test_a_signal_in_a_validation_leaves_it_to_the_next_session(tmp_path: Path) -> None:
    """Saved before it is done; done again where the session after it is killed before its next checkpoint."""
    keys = {"log_every": 3, "validation": {"every_updates": 4, "patience": 2}, "checkpoint": {"every_updates": 100}}
    config = toy_config(max_updates=11, **keys)
    start(config, tmp_path / "whole")
    plan = {"rank": 0, "update": 4, "what": "term", "where": "validation"}  # the second of three batches, at update 8
    assert start(config, tmp_path / "run", trouble=plan).update == 8
    assert [line["update"] for line in lines(tmp_path / "run", "valid.jsonl")] == [4]
    with pytest.raises(ZeroDivisionError):
        start(config, tmp_path / "run", trouble={"rank": 0, "update": 2, "what": "raise"})
    assert [line["update"] for line in lines(tmp_path / "run", "valid.jsonl")] == [4, 8]
    assert start(config, tmp_path / "run").status == "finished"
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "run"))
    for name in ("train.jsonl", "valid.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "run", name)


def test_a_signal_while_translating(tmp_path: Path) -> None:
    """BLEU is broken off too; nothing of the validation is kept."""

    def score(model: nn.Module, between: Callable[[], None]) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        between()
        return {"a-b": 1.0}

    config = toy_config(max_updates=6, validation={"every_updates": 2, "bleu": True, "metric": "bleu"})
    outcome = go(config, tmp_path, validate_bleu=score)
    assert outcome == RunOutcome("interrupted", 2, None, 0) and not (tmp_path / "valid.jsonl").exists()
    assert go(config, tmp_path, validate_bleu=lambda model, between: {"a-b": 2.0}).status == "finished"
    assert [line["update"] for line in lines(tmp_path, "valid.jsonl")] == [2, 4, 6]


def test_more_updates_go_on_from_a_finished_run(tmp_path: Path) -> None:
    go(toy_config(max_updates=8), tmp_path / "run")
    with pytest.raises(ConfigError, match="is finished"):
        go(toy_config(max_updates=8), tmp_path / "run")
    assert go(toy_config(max_updates=12), tmp_path / "run").update == 12
    go(toy_config(max_updates=12), tmp_path / "whole")
    assert_same_bits(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))


def test_a_damaged_checkpoint_stops_the_resume(tmp_path: Path) -> None:
    go(toy_config(max_updates=10, checkpoint={"every_updates": 5}), tmp_path)
    shard = next((tmp_path / "checkpoints" / "step_10").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="Another checkpoint, step_6, is whole"):
        go(toy_config(max_updates=12), tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(precision: str, tmp_path: Path) -> None:
    go(toy_config(max_updates=40, precision=precision), tmp_path)
    trained = lines(tmp_path)
    assert trained[-1]["loss"] < 0.85 * trained[0]["loss"] and trained[-1]["skipped"] <= 2
    state = json.loads((tmp_path / "checkpoints" / "last" / "state.json").read_text())
    assert (state["engine"]["precision"] != {}) == (precision == "fp16")


def test_fp16_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    config = toy_config(max_updates=9, precision="fp16")
    start(config, tmp_path / "whole")
    start(config, tmp_path / "run", trouble={"rank": 0, "update": 4, "what": "term"})
    start(config, tmp_path / "run")
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "run"))


def test_a_fp16_overflow_is_skipped_and_lowers_the_scale(tmp_path: Path) -> None:
    config = toy_config(max_updates=3, precision="fp16", log_every=1, nonfinite_limit=9)
    task = Trouble(config, 0, {"rank": 0, "update": 1, "what": "infinite"}, 0.0)
    go(config, tmp_path, task)
    state = json.loads((tmp_path / "checkpoints" / "last" / "state.json").read_text())
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 1, 2]
    assert state["engine"]["precision"]["scale"] == 65536.0 / 4 and state["skipped_in_row"] == 2


def test_reports_that_are_read_an_update_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. A signal in update 6 is seen, and stops the run, after update 7, whose report is unread then."""
    keys = {"log_every": 5, "validation": {"every_updates": 4}, "checkpoint": {"every_updates": 9}}
    config = toy_config(max_updates=11, precision="fp16", **keys)
    go(config, tmp_path / "soon")
    read, delays = Trainer._read, []

    def noted(trainer: Trainer, pending: PendingReport) -> UpdateReport:
        delays.append(trainer.state.update - pending.update)
        return read(trainer, pending)

    monkeypatch.setattr(Trainer, "late", True)
    monkeypatch.setattr(Trainer, "_read", noted)
    signal_in_6 = {"rank": 0, "update": 5, "what": "term", "where": "computing"}
    stopped = go(config, tmp_path / "late", Trouble(config, 0, signal_in_6, 0.0))
    assert (stopped.status, stopped.update) == ("interrupted", 7)
    assert go(config, tmp_path / "late").status == "finished"
    assert delays == [1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert_same_bits(final_tensors(tmp_path / "soon"), final_tensors(tmp_path / "late"))
    for name in ("train.jsonl", "valid.jsonl"):
        assert lines(tmp_path / "soon", name) == lines(tmp_path / "late", name)


@pytest.mark.parametrize("late", [False, True])
def test_updates_without_a_finite_gradient_are_skipped_then_end_the_run(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "late", late)
    config = toy_config(max_updates=9, log_every=1, nonfinite_limit=3)
    task = Trouble(config, 0, {"rank": 0, "update": 2, "what": "infinite"}, 0.0)
    with pytest.raises(TrainingError, match=r"3 updates in a row.*update 5, rank 0.*training\.optimizer\.lr"):
        go(config, tmp_path, task)
    trained = lines(tmp_path)
    assert [line["skipped"] for line in trained] == [0, 0, 1, 2]
    assert [line["grad_norm"] is None for line in trained] == [False, False, True, True]


def test_early_stopping(tmp_path: Path) -> None:
    keys = {"optimizer": {"name": "sgd", "lr": 1e-30}, "schedule": {"warmup_init_lr": 0.0, "warmup_updates": 1}}
    config = toy_config(max_updates=50, validation={"every_updates": 2, "patience": 3}, **keys)
    outcome = go(config, tmp_path)
    assert outcome.status == "stopped_early" and outcome.update == 8 and outcome.best_update == 2
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped_early"
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_2"


def test_best_by_bleu(tmp_path: Path) -> None:
    scores = iter([3.0, 9.0, 5.0])
    config = toy_config(max_updates=6, validation={"every_updates": 2, "bleu": True, "metric": "bleu"})
    outcome = go(config, tmp_path, validate_bleu=lambda model, between: {"a-b": next(scores), "b-a": 1.0})
    assert outcome.best == 5.0 and outcome.best_update == 4
    assert [line["bleu"] for line in lines(tmp_path, "valid.jsonl")] == [2.0, 5.0, 3.0]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_4"


def test_nan_is_never_the_best() -> None:
    state, config = RunState(update=1), ValidationConfig(patience=2)
    assert not update_best(state, {"loss": math.nan}, config) and state.best is None
    assert update_best(state, {"loss": 2.0}, config) and state.without_gain == 0
    assert not update_best(state, {"loss": 2.0}, config) and not patience_spent(state, config)
    assert not update_best(state, {"loss": math.inf}, config) and patience_spent(state, config)


def test_a_signal_saves_and_leaves_and_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    outcome = start(toy_config(), tmp_path, trouble={"rank": 0, "update": 3, "what": "term"})
    assert outcome.status == "interrupted" and outcome.update in (3, 4, 5)
    assert CheckpointStore(tmp_path / "checkpoints").resolve("last").name == f"step_{outcome.update}"
    assert signal.getsignal(signal.SIGTERM) == before
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


def test_weights_of_another_run(tmp_path: Path) -> None:
    go(toy_config(), tmp_path / "first")
    config = toy_config(max_updates=1, init_from=str(tmp_path / "first"), schedule={"warmup_init_lr": 0.0})
    go(config, tmp_path / "second")
    first, second = final_tensors(tmp_path / "first", "best"), final_tensors(tmp_path / "second")
    drift = (first["model.embed.weight"] - second["model.embed.weight"]).abs().max()
    fresh = (ToyTask(config).build_model().embed.weight - second["model.embed.weight"]).abs().max()  # type: ignore[union-attr]
    assert drift < 0.005 < fresh
    with pytest.raises(CheckpointError, match="no such run or checkpoint"):
        go(toy_config(init_from=str(tmp_path / "nowhere")), tmp_path / "third")


def test_the_terminal_gets_a_bar(tmp_path: Path) -> None:
    screen = io.StringIO()
    go(toy_config(), tmp_path, console=Console(file=screen, force_terminal=True, width=120))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "12/12" in text and "words/s" in text
