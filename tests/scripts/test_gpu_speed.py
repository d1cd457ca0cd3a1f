"""The measurements of a GPU's speed, in small on a CPU: every line runs, and results are kept between calls."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    return importlib.import_module("gpu_speed")


@pytest.mark.processes
def test_every_line_runs_in_small_on_a_cpu(root: Path, tmp_path: Path, script: Any) -> None:
    pytest.importorskip("triton")
    out, known = tmp_path / "out", tmp_path / "known.json"
    known.write_text(json.dumps({"lines": {"strategy xmoe": {"words_per_second": 1.0}}}))
    command = [sys.executable, str(root / "scripts" / "gpu_speed.py"), "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--out", str(out), "--known", str(known)], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads((out / "speed.json").read_text())["lines"]
    assert set(lines) == set(script.LINES) and not {name: r["error"] for name, r in lines.items() if "error" in r}
    assert lines["strategy xmoe"] == {"words_per_second": 1.0}, "measured by an earlier call"
    assert all(lines[f"kernel {name}"]["holds"] for name in script.KERNELS)
    assert set(lines["layer k=1"]) >= {"torch, exchange", "triton, no exchange", "dense"}
    assert "| train base dense | words_per_second |" in (out / "speed.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["speed.json", "speed.md"], "a CPU says nothing of a GPU"


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, minutes=1.0, small=True, device="cpu", data=tmp_path)


def test_a_line_that_fails_is_recorded_and_tried_again_at_last(
    script: Any, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(_: Any) -> dict[str, Any]:
        calls.append("fails")
        raise RuntimeError("no memory")

    monkeypatch.setattr(script, "LINES", {"fails": fails, "runs": lambda _: {"tflops": 2.0}})
    known: dict[str, Any] = {}
    script.run_lines(known, options, None)
    assert "no memory" in known["fails"]["error"] and known["runs"]["tflops"] == 2.0
    assert "| fails | **failed** | |" in (options.out / "speed.md").read_text()
    script.run_lines(known, options, None)
    assert calls == ["fails", "fails"]


def test_no_line_is_begun_without_time(script: Any, options: argparse.Namespace) -> None:
    options.minutes = 0.0
    script.run_lines({}, options, None)
    assert json.loads((options.out / "speed.json").read_text())["lines"] == {}


@pytest.mark.processes
def test_a_line_has_a_process_and_a_time_limit(script: Any, options: argparse.Namespace) -> None:
    assert script.in_process("layer k=1", options, 0.01) == {"error": "took longer than 0 s"}
    monkey = argparse.Namespace(**{**vars(options), "data": "/nonexistent"})
    assert "--line" in script.in_process("no such line", monkey, 60.0)["error"]


def test_the_table_of_kernels_is_what_auto_reads(
    script: Any, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_train.kernels.device_kernels import faster_on

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = {f"kernel {name}": {"holds": True, "speedup": 0.5 + (name == "order")} for name in script.KERNELS}
    script.write(options.out, found)
    assert faster_on((9, 0), options.out / "kernels.json") == ["order"]
