"""The key ``training.packed``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.config import ModelConfig, RunConfig, TrainingConfig
from moe_train.errors import ConfigError
from moe_train.training import packed_rows
from moe_train.training.packed_rows import check_packed, packed_attention
from tests.kernels.by_sentence import BY_SENTENCE

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(packed: Any, attention_dropout: float = 0.0, precision: Any = "bf16") -> RunConfig:
    model = ModelConfig(attention_dropout=attention_dropout)
    return RunConfig("data", model=model, training=TrainingConfig(packed=packed, precision=precision))


def test_auto_packs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "torch_varlen", lambda device, _: BY_SENTENCE if device == GPU else None)
    for packed in ("auto", True):
        assert packed_attention(config(packed), GPU) is BY_SENTENCE
    assert packed_attention(config(False), GPU) is None
    assert packed_attention(config("auto", attention_dropout=0.1), GPU) is None
    assert packed_attention(config("auto", precision="fp32"), GPU) is None
    assert packed_attention(config("auto"), CPU) is None
    monkeypatch.setattr(packed_rows, "torch_varlen", lambda *_: None)
    assert packed_attention(config("auto"), GPU) is None


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [({"attention_dropout": 0.1}, "attention_dropout"), ({"precision": "fp32"}, "precision"), ({}, "on CPUs")],
)
def test_true_says_what_is_in_the_way(changes: dict[str, Any], obstacle: str) -> None:
    with pytest.raises(ConfigError, match=obstacle) as raised:
        packed_attention(config(True, **changes), CPU)
    assert "training.packed=auto" in str(raised.value.remedy)


def test_keys_are_checked_before_processes_start() -> None:
    check_packed(config(True))
    check_packed(config("auto", attention_dropout=0.1))
    for changes in ({"attention_dropout": 0.1}, {"precision": "fp32"}):
        with pytest.raises(ConfigError, match="impossible"):
            check_packed(config(True, **changes))


def test_a_torch_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "torch_varlen", lambda *_: None)
    with pytest.raises(ConfigError, match="GPU with heads of 64"):
        packed_attention(config(True), GPU)
