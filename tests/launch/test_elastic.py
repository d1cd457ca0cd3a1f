"""One run folder for all lives of a job under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.folder import DataFolder
from moe_train.launch.elastic import NOTES, folder_overrides, note_folder, restarted

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_restarts.py"
WORDS = ["data=x", "routing=sam"]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torchrun tells its workers, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOE_TRAIN_JOB", raising=False)
    for name, value in {"RUN_ID": "job 7/a", "MAX_RESTARTS": "3", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    return monkeypatch


def test_the_next_life_goes_on_in_the_same_folder(agent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder_overrides(WORDS) == [] and not restarted()
    note_folder(WORDS, tmp_path / "it's here")
    agent.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted() and folder_overrides(WORDS) == [f"hydra.run.dir='{tmp_path}/it\\'s here'"]
    assert folder_overrides([*WORDS, "seed=2"]) == []  # another job of the same name
    assert [path.name for path in NOTES.iterdir()] == ["job_7_a.json"]


def test_another_set_of_hosts_is_not_counted_as_a_restart(agent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun's count stays where it is when hosts join or leave; a finished run is not gone on with then."""
    note_folder(WORDS, tmp_path)
    assert folder_overrides(WORDS) == [f"hydra.run.dir='{tmp_path}'"]
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"}))
    assert folder_overrides(WORDS) == []
    agent.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert folder_overrides(WORDS) == [f"hydra.run.dir='{tmp_path}'"]


def test_no_note_where_none_is_needed(agent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fixed = [*WORDS, "hydra.run.dir=outputs/mine"]
    note_folder(fixed, tmp_path)
    agent.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    note_folder(WORDS, tmp_path)
    assert not NOTES.exists() and folder_overrides(WORDS) == []


@pytest.mark.processes
def test_without_an_id_the_agent_tells_jobs_apart(agent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent.setenv("TORCHELASTIC_RUN_ID", "none")
    note_folder(WORDS, tmp_path)
    assert folder_overrides(WORDS) == [f"hydra.run.dir='{tmp_path}'"]
    program = f"from moe_train.launch.elastic import folder_overrides; print(folder_overrides({WORDS}))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout == "[]\n"  # its parent is this process, not ours


def report(what: str, data: DataFolder) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), what, "--data", str(data.path), "--updates", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert all(0 <= loss["updates_done_twice"] <= found["checkpoints_every"] + 2 for loss in found["losses"])
    assert all(loss["went_on_from"] % found["checkpoints_every"] == 0 for loss in found["losses"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_killed_at_three_random_updates(tiny_data: DataFolder) -> None:
    """Elastic restarts in one folder end in the bits of a run that nothing happened to. A minute on two quiet cores."""
    found = report("worker", tiny_data)
    assert len(found["losses"]) == 3 and found["sessions"] == 4
    assert found["same_bits"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_two_hosts_is_lost(tiny_data: DataFolder) -> None:
    """The one that is left finishes alone. A minute on two quiet cores."""
    found = report("host", tiny_data)
    assert found["worlds"] == [2, 1]
    assert found["relative_difference"] < 1e-6
