"""Runs that have ended and are given more updates: what their learning rate does, and what is said of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from moe_train.config import RunConfig
from moe_train.errors import ConfigError
from moe_train.training import RunFolder, train
from moe_train.training.optim.schedule_extension import run_ends
from moe_train.training.run.session_notes import session_notes
from tests.training.toy import ToyTask, toy_config

PEAK = 0.02


def config(max_updates: int, extend: str | None = None, **schedule: Any) -> RunConfig:
    keys = {"name": "linear", "warmup_updates": 2, "extend": extend, **schedule}
    plain = {"accumulation": 1, "log_every": 1, "optimizer": {"lr": PEAK}, "validation": {"every_updates": 100}}
    return toy_config(max_updates=max_updates, schedule=keys, **plain)


def session(folder: RunFolder, given: RunConfig, stop_after: int = 0) -> list[str]:
    """What moe-train does in a folder; gives the notes that it prints before. Ends by a signal after an update."""
    folder.check(given)
    notes = session_notes(folder, given)
    folder.begin(given)
    task = Stopped(given, stop_after) if stop_after else ToyTask(given)
    train(given, task, folder)  # type: ignore[arg-type]
    return notes


class Stopped(ToyTask):
    def __init__(self, given: RunConfig, after: int) -> None:
        super().__init__(given)
        self.left = after

    def build_criterion(self) -> Any:
        criterion = super().build_criterion()
        criterion.register_forward_hook(self._count)
        return criterion

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


def rates(folder: RunFolder) -> dict[int, float]:
    lines = [json.loads(line) for line in folder.train_log.read_text().splitlines()]
    return {line["update"]: line["lr"] for line in lines}


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    assert session(folder, config(8)) == []
    assert rates(folder)[8] == 0.0
    return folder


def test_a_jump_of_the_rate_is_said_before_it_comes(finished: RunFolder) -> None:
    (note,) = session(finished, config(16))
    assert "learning rate of update 9 is 0.01 where the config of the session before gives 0:" in note
    assert "8 then and 16 now. training.schedule.extend=hold keeps" in note
    assert rates(finished)[9] == pytest.approx(PEAK / 2)


@pytest.mark.parametrize(("extend", "further"), [("hold", [0.0] * 4), ("restart", [0.01, 0.02, 0.01, 0.0])])
def test_the_rate_is_held_or_begins_anew(finished: RunFolder, extend: str, further: list[float]) -> None:
    assert session(finished, config(12, extend)) == []
    found = rates(finished)
    assert [found[update] for update in range(9, 13)] == pytest.approx(further, abs=1e-7)


def test_a_session_that_goes_on_knows_where_the_run_had_ended(finished: RunFolder, tmp_path: Path) -> None:
    """Interrupted amid its extension it ends with the rates, and logs, of one that was not."""
    session(finished, config(14, "restart"), stop_after=2)
    assert finished.info["status"] == "interrupted"
    assert session(finished, config(14, "restart")) == []
    other = RunFolder(tmp_path / "other")
    session(other, config(8))
    session(other, config(14, "restart"))
    assert rates(finished) == rates(other) and len(rates(other)) == 14
    losses = [[json.loads(x)["loss"] for x in f.train_log.read_text().splitlines()] for f in (finished, other)]
    assert losses[0] == losses[1]
    assert run_ends(finished.info) == run_ends(other.info)


def test_who_reads_the_note_can_still_choose(finished: RunFolder) -> None:
    """Interrupted after an update at the wrong rate, the run goes on with the key set."""
    assert session(finished, config(14), stop_after=1)
    session(finished, config(14, "hold"))
    found = rates(finished)
    assert found[9] > 0 and [found[update] for update in range(10, 15)] == [0.0] * 5


def test_other_updates_of_an_unfinished_run_are_said_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    session(folder, config(8), stop_after=4)
    (note,) = session(folder, config(16), stop_after=1)
    assert "learning rate of update 5" in note and "extend" not in note
    constant = RunFolder(tmp_path / "constant")
    session(constant, config(8, name="constant"))
    assert session(constant, config(10, name="constant")) == [], "it does not end with the run"


def test_a_run_that_an_earlier_version_finished(finished: RunFolder) -> None:
    """Its config names no ``extend``."""
    path = finished.path / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["training"]["schedule"]["extend"]
    path.write_text(json.dumps(content))
    assert session(finished, config(12, "hold")) == []
    assert rates(finished)[12] == 0.0


def test_a_record_that_cannot_be(finished: RunFolder) -> None:
    for wrong in (5, [5], [{"update": "x", "max_updates": 8, "extend": None}], [{"update": 8}]):
        finished.describe(schedule_ends=wrong)
        with pytest.raises(ConfigError, match=r"run\.json: 'schedule_ends' cannot be read"):
            session_notes(finished, config(12))


def test_an_l2_decay_is_called_what_it_is(tmp_path: Path) -> None:
    for name, said in (("adam", True), ("sgd", True), ("adamw", False)):
        given = toy_config(optimizer={"name": name, "weight_decay": 0.1})
        notes = session_notes(RunFolder(tmp_path / "none"), given)
        assert any(f"optimizer.name={name} adds weight_decay to the gradient (L2)" in note for note in notes) == said
    assert session_notes(RunFolder(tmp_path / "none"), toy_config()) == []
