"""Models that only encode: what depends on what, tied output, X-MoE's placement and its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from moe_train.config import ModelConfig, build
from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.models.accounting import account
from moe_train.models.encoder import build_masked_language_model, build_text_classifier
from moe_train.routing import registered_strategies, routing_config
from tests.kernels.by_sentence import BY_SENTENCE
from tests.models.helpers import PAD, Words, routing_keys

SMALL: dict[str, Any] = {
    "name": "encoder", "encoder_layers": 2, "decoder_layers": 0, "embed_dim": 16, "ffn_dim": 32, "num_heads": 2,
    "max_positions": 64, "dropout": 0.0, "attention_dropout": 0.0, "sparse_layers": "all", "activation": "gelu",
}  # fmt: skip
TOKENS = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 2, PAD, PAD], [0, 5, 6, 2, PAD]])
UID = torch.tensor([4, 1, 9])


def keys(name: str) -> dict[str, Any]:
    return routing_keys(name)


def language_model(routing: dict[str, Any], **changes: Any) -> Any:
    return build_masked_language_model(ModelConfig(**{**SMALL, **changes}), routing_config(routing), Words(), seed=3)


@pytest.mark.parametrize("name", sorted(registered_strategies()))
def test_every_strategy_encodes_a_sentence_whatever_its_batch(name: str) -> None:
    model = language_model(keys(name)).eval()
    with torch.no_grad():
        together, extra = model(TOKENS, sentence_uid=UID)
        for row, length in enumerate((5, 3, 4)):
            alone = model(TOKENS[row : row + 1, :length], sentence_uid=UID[row : row + 1])[0]
            torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)
    assert together.shape == (3, 5, 40) and len(extra["routing"]) == (0 if name == "dense" else 2)


def test_the_output_is_the_embedding() -> None:
    model = language_model(keys("dense")).eval()
    features, _ = model(TOKENS, features_only=True)
    torch.testing.assert_close(model(TOKENS)[0], features @ model.encoder.embed.tokens.weight.t())
    assert model.output_weight is model.encoder.embed.tokens.weight


@pytest.mark.parametrize("name", ["switch", "soft_moe"])
def test_packed_rows_give_the_features_of_real_tokens(name: str) -> None:
    model = language_model(keys(name)).double().eval()
    padded, _ = model(TOKENS, features_only=True)
    model.set_packed(BY_SENTENCE)
    features, extra = model(TOKENS, features_only=True)
    real = TOKENS.ne(PAD)
    assert extra["rows"].tolist() == real.view(-1).nonzero().squeeze(1).tolist()
    torch.testing.assert_close(features, padded[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(TOKENS)[0][real], model.output_layer(features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_classifier_looks_at_real_tokens_only(pooling: Any) -> None:
    config = ModelConfig(**SMALL)
    model = build_text_classifier(config, routing_config(keys("switch")), Words(), 3, seed=1, pooling=pooling).eval()
    with torch.no_grad():
        together = model(TOKENS, sentence_uid=UID)[0]
        alone = model(TOKENS[1:2, :3], sentence_uid=UID[1:2])[0]
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    x = torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    expected = x[:, 0] if pooling == "first" else torch.stack([x[0, :2].mean(0), x[1].mean(0)])
    torch.testing.assert_close(model.pool(x, padding), expected)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a text encoder"):
        language_model(keys("dense"), name="transformer", decoder_layers=1)


def test_the_paper_s_placement_and_size() -> None:
    """One block after the sixth layer, and about 453 M parameters more than the dense model (§4.1)."""
    shape = build(ModelConfig, yaml.safe_load((configs_directory() / "model" / "encoder_base.yaml").read_text()))
    xmoe = {"name": "xmoe", "num_experts": 32, "expert_sublayers": 3}
    words = Words(250002)
    with torch.device("meta"):
        sparse, dense = (
            build_masked_language_model(shape, routing_config(routing), words, seed=1)
            for routing in (xmoe, {"name": "dense"})
        )
    inserted = [layer.inserted is not None for layer in sparse.encoder.stack.layers]
    assert inserted == [n == 5 for n in range(12)]
    extra = account(sparse).parameters_total - account(dense).parameters_total
    assert extra / 1e6 == pytest.approx(32 * 3 * 2 * 768 * 3072 / 1e6, rel=0.01)
    (block,) = account(sparse).blocks
    assert block.experts_per_token == 1.0 and sparse.encoder.stack.layers[5].inserted.block.router.config.dim == 16
