"""Stock fairseq weights compute the same function in our model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from moe_train.config import ModelConfig
from moe_train.errors import CheckpointError
from moe_train.fairseq_compat import apply
from moe_train.models import build_model
from moe_train.models.from_fairseq import convert_state_dict
from moe_train.routing import routing_config
from tests.models.helpers import PAD, sentences

apply()
from fairseq.data import Dictionary  # noqa: E402
from fairseq.models.transformer import TransformerModel, base_architecture  # noqa: E402


def dictionary() -> Any:
    words = Dictionary()
    for number in range(36):
        words.add_symbol(f"word{number}")
    return words


def stock_model(pre_norm: bool, share: bool) -> Any:
    flags = Namespace(
        encoder_layers=2, decoder_layers=3, encoder_embed_dim=16, decoder_embed_dim=16, encoder_ffn_embed_dim=32,
        decoder_ffn_embed_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=64,
        max_target_positions=64, share_all_embeddings=share, share_decoder_input_output_embed=share,
        encoder_normalize_before=pre_norm, decoder_normalize_before=pre_norm,
    )  # fmt: skip
    base_architecture(flags)
    words = dictionary()
    return TransformerModel.build_model(flags, Namespace(source_dictionary=words, target_dictionary=words))


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_the_same_logits_and_gradients(pre_norm: bool, share: bool) -> None:
    torch.manual_seed(0)
    stock = stock_model(pre_norm, share).train()
    config = ModelConfig(
        encoder_layers=2, decoder_layers=3, embed_dim=16, ffn_dim=32, num_heads=2, max_positions=64,
        norm_order="pre" if pre_norm else "post", share_embeddings=share, sparse_layers="none",
    )  # fmt: skip
    ours = build_model(config, routing_config({"name": "dense"}), dictionary(), dictionary(), seed=1).train()
    ours.load_state_dict(convert_state_dict(stock.state_dict()))
    for model in (stock, ours):
        for module in model.modules():
            for name in ("dropout", "p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    source, target = sentences([7, 4, 6]), sentences([5, 8, 3])
    real = target.ne(PAD)
    results = []
    for model in (stock, ours):
        logits, _ = model(source, source.ne(PAD).sum(1), target)
        logits[real].square().sum().backward()
        results.append((logits[real].detach(), model.encoder.state_dict, model))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    table = [next(m.encoder.parameters()).grad for m in (stock, ours)]
    torch.testing.assert_close(table[1], table[0], atol=1e-4, rtol=1e-4)


def test_the_same_parameters_less_key_biases_and_dead_ones() -> None:
    stock = stock_model(True, True)
    ours = build_model(
        ModelConfig(encoder_layers=2, decoder_layers=3, embed_dim=16, ffn_dim=32, num_heads=2, sparse_layers="none"),
        routing_config({"name": "dense"}), dictionary(), dictionary(), seed=1,
    )  # fmt: skip
    dead = sum(
        p.numel() for n, p in stock.encoder.layers.named_parameters() if "_proj_" in n or "fc1_" in n or "fc2_" in n
    )
    attentions = 2 + 2 * 3
    assert (
        sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters()) - dead - attentions * 16
    )


def test_weights_start_with_the_spread_of_fairseqs() -> None:
    """Comparable training needs the same initial distribution: deviations within sampling error."""
    torch.manual_seed(0)
    stock = convert_state_dict(stock_model(True, True).state_dict())
    config = ModelConfig(
        encoder_layers=2, decoder_layers=3, embed_dim=16, ffn_dim=32, num_heads=2, sparse_layers="none"
    )
    ours = build_model(config, routing_config({"name": "dense"}), dictionary(), dictionary(), seed=1).state_dict()
    assert stock.keys() == ours.keys()
    for name, weight in stock.items():
        assert weight.shape == ours[name].shape, name
        if weight.dim() == 2:
            assert ours[name].std() == pytest.approx(weight.std().item(), rel=0.12), name
        else:
            assert ours[name].abs().max() == pytest.approx(weight.abs().max().item(), rel=0.35), name


def test_learned_positions_and_other_files_are_refused() -> None:
    state = dict(stock_model(True, True).state_dict())
    with pytest.raises(CheckpointError, match="learned positions"):
        convert_state_dict({**state, "encoder.embed_positions.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a fairseq Transformer"):
        convert_state_dict({"fc.weight": torch.zeros(1)})
