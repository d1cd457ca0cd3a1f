"""The script that compares our model with stock fairseq runs, and both models compute what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder


@pytest.mark.slow
def test_the_comparison_with_fairseq_runs(root: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    shape = ["--dim", "32", "--ffn-dim", "64", "--heads", "2", "--tokens", "500", "--threads", "1"]
    command = [
        sys.executable,
        "scripts/compare_fairseq.py",
        str(tiny_data.path),
        *shape,
        "--directions",
        "en-de",
        "de-en",
    ]
    command += ["--updates", "60", "--sentences", "10", "--bf16-updates", "2", "--out", str(report)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text(encoding="utf-8"))
    losses = figures["valid_nll"]
    assert losses["ours"] == pytest.approx(losses["stock fairseq"], rel=0.05)
    assert figures["same_translations"] > 0.9  # the two differ in how long a hopeless hypothesis may get
    assert figures["bleu"]["ours"] == pytest.approx(figures["bleu"]["stock fairseq"], abs=0.5)
