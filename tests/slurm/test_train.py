"""Training on two nodes of a real Slurm: by sbatch and by submitit, preempted, out of time. Always the same bits."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder
from moe_train.training.checkpoint.store import CheckpointStore
from tests.slurm.cluster import Cluster
from tests.slurm.runs import (
    ROOT,
    ended,
    has_been_told,
    held_at_first_line,
    holders,
    keys,
    moe_train,
    sessions,
    show_cost,
    under_way,
    until,
    urgent_job,
)
from tests.training.toy_run import assert_same_bits, final_tensors, lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
TRAIN = str(ROOT / "scripts" / "slurm" / "train.sbatch")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    """A run of two processes on one host that nobody disturbs."""
    path = tmp_path_factory.mktemp("unbroken")
    ended(moe_train(*keys(tiny_data, f"hydra.run.dir={path}/run", "launch.processes=2"), cwd=path))
    return path / "run"


def check(folder: Path, unbroken: Path, said: str) -> None:
    """Finished in two sessions, nothing lost between them, and nothing to be seen of it in the end."""
    ((stopped, resumed),) = sessions(said)
    assert 2 <= stopped == resumed < 40
    assert_same_bits(final_tensors(folder), final_tensors(unbroken))
    for name in ("train.jsonl", "valid.jsonl"):
        assert lines(folder, name) == lines(unbroken, name) and lines(folder, name)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def submit(cluster: Cluster, data: DataFolder, folder: Path, *options: str, more: tuple[str, ...] = ()) -> str:
    """Two nodes, a rank on each, by the script that users take."""
    exported = f"--export=ALL,RUN={folder}"
    output = f"--output={folder.parent}/%j.out"
    return cluster.submit(
        exported, output, "--nodes=2", "--ntasks-per-node=1", *options, TRAIN, *keys(data, *more), cwd=ROOT
    )


@pytest.mark.processes
@pytest.mark.warm_start
def test_sbatch_on_two_nodes_preempted(cluster: Cluster, tiny_data: DataFolder, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(cluster, tiny_data, folder)
    with held_at_first_line(folder) as ranks:
        urgent = urgent_job(cluster)
        until(lambda: all(map(has_been_told, ranks)), "the signal at preemption")
    told = time.time()
    cluster.wait_for(urgent, "COMPLETED")
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["Restarts"] == "1"
    said = (tmp_path / f"{job}.out").read_text()
    assert "requeueing the job" in said
    check(folder, unbroken, said)
    show_cost(folder, told)
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


@pytest.mark.slow
def test_submitit_on_two_nodes_preempted(
    cluster: Cluster, tiny_data: DataFolder, unbroken: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
    words = keys(tiny_data, f"hydra.sweep.dir={sweep}", *launcher)
    with under_way("-m", *words, cwd=tmp_path) as command:
        with held_at_first_line(sweep / "0") as ranks:
            job, urgent = job_of(sweep), urgent_job(cluster)
            until(lambda: all(map(has_been_told, ranks)), "the signal at preemption")
        told = time.time()
        cluster.wait_for(urgent, "COMPLETED")
        assert cluster.wait_for(job, "COMPLETED", "FAILED")["Restarts"] == "1"
        assert "job 0: done" in ended(command)
    check(sweep / "0", unbroken, (sweep / ".submitit" / job / f"{job}_0_log.out").read_text())
    show_cost(sweep / "0", told)


def job_of(sweep: Path) -> str:
    """The number that submitit's folder is named after."""
    (folder,) = (path for path in (sweep / ".submitit").iterdir() if path.name.isdigit())
    return folder.name


@pytest.mark.processes
def test_a_cancelled_job_saves_and_stays_out_of_the_queue(
    cluster: Cluster, tiny_data: DataFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(cluster, tiny_data, folder, more=("training.max_updates=100000",))
    until((folder / "train.jsonl").is_file, "the first log line")
    cluster.run("scancel", job)
    shown = cluster.wait_for(job, "CANCELLED")
    until(lambda: not holders(folder / ".lock"), "the end of the ranks")
    assert shown["Restarts"] == "0"
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "interrupted"
    assert CheckpointStore(folder / "checkpoints").resolve("last").name == f"step_{info['update']}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_torchrun_on_two_nodes_preempted(
    cluster: Cluster, tiny_data: DataFolder, unbroken: Path, tmp_path: Path
) -> None:
    """The same with an agent of torchrun on each node between Slurm and the rank; under a minute on a free machine."""
    folder = tmp_path / "run"
    options = [f"--export=ALL,RUN={folder},LAUNCHER=torchrun", f"--output={tmp_path}/%j.out", "--nodes=2"]
    job = cluster.submit(*options, TRAIN, *keys(tiny_data), cwd=ROOT)
    with held_at_first_line(folder) as ranks:
        urgent = urgent_job(cluster)
        until(lambda: all(map(has_been_told, ranks)), "the signal at preemption")
    cluster.wait_for(urgent, "COMPLETED")
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["Restarts"] == "1"
    check(folder, unbroken, (tmp_path / f"{job}.out").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_nodes_out_of_time(cluster: Cluster, tiny_data: DataFolder, unbroken: Path, tmp_path: Path) -> None:
    """By sbatch and by submitit, side by side; most of three minutes are Slurm's shortest limits passing."""
    folder, sweep = tmp_path / "run", tmp_path / "sweep"
    by_sbatch = submit(cluster, tiny_data, folder, "--time=3", "--signal=B:USR1@60")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=3"]
    words = keys(tiny_data, f"hydra.sweep.dir={sweep}", *launcher, "hydra.launcher.signal_delay_s=60")
    output = tmp_path / f"{by_sbatch}.out"
    with under_way("-m", *words, cwd=tmp_path) as command:
        with held_at_first_line(folder) as ranks, held_at_first_line(sweep / "0") as others:
            by_submitit = job_of(sweep)
            until(lambda: all(map(has_been_told, [*ranks, *others])), "the signals before the limit")
        for job in (by_sbatch, by_submitit):
            assert cluster.wait_for(job, "COMPLETED", "FAILED", timeout=900)["Restarts"] == "1"
        ended(command)
    check(folder, unbroken, output.read_text())
    said = (sweep / ".submitit" / by_submitit / f"{by_submitit}_0_log.out").read_text()
    check(sweep / "0", unbroken, said)
    assert "this job is timed-out" in (sweep / ".submitit" / by_submitit / f"{by_submitit}_0_log.err").read_text()
