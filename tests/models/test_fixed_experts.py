"""THOR with one expert of each layer for everything: a dense model, with the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.config import ModelConfig
from moe_train.models import build_model
from moe_train.models.accounting import sparse_blocks
from moe_train.models.fixed_experts import fix_experts
from moe_train.routing import routing_config
from tests.evaluation.recurrent import dictionary

WORDS = dictionary(40)
SAMPLE = {
    "src_tokens": torch.arange(4, 34).view(5, 6),
    "prev_output_tokens": torch.arange(8, 33).view(5, 5),
    "src_lengths": torch.full((5,), 6),
    "sentence_uid": torch.arange(5),
}


def model(routing: dict[str, Any], **keys: Any) -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "embed_dim": 16, "ffn_dim": 24, "num_heads": 2, **keys}
    built = build_model(ModelConfig(**sizes), routing_config(routing), WORDS, WORDS, seed=1)
    built.set_num_updates(7)
    torch.manual_seed(3)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_function_is_that_of_the_router(activation: str) -> None:
    thor = model({"name": "thor", "num_experts": 4, "inference": "fixed"}, activation=activation)
    blocks = sparse_blocks(thor)
    want = thor(**SAMPLE)[0]
    fix_experts(thor)
    assert blocks and not sparse_blocks(thor)
    torch.testing.assert_close(thor(**SAMPLE)[0], want, rtol=1e-5, atol=1e-5)
    dense = {name: tuple(p.shape) for name, p in model({"name": "dense"}).named_parameters()}
    assert {name: tuple(p.shape) for name, p in thor.named_parameters()} == dense


@pytest.mark.parametrize("routing", [{"name": "switch"}, {"name": "thor"}, {"name": "thor", "inference": "ensemble"}])
def test_other_routing_stays(routing: dict[str, Any]) -> None:
    other = model({**routing, "num_experts": 2})
    before = list(other.modules())
    fix_experts(other)
    assert list(other.modules()) == before


def test_experts_with_more_than_a_feed_forward_stay() -> None:
    deep = model({"name": "thor", "num_experts": 2, "inference": "fixed", "expert_sublayers": 2})
    want = deep(**SAMPLE)[0]
    fix_experts(deep)
    assert sparse_blocks(deep)
    assert torch.equal(deep(**SAMPLE)[0], want)
