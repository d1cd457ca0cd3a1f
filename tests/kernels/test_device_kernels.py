"""Which kernels are used where, and why some cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_train.kernels import device_kernels
from moe_train.kernels.device_kernels import NAMES, TORCH, DeviceKernels, faster_on, select_kernels, unavailable

CPU = torch.device("cpu")


def test_torch_is_the_default_and_what_auto_means_on_a_cpu() -> None:
    assert TORCH == select_kernels("torch", CPU) == select_kernels("auto", CPU) == DeviceKernels(frozenset())
    assert not any(TORCH.uses(name, torch.zeros(1)) for name in NAMES)
    assert select_kernels("triton", CPU).names == frozenset(NAMES)


def test_auto_takes_what_was_measured_to_hold_and_to_be_faster(tmp_path: Path) -> None:
    rows = {
        "top_k": {"holds": True, "speedup": 1.2},
        "gather": {"holds": False, "speedup": 3.0},
        "combine": {"holds": True, "speedup": 0.9},
        "of a later version": {"holds": True, "speedup": 9.0},
    }
    (tmp_path / "measured.json").write_text(json.dumps({"9.0": {"kernels": rows}}))
    assert faster_on((9, 0), tmp_path / "measured.json") == ["top_k"]
    assert faster_on((8, 0), tmp_path / "measured.json") == []


def test_the_package_has_the_committed_results(root: Path) -> None:
    """They may be empty: then ``auto`` is torch."""
    results = root / "results" / "gpu" / "kernels.json"
    committed = json.loads(results.read_text()) if results.exists() else {}
    assert json.loads(device_kernels._MEASURED.read_text()) == committed


def test_types_without_a_kernel_and_compilers_see_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    every = DeviceKernels(frozenset(NAMES))
    assert every.uses("combine", torch.zeros(1)) and every.uses_top_k(torch.zeros(2, 4))
    assert not every.uses("combine", torch.zeros(1, dtype=torch.float64))
    assert not every.uses_top_k(torch.zeros(2, 4, dtype=torch.float64)) and not every.uses_top_k(torch.zeros(1, 5000))
    assert not every.uses("combine", torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not every.uses("combine", torch.zeros(1))


def test_what_triton_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable(gpus=0) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no GPU" in (unavailable(gpus=0) or "") and unavailable(gpus=1) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert unavailable(gpus=1) == "triton is not installed"
