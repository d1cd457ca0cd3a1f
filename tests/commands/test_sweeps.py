"""``moe-train -m`` in this process: a failure takes nothing with it, Optuna minimises, folders are one's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from moe_train.data.folder import DataFolder
from moe_train.errors import LaunchError
from moe_train.launch.submitit_launcher import SlurmJobs
from moe_train.training import RunFolder
from tests.commands.test_train import here
from tests.slurm.runs import keys, until

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]

SHORT = ("training.max_updates=2", "training.validation.every_updates=2")


def sweep_words(data: DataFolder, sweep: Path, *more: str) -> list[str]:
    """What comes last counts."""
    return ["-m", *keys(data, *SHORT), f"hydra.sweep.dir={sweep}", *more]


def statuses(sweep: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in sweep.glob("*/run.json")}


def test_a_job_that_fails_loses_no_other_and_is_run_again(tiny_data: DataFolder, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    blocked = sweep / "0" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    words = sweep_words(tiny_data, sweep, "seed=1,2")
    code, said = here(words, tmp_path)
    assert code == 1 and "Error executing job" in said and statuses(sweep) == {"1": "finished"}
    blocked.unlink()
    assert here([*words, "resume=missing"], tmp_path)[0] == 0
    assert statuses(sweep) == {"0": "finished", "1": "finished"}
    assert len(RunFolder(sweep / "1").info["sessions"]) == 1


def test_a_signal_saves_the_run_and_ends_the_sweep(tiny_data: DataFolder, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"

    def stop() -> None:
        until((sweep / "0" / "train.jsonl").is_file, "the first log line")
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    code, _ = here(sweep_words(tiny_data, sweep, "seed=1,2", "training.max_updates=100000"), tmp_path)
    stopping.join()
    assert code == 75 and statuses(sweep) == {"0": "interrupted"}


def test_optuna_looks_for_the_lowest_validation_loss(tiny_data: DataFolder, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    rate = "training.optimizer.lr=choice(0.00001,0.01)"
    words = [word for word in sweep_words(tiny_data, sweep, *optuna) if not word.startswith("training.optimizer")]
    code, said = here([*words, rate], tmp_path)
    assert code == 0, said
    losses = [json.loads(path.read_text())["best"] for path in sweep.glob("*/run.json")]
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert len(losses) == 3 and found["best_value"] == min(losses)


def test_a_run_is_scored_when_it_is_finished(tiny_data: DataFolder, tmp_path: Path) -> None:
    """Also where training was finished before, and by the same command; never twice."""
    folder = tmp_path / "run"
    words = [*keys(tiny_data, *SHORT), f"hydra.run.dir={folder}", "task.directions=[en-de]", "search.beam=1"]
    assert here(words, tmp_path)[0] == 0 and not (folder / "valid.json").exists()
    assert here([*words, "evaluate=valid"], tmp_path)[0] == 0
    scores = json.loads((folder / "valid.json").read_text())
    assert list(scores["directions"]) == ["en-de"] and len(RunFolder(folder).info["sessions"]) == 1
    code, said = here([*words, "evaluate=valid"], tmp_path)
    assert code == 2 and "is finished" in said


def test_two_starts_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_train.commands.train", "data=x", "--cfg", "hydra", "--resolve", "--package"]
    both = [
        subprocess.Popen([*command, f"hydra.{kind}"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for kind in ("run", "run", "sweep", "sweep")
    ]
    folders = [yaml.safe_load(process.communicate(timeout=200)[0])["dir"] for process in both]
    assert len(set(folders)) == 4, folders
    assert all(len(folder.rpartition("-")[2]) == len("123456") for folder in folders)


def test_two_starts_in_one_folder_never_share_it(tiny_data: DataFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*keys(tiny_data, *SHORT), f"hydra.run.dir={folder}"]
    with RunFolder(folder).claimed():
        code, said = here(words, tmp_path)
    assert code == 2 and "another process is training in this folder" in said
    assert here(words, tmp_path)[0] == 0


def test_a_finished_folder_is_refused_or_left_alone_by_an_explicit_key(tiny_data: DataFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*keys(tiny_data, *SHORT), f"hydra.run.dir={folder}"]
    assert here(words, tmp_path)[0] == 0
    code, said = here(words, tmp_path)
    assert code == 2 and "is finished (2 updates)" in said and "resume=missing" in said
    for key in ("missing", "must"):
        assert here([*words, f"resume={key}"], tmp_path) == (0, "")
    assert len(RunFolder(folder).info["sessions"]) == 1


def test_a_launcher_that_would_not_be_asked_is_refused(tiny_data: DataFolder, tmp_path: Path) -> None:
    code, said = here([*keys(tiny_data, *SHORT), "hydra/launcher=submitit_slurm"], tmp_path)
    assert code == 2 and "hydra/launcher=submitit_slurm: a launcher is only used in a sweep. Add -m" in said


def test_the_launcher_for_slurm_without_slurm(
    tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = here(sweep_words(tiny_data, tmp_path / "sweep", "seed=1,2", "hydra/launcher=submitit_slurm"), tmp_path)
    assert code == 2 and "there is no Slurm on this host (sbatch and srun not found on PATH)" in said
    assert "hydra/launcher=submitit_local" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()
    with pytest.raises(LaunchError, match="there is no Slurm on this host"):  # where a config file has chosen it
        SlurmJobs.launch(SlurmJobs.__new__(SlurmJobs), [], 0)


def test_slurm_that_does_not_take_the_jobs(
    tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "srun"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    code, said = here(sweep_words(tiny_data, tmp_path / "sweep", "seed=1,2", "hydra/launcher=submitit_slurm"), tmp_path)
    assert code == 2 and "Traceback" not in said
    assert "Slurm did not accept the jobs (sbatch: error: invalid partition specified: gpu)" in said
