"""``moe-train engine=deepspeed`` as a command: the same losses as ddp, and its run goes on under ddp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.data.folder import DataFolder
from tests.commands.test_train import here, run, words
from tests.training.toy_run import lines

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.warm_start

PLAIN = ["model.dropout=0", "training.max_updates=10"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    """Ten updates by two processes that divide optimizer, gradients and experts."""
    path = tmp_path_factory.mktemp("zero")
    engine = ["engine=deepspeed", "engine.zero_stage=2", "layout.expert_parallel=2", "launch.processes=2"]
    run(words(tiny_data, path / "run", *PLAIN, *engine), path)
    return path / "run"


def trained(folder: Path) -> list[dict[str, Any]]:
    """What the loop says of each interval."""
    return [{key: line[key] for key in ("update", "loss", "grad_norm", "balance_loss")} for line in lines(folder)]


@pytest.mark.processes
def test_losses_are_those_of_ddp(ours: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    code, said = here(words(tiny_data, tmp_path / "run", *PLAIN)[3:], tmp_path)
    assert code == 0, said
    for line, want in zip(trained(ours), trained(tmp_path / "run"), strict=True):
        assert line == pytest.approx(want, rel=1e-4)


@pytest.mark.processes
def test_it_goes_on_under_ddp(ours: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    code, said = here(words(tiny_data, ours, *PLAIN, "training.max_updates=15")[3:], tmp_path)
    assert code == 0, said
    assert [line["update"] for line in lines(ours)] == [5, 10, 15]
    assert lines(ours)[2]["loss"] < lines(ours)[1]["loss"]


@pytest.mark.slow
def test_one_process_has_a_group_of_its_own(tiny_data: DataFolder, tmp_path: Path) -> None:
    done = run(words(tiny_data, tmp_path / "run", *PLAIN, "engine=deepspeed"), tmp_path)
    assert "finished at update 10" in done.stdout and "WARNING" not in done.stdout


def test_zero_3_is_refused_before_anything_starts(tiny_data: DataFolder, tmp_path: Path) -> None:
    engine = ["engine=deepspeed", "engine.zero_stage=3"]
    code, said = here(words(tiny_data, tmp_path / "run", *engine)[3:], tmp_path)
    assert code == 2 and "zero_stage=2" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()
