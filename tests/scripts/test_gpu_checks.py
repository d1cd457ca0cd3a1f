"""The checks for a GPU, rehearsed on a CPU: the exchange forced in a world of one over gloo."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    return importlib.import_module("gpu_checks")


@pytest.mark.processes
def test_rehearsal_holds_all_that_a_cpu_can_show(root: Path, tmp_path: Path) -> None:
    """In a process that cannot import fairseq: torch and this package are all it needs."""
    hidden = "import sys, runpy; sys.modules['fairseq'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        hidden,
        str(root / "scripts" / "gpu_checks.py"),
        "--rehearse",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "checks.json").read_text())
    assert {check["subject"] for check in written["checks"]} == {"exchange", "grouped products", "speed"}
    bounded = [check for check in written["checks"] if check["bound"] is not None]
    assert len(bounded) == 6 * 2 * 3 + 4 and all(check["holds"] for check in bounded)
    assert any(check["value"] > 0 for check in bounded), "bf16 rounds"
    assert "| top_k, shared expert, overlap, fp32: error |" in (tmp_path / "checks.md").read_text()


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "gpu_checks.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "torch finds no GPU here" in done.stderr and not (tmp_path / "out").exists()


def test_syncs_are_counted_in_what_torch_says(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        for _ in range(3):  # the same place, which warnings would tell once
            warnings.warn(f"{script.SYNC} (Triggered internally at …)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert script.count_syncs(run) == 3 and modes == ["warn", "default"]


def test_what_is_beyond_its_bound_does_not_hold(script: Any) -> None:
    told, within, beyond = (script.Check("a", n, 2.0, bound) for n, bound in (("t", None), ("w", 2.0), ("b", 1.0)))
    assert told.holds and within.holds and not beyond.holds
    lines = list(script.table([told, within, beyond]))
    assert lines[-3:] == ["| t | 2 |  |  |", "| w | 2 | 2 | yes |", "| b | 2 | 1 | **no** |"]


def test_a_wrong_exchange_would_be_seen(script: Any) -> None:
    one = {"y": torch.ones(3), "x": torch.ones(2)}
    other = {"y": torch.ones(3), "x": torch.tensor([1.0, 1.1])}
    assert script.distance(one, one) == 0.0 and script.distance(other, one) == pytest.approx(0.1 / 2**0.5, rel=1e-3)
