"""``scripts/quickstart.sh`` with a model of a few numbers: what a second run does again, and what it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    "model.embed_dim=32",
    "model.ffn_dim=32",
    "model.encoder_layers=2",
    "model.decoder_layers=2",
    "model.num_heads=2",
)


def stages(printed: str) -> list[str]:
    """The names of what was done, in order."""
    return re.findall(r"^== (\w+): ", printed, flags=re.MULTILINE)


@pytest.mark.processes
def test_the_folder_may_be_named_in_either_way(root: Path, tmp_path: Path) -> None:
    """It alone tells whether a run is to go on; the commands only say here what they were called with."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(root / "scripts" / "quickstart.sh", tmp_path / "scripts")
    for name in (
        "scripts/setup.sh",
        *(f".venv/bin/moe-{command}" for command in ("prepare", "train", "evaluate", "report")),
    ):
        script = tmp_path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text('#!/bin/sh\necho "called: $*"\n', encoding="ascii")
        script.chmod(0o755)
    old = tmp_path / "outputs" / "quickstart" / "config.json"
    old.parent.mkdir(parents=True)
    old.touch()

    def called(*words: str, **named: str) -> str:
        script = [str(tmp_path / "scripts" / "quickstart.sh"), *words]
        return subprocess.run(script, env={**os.environ, **named}, capture_output=True, text=True, check=True).stdout

    assert "resume=must hydra.run.dir=outputs/quickstart" in called()
    for said in (called("routing=thor", "hydra.run.dir=outputs/a b"), called("routing=thor", RUN="outputs/a b")):
        assert "resume=auto hydra.run.dir=outputs/a b" in said and "called: run=outputs/a b split=test" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_finished_is_not_done_again(root: Path, tmp_path: Path) -> None:
    """All commands are real, the installation is this one. Three minutes of two cores, and 90 MB once."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(root / "scripts" / "quickstart.sh", tmp_path / "scripts")
    setup = tmp_path / "scripts" / "setup.sh"
    setup.write_text("#!/bin/sh\nexit 0\n", encoding="ascii")
    setup.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)

    def quickstart(updates: int) -> str:
        words = [str(tmp_path / "scripts" / "quickstart.sh"), *SMALL, f"training.max_updates={updates}"]
        named = {**os.environ, "RUN": "outputs/mine", "DATA": "made/data"}
        done = subprocess.run(words, env=named, capture_output=True, text=True, check=False, timeout=1000)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    first = quickstart(4)
    assert stages(first) == ["install", "prepare", "train", "evaluate", "report"] and "shuffled" in first
    assert first.count("\n  translation  ") == 6 and (tmp_path / "outputs" / "mine" / "report.html").is_file()
    assert (tmp_path / "made" / "data" / "manifest.json").is_file()
    scores = (tmp_path / "outputs" / "mine" / "test.json").read_bytes()
    again = quickstart(4)
    assert stages(again) == ["install", "prepare", "train", "scores"]
    assert "nothing to do, the run is finished" in again and "average" in again and "into English" in again
    assert (tmp_path / "outputs" / "mine" / "test.json").read_bytes() == scores
    assert stages(quickstart(6))[-2:] == ["evaluate", "report"], "more updates, other scores"
