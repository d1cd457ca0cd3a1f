"""Writes a dense :class:`TransformerModel` as a model of CTranslate2 (https://github.com/OpenNMT/CTranslate2)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from moe_train.errors import ConfigError
from moe_train.layers.attention import CrossAttention, SelfAttention
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.transformer import BlockResidual, DecoderLayer, EncoderLayer
from moe_train.models.encoder_decoder import TransformerDecoder, TransformerEncoder, TransformerModel

_BLANK = "<blank>"  # CTranslate2's name of padding


def write_ctranslate2(
    model: TransformerModel, source: Sequence[str], target: Sequence[str], folder: Path, start: str | None = None
) -> None:
    """Writes weights (fp32), vocabularies and config into an existing folder; CTranslate2 converts weights on loading.

    Args:
        model: without sparse layers.
        source, target: symbols of the dictionaries in order. Sources are given to CTranslate2 with tags and end symbol.
        start: the decoder's first token (a language tag, or the end symbol); None: it is given as the target prefix.

    Raises:
        ConfigError: ctranslate2 is not installed, or the model has sparse layers.
    """
    spec = _empty_spec(model)
    _set_side(spec.encoder, model.encoder, spec.encoder.embeddings[0])
    _set_side(spec.decoder, model.decoder, spec.decoder.embeddings)
    spec.decoder.projection.weight = _array(model.output_weight)
    padding = model.decoder.embed.padding_index
    spec.register_source_vocabulary([*source[:padding], _BLANK, *source[padding + 1 :]])
    spec.register_target_vocabulary([*target[:padding], _BLANK, *target[padding + 1 :]])
    spec.config.decoder_start_token = start
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


def _empty_spec(model: TransformerModel) -> Any:
    """The specification without weights."""
    try:
        specs: Any = importlib.import_module("ctranslate2.specs")
    except ImportError:
        raise ConfigError("CTranslate2 is not installed", remedy="install it: pip install ctranslate2") from None
    layers: list[EncoderLayer] = [*_layers(model.encoder), *_layers(model.decoder)]
    first, blocks = layers[0], [layer.feed_forward.block for layer in layers]
    if any(layer.inserted for layer in layers) or not all(isinstance(block, FeedForward) for block in blocks):
        raise ConfigError("CTranslate2 has no layers with experts", remedy="export a model of routing=dense")
    activation = getattr(blocks[0], "activation", "relu").upper()
    return specs.TransformerSpec.from_config(
        (len(_layers(model.encoder)), len(_layers(model.decoder))),
        first.self_attention.heads,
        pre_norm=first.attention_residual.pre,
        activation=specs.Activation[activation],
    )


def _layers(side: TransformerEncoder | TransformerDecoder) -> list[Any]:
    return list(side.stack.layers)


def _set_side(spec: Any, side: TransformerEncoder | TransformerDecoder, embeddings: Any) -> None:
    embeddings.weight = _array(side.embed.tokens.weight)
    spec.position_encodings.encodings = _array(side.embed.positions.table)
    if isinstance(side.stack.norm, nn.LayerNorm):
        _set_norm(spec.layer_norm, side.stack.norm)
    for one, layer in zip(spec.layer, _layers(side), strict=True):
        _set_self_attention(one.self_attention, layer.self_attention)
        _set_norm(one.self_attention.layer_norm, layer.attention_residual.norm)
        if isinstance(layer, DecoderLayer):
            _set_cross_attention(one.attention, layer.cross_attention)
            _set_norm(one.attention.layer_norm, layer.cross_residual.norm)
        _set_feed_forward(one.ffn, layer.feed_forward)


def _set_self_attention(spec: Any, attention: SelfAttention) -> None:
    query, value = _array(attention.query_bias), _array(attention.value_bias)
    spec.linear[0].weight = _array(attention.qkv_weight)
    spec.linear[0].bias = np.concatenate((query, np.zeros_like(query), value))
    _set_linear(spec.linear[1], attention.out)


def _set_cross_attention(spec: Any, attention: CrossAttention) -> None:
    value = _array(attention.value_bias)
    spec.linear[0].weight, spec.linear[0].bias = _array(attention.query_weight), _array(attention.query_bias)
    spec.linear[1].weight = _array(attention.key_value_weight)
    spec.linear[1].bias = np.concatenate((np.zeros_like(value), value))
    _set_linear(spec.linear[2], attention.out)


def _set_feed_forward(spec: Any, feed_forward: BlockResidual) -> None:
    block, residual = feed_forward.block, feed_forward.residual
    assert isinstance(block, FeedForward) and residual is not None
    _set_norm(spec.layer_norm, residual.norm)
    _set_linear(spec.linear_0, block.fc1)
    _set_linear(spec.linear_1, block.fc2)


def _set_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _set_norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()
