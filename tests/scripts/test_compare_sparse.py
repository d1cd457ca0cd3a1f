"""The script that compares sparse models with a dense one runs, and its median is weighted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder


@pytest.mark.processes
def test_the_comparison_runs(root: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    sizes = ["--tokens", "200", "--updates", "2", "--warm-up", "1", "--threads", "1", "--clock", "cpu"]
    command = [sys.executable, "scripts/compare_sparse.py", str(tiny_data.path), *sizes, "--out", str(report)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sides = json.loads(report.read_text(encoding="utf-8"))["sides"]
    assert list(sides) == ["dense", "switch", "top_2", "sam"]
    assert sides["dense"]["over_dense"] == 1.0 and all(side["words_per_second"] > 0 for side in sides.values())
    assert sides["switch"]["parameters"] > sides["top_2"]["parameters"] > sides["dense"]["parameters"]


def test_the_median_is_weighted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    median = importlib.import_module("compare_sparse").weighted_median
    assert median([3.0, 1.0, 2.0], [1, 1, 1]) == 2.0
    assert median([3.0, 1.0, 2.0], [5, 1, 1]) == 3.0
