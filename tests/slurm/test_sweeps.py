"""Sweeps: as one array on a real Slurm, and as processes of this host; what fails, and what ``resume=missing`` does."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.analysis.report.build_report import make_report
from moe_train.analysis.report.load_runs import RunReport
from moe_train.config.evaluation import ReportConfig
from moe_train.data.folder import DataFolder
from moe_train.training.run.run_folder import RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, ended, holders, keys, moe_train, under_way, until

SHORT = ("training.max_updates=4", "training.validation.every_updates=4")


def leaderboard(sweep: Path) -> tuple[list[RunReport], str]:
    """The runs, and the Markdown."""
    runs = make_report(ReportConfig((str(sweep),), html=False, samples=0), Console(quiet=True))
    return runs, (sweep / "leaderboard.md").read_text()


def sessions(run: Path) -> int:
    """How often a run was begun or gone on with."""
    return len(RunFolder(run).info["sessions"])


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_three_strategies_as_one_array(cluster: Cluster, tiny_data: DataFolder, tmp_path: Path) -> None:
    sweep, names = tmp_path / "sweep", ["dense", "switch", "thor"]
    words = keys(tiny_data, *SHORT, f"hydra.sweep.dir={sweep}", "hydra/launcher=submitit_slurm")
    words = [*(word for word in words if not word.startswith("routing.")), f"routing={','.join(names)}"]
    said = ended(moe_train("-m", *words, cwd=tmp_path))
    assert "3 of 3 jobs to slurm" in said and "job 1 (routing=switch): done" in said
    jobs = {path.name for path in (sweep / ".submitit").iterdir() if path.is_dir()}
    (array,) = {name.partition("_")[0] for name in jobs}
    assert jobs == {array, *(f"{array}_{task}" for task in range(3))}
    runs, markdown = leaderboard(sweep)
    assert [(run.strategy, run.status, run.update) for run in runs] == [(name, "finished", 4) for name in names]
    assert all(f"| {name} | finished | 4 |" in markdown for name in names)

    shutil.rmtree(sweep / "1")
    again = ended(moe_train("-m", *words, "resume=missing", cwd=tmp_path))
    assert "1 of 3 jobs to slurm" in again and "job 1 (routing=switch): done" in again
    assert RunFolder(sweep / "1").finished and [sessions(sweep / name) for name in "012"] == [1, 1, 1]


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_an_array_of_sbatch(cluster: Cluster, tiny_data: DataFolder, tmp_path: Path) -> None:
    """A line of a file is a run; a line that cannot be is named in the leaderboard and takes no other with it."""
    file, sweep = tmp_path / "sweep.txt", tmp_path / "sweep"
    file.write_text("seed=1\nseed=2 training.clip_norm=-1\n")
    script = str(ROOT / "scripts" / "slurm" / "sweep.sbatch")
    options = ["--array=1-2", f"--export=ALL,SWEEP={sweep}", f"--output={tmp_path}/%a.out"]
    scored = ["evaluate=test", "search.beam=1", "task.directions=[en-de]"]
    job = cluster.submit(*options, script, str(file), *keys(tiny_data, *SHORT, *scored), cwd=ROOT)
    cluster.wait_for(f"{job}_1", "COMPLETED", "FAILED")
    cluster.wait_for(f"{job}_2", "COMPLETED", "FAILED")
    runs, markdown = leaderboard(sweep)
    assert [(run.name, run.status) for run in runs] == [("1", "finished"), ("2", "failed")], markdown
    assert runs[0].results is not None and "average" in markdown
    assert "'training.clip_norm' must not be negative" in runs[1].cause


def planted(data: DataFolder, sweep: Path, seeds: int, at_a_time: int) -> list[str]:
    """A sweep over seeds on this host, whose first job will find a file where its checkpoints should go."""
    blocked = sweep / "0" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    launcher = ["hydra/launcher=submitit_local", f"hydra.launcher.array_parallelism={at_a_time}"]
    return keys(data, *SHORT, f"hydra.sweep.dir={sweep}", *launcher, f"seed={','.join(map(str, range(seeds)))}")


@pytest.mark.slow  # a minute and a half on two cores; the array above has the fast suite's resume=missing
@pytest.mark.timeout(900)
def test_jobs_of_this_host_that_fail_and_die(tiny_data: DataFolder, tmp_path: Path) -> None:
    """One job fails, one is killed outright: the third goes on, both causes are named, and only these two run again."""
    sweep = tmp_path / "sweep"
    words = planted(tiny_data, sweep, seeds=3, at_a_time=2)
    with under_way("-m", *words, cwd=tmp_path) as command:
        until(lambda: holders(sweep / "1" / ".lock"), "the second job's begin")
        os.kill(holders(sweep / "1" / ".lock")[0], signal.SIGKILL)
        said = ended(command, code=1)
    assert "2 of 3 jobs failed (0, 1)" in said and "job 2 (seed=2): done" in said
    runs, markdown = leaderboard(sweep)
    assert [(run.name, run.status) for run in runs] == [("0", "failed"), ("1", "failed"), ("2", "finished")]
    assert str(sweep / "0" / "checkpoints") in runs[0].cause and "ended without a result" in runs[1].cause
    assert all(f"{run.name} failed at update {run.update}: " in markdown for run in runs[:2])

    (sweep / "0" / "checkpoints").unlink()
    said = ended(moe_train("-m", *words, "resume=missing", cwd=tmp_path))
    assert "2 of 3 jobs to local" in said
    runs, _ = leaderboard(sweep)
    assert [run.status for run in runs] == ["finished"] * 3 and sessions(sweep / "2") == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eleven_jobs_of_this_host_one_of_them_planted_to_fail(tiny_data: DataFolder, tmp_path: Path) -> None:
    """About two minutes on two cores."""
    sweep = tmp_path / "sweep"
    words = planted(tiny_data, sweep, seeds=11, at_a_time=2)
    said = ended(moe_train("-m", *words, cwd=tmp_path), code=1, timeout=1500)
    assert "1 of 11 jobs failed (0)" in said
    runs, markdown = leaderboard(sweep)
    assert [run.status for run in runs] == ["failed", *["finished"] * 10]
    assert markdown.count("| finished | 4 |") == 10 and "0 failed at update 0" in markdown
    (sweep / "0" / "checkpoints").unlink()
    assert "1 of 11 jobs to local" in ended(moe_train("-m", *words, "resume=missing", cwd=tmp_path))
    runs, markdown = leaderboard(sweep)
    assert {run.status for run in runs} == {"finished"} and [sessions(run.path) for run in runs] == [1] * 11
    assert "failed" not in markdown
