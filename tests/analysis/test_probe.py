"""Probes of models: what blocks saw is what went in, and a run's measures along its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.analysis.collapse import representation_collapse
from moe_train.analysis.probe import describe, probe, probe_run
from moe_train.data.folder import DataFolder
from tests.commands.test_train import here
from tests.models.helpers import PAD
from tests.models.test_encoder import language_model
from tests.models.test_vision import pictures, vision

TOKENS = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 2, PAD, PAD]])


def sample(**more: Any) -> dict[str, Any]:
    languages = torch.tensor([0, 1])
    return {"net_input": {"src_tokens": TOKENS, "src_lang": languages, "tgt_lang": languages, **more}}


def test_what_a_block_saw_and_chose() -> None:
    model = language_model({"name": "switch", "num_experts": 4}).eval()
    found = probe(model, [sample(), sample()])
    assert list(found) == [0, 1]
    layer = found[1]
    assert torch.cat(layer.states).shape == (16, 16) and layer.first.shape == (16,)
    assert torch.cat(layer.token_id)[:8].tolist() == [0, 7, 8, 9, 2, 0, 11, 2]
    assert torch.cat(layer.language)[:8].tolist() == [0] * 5 + [1] * 3
    with torch.no_grad():
        _, extra = model(**sample()["net_input"])
    assert torch.equal(layer.first[:8], extra["routing"][1].routing[0].choices[:, 0])
    content = describe(layer)
    states, token = torch.cat(layer.states), torch.cat(layer.token_id)
    assert content["collapse_by_token"] == representation_collapse(states, token)
    assert sum(content["load"]) == 16 and content["dropped_fraction"] == 0.0
    assert len(content["load_by_language"]) == 2
    assert not [m for m in model.modules() if m._forward_hooks]


def test_strata_tell_the_capacity_that_tokens_request() -> None:
    model = language_model({"name": "smoe", "num_experts": 4, "strata": [1, 3]})
    content = describe(probe(model, [sample()])[0])
    assert 1.0 <= content["requested_capacity"] <= 2.0
    by_language = content["requested_capacity_by_language"]
    assert content["requested_capacity"] == pytest.approx((5 * by_language[0] + 3 * by_language[1]) / 8)
    often = describe(probe(model, [sample()] * 6)[0])["requested_capacity_by_token"]
    assert set(often) == {0, 2} and content["requested_capacity_by_token"] == {}  # twice a batch, the others once


def test_soft_blocks_tell_of_their_mixes() -> None:
    model = vision({"name": "soft_moe", "num_experts": 3})
    images = {"net_input": {"images": pictures(4), "sentence_uid": torch.arange(4)}}
    content = describe(probe(model, [images])[0])
    assert 1.0 <= content["tokens_per_slot"] <= 6.0 and 1.0 <= content["slots_per_token"] <= 6.0
    assert content["tokens"] == 24 and "load" not in content
    text = describe(probe(language_model({"name": "soft_moe", "num_experts": 2}), [sample()])[0])
    assert text["tokens"] == 8 and 1.0 <= text["tokens_per_slot"] <= 5.0  # sentences of 5 and of 3, padding left out


def test_expert_choice_counts_tokens_that_nobody_takes() -> None:
    model = vision({"name": "expert_choice", "num_experts": 3, "capacity_factor": 0.5})
    images = {"net_input": {"images": pictures(4), "sentence_uid": torch.arange(4)}}
    assert describe(probe(model, [images])[0])["dropped_fraction"] >= 0.5


def test_a_run_along_its_checkpoints(tiny_data: DataFolder, tmp_path: Path) -> None:
    words = [
        *(
            "task=cross_lingual_lm",
            "model=encoder_tiny",
            "routing=switch",
            "routing.num_experts=4",
            "training.threads=1",
        ),
        *("model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.encoder_layers=2"),
        *("training.max_updates=9", "training.tokens_per_update=300", "training.checkpoint.every_updates=3"),
        *("training.schedule.warmup_updates=2", "training.optimizer.lr=0.01", "training.validation.max_sentences=10"),
        *(f"data={tiny_data.path}", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    assert here(words, tmp_path)[0] == 0
    found = probe_run(tmp_path / "run", max_sentences=5)
    assert list(found["checkpoints"]) == ["3", "6", "9"]
    (ratios,) = found["fluctuation"].values()
    assert len(ratios) == 2 and all(0.0 <= ratio <= 1.0 for ratio in ratios) and ratios != [0.0, 0.0]
    again = probe_run(tmp_path / "run", max_sentences=5, checkpoints=[9, 9])
    assert list(again["fluctuation"].values()) == [[0.0]]
    tokens = {entry["1" if "1" in entry else "0"]["tokens"] for entry in found["checkpoints"].values()}
    assert len(tokens) == 1
