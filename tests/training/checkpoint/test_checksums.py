"""Text files are written as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.training.checkpoint.checksums import replace_text


def test_two_writers_at_once_give_one_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first waits for the disk."""
    path, sync, others = tmp_path / "leaderboard.csv", os.fsync, iter(["the second text"])

    def slow(descriptor: int) -> None:
        for text in others:
            replace_text(path, text)
            assert path.read_text() == text
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    replace_text(path, "the first")
    assert path.read_text() == "the first" and os.listdir(tmp_path) == [path.name]


def test_a_neighbour_is_not_written_to_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbour = tmp_path / ".run.json.partial"
    neighbour.write_text("mine")
    replace_text(tmp_path / "run.json", "{}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    assert neighbour.read_text() == "mine" and sorted(os.listdir(tmp_path)) == [neighbour.name, "folder", "run.json"]
