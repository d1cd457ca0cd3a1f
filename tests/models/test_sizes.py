"""The model configs that are shipped: each builds, and has the size that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from moe_train.config import ModelConfig, build
from moe_train.models import build_model
from moe_train.models.accounting import account
from moe_train.routing import routing_config
from tests.models.helpers import Words

# fairseq's figures for the same shapes, less its key biases and with 32,000 shared words, in millions.
SIZES = {"tiny": None, "iwslt": 47.9, "base": 60.5, "big": 209.1}


def read(root: Path, name: str) -> ModelConfig:
    keys = OmegaConf.to_container(OmegaConf.load(root / "configs" / "model" / f"{name}.yaml"))
    assert isinstance(keys, dict)
    return build(ModelConfig, keys, "model")  # type: ignore[arg-type]


def test_every_size_is_known_here(root: Path) -> None:
    named = {path.stem: OmegaConf.load(path)["name"] for path in (root / "configs" / "model").glob("*.yaml")}
    assert {stem for stem, name in named.items() if name == "transformer"} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_build_and_count(root: Path, name: str) -> None:
    config, words = read(root, name), Words(32000)
    with torch.device("meta"):
        dense = account(build_model(config, routing_config({"name": "dense"}), words, words, seed=1))
        sparse = account(build_model(config, routing_config({"name": "switch"}), words, words, seed=1))
    assert len(sparse.blocks) == config.encoder_layers // 2 + config.decoder_layers // 2
    if SIZES[name] is not None:
        assert dense.parameters_total == pytest.approx(SIZES[name] * 1e6, rel=0.001)


@pytest.mark.parametrize("name", SIZES)
def test_every_key_is_explained(root: Path, name: str) -> None:
    lines = (root / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    assert all("#" in line for line in keys)
    of_images = {"patch_size"}
    assert {line.split(":")[0] for line in keys} == ModelConfig.__dataclass_fields__.keys() - of_images
