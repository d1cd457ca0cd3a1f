"""Checks before any process is started."""

from __future__ import annotations

import pytest
import torch

from moe_train.config import LaunchConfig
from moe_train.errors import ConfigError
from moe_train.training.preflight import _gpus, check_kernels


def test_triton_without_what_it_needs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for mode in ("auto", "torch"):
        check_kernels(mode, gpus=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kernels=triton cannot run here: there is no GPU"):
        check_kernels("triton", gpus=0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_kernels("triton", gpus=0)


@pytest.mark.parametrize(
    ("device", "processes", "gpus"), [("auto", 2, 2), ("auto", 3, 0), ("cuda", 1, 2), ("cpu", 1, 0)]
)
def test_gpus_of_a_run(device: str, processes: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _gpus(LaunchConfig(processes=processes, device=device)) == gpus  # type: ignore[arg-type]
