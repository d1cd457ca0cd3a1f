"""A dense model written for CTranslate2 translates as here; the script that compares both searches runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.config import ModelConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from moe_train.models import build_model
from moe_train.models.encoder_decoder import TransformerModel
from moe_train.models.to_ctranslate2 import write_ctranslate2
from moe_train.routing import routing_config
from tests.evaluation.recurrent import dictionary

SIZES = ModelConfig(encoder_layers=1, decoder_layers=1, embed_dim=16, ffn_dim=32, num_heads=2, sparse_layers="all")


def model_of(routing: str) -> TransformerModel:
    words = dictionary(20)
    built = build_model(SIZES, routing_config({"name": routing}), words, words, seed=1)
    assert isinstance(built, TransformerModel)
    return built


def test_without_ctranslate2_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2.specs", None)
    with pytest.raises(ConfigError, match="pip install ctranslate2"):
        write_ctranslate2(model_of("dense"), [], [], tmp_path)


def test_a_sparse_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(ConfigError, match="routing=dense"):
        write_ctranslate2(model_of("switch"), [], [], tmp_path)


@pytest.mark.slow
def test_the_comparison_with_ctranslate2_runs(root: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    """The script checks that the hypotheses of both are equal."""
    pytest.importorskip("ctranslate2")
    report = tmp_path / "report.json"
    words = ["--batches", "4", "--rounds", "1", "--check", "20", "--longest", "12", "--threads", "1"]
    command = [sys.executable, "scripts/compare_ctranslate2.py", str(tiny_data.path), *words, "--out", str(report)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["hypotheses"]["same"] >= 5
    assert set(figures["speed"]["4"]) >= {"ours fp32", "CTranslate2 float32", "CTranslate2 int8"}
