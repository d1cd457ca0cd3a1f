"""submitit's local executor: a job that is told to make room saves, is started again, and ends in the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder
from tests.slurm.runs import (
    ended,
    has_been_told,
    held_at_first_line,
    holders,
    keys,
    moe_train,
    sessions,
    under_way,
    until,
)
from tests.training.toy_run import assert_same_bits, final_tensors, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("ranks", ["launch.processes=2", "hydra.launcher.tasks_per_node=2"])
def test_a_job_that_makes_room(ranks: str, tiny_data: DataFolder, tmp_path: Path) -> None:
    """About a minute on two cores. The signal goes to the process that submitit knows, which need not be a rank."""
    ended(moe_train(*keys(tiny_data, f"hydra.run.dir={tmp_path}/unbroken", "launch.processes=2"), cwd=tmp_path))
    sweep = tmp_path / "sweep"
    launcher = [f"hydra.sweep.dir={sweep}", "hydra/launcher=submitit_local", ranks]
    with under_way("-m", *keys(tiny_data, *launcher), cwd=tmp_path) as command:
        with held_at_first_line(sweep / "0") as held:
            for process in holders(sweep / "0" / ".lock"):
                os.kill(process, signal.SIGUSR2)
            until(lambda: any(map(has_been_told, held)), "the signal")
        assert "job 0: done" in ended(command)
    (said,) = (sweep / ".submitit").glob("*/*_0_log.out")
    ((stopped, resumed),) = sessions(said.read_text())
    assert 2 <= stopped == resumed < 40
    assert_same_bits(final_tensors(sweep / "0"), final_tensors(tmp_path / "unbroken"))
    assert lines(sweep / "0") == lines(tmp_path / "unbroken")
