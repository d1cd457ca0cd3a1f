"""Builds models from config. Sparse blocks are numbered over the whole model, encoder first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.config.placement import Placement, place
from moe_train.errors import ConfigError, did_you_mean
from moe_train.layers import Block, BlockInputs, FeedForward, build_block
from moe_train.layers.batch_context import RoutingSettings
from moe_train.layers.seeding import seeded
from moe_train.layers.stack import DecoderStack, EncoderStack
from moe_train.layers.transformer import DecoderLayer, EncoderLayer, LayerShape
from moe_train.models.embedding import TokenEmbedding, Vocabulary, embedding
from moe_train.models.encoder_decoder import TransformerDecoder, TransformerEncoder, TransformerModel
from moe_train.models.trainable import TrainableModel
from moe_train.routing.base import RoutingConfig
from moe_train.routing.registry import decoder_config, strategy

if TYPE_CHECKING:
    from moe_train.parallel.layout import ExpertLayout

_EMBEDDINGS, _ENCODER, _DECODER = range(3)

Layers = list[tuple[Block, Block | None]]
L = TypeVar("L", bound=EncoderLayer)


def build_model(
    config: ModelConfig,
    routing: RoutingConfig,
    source_dictionary: Vocabulary,
    target_dictionary: Vocabulary,
    *,
    seed: int,
    layout: ExpertLayout | None = None,
    token_frequency: Tensor | None = None,
) -> TrainableModel:
    """A new model. Its weights depend on ``seed`` and their position in the model, and not on the layout.

    Args:
        config: the architecture.
        routing: the strategy's config, from which the decoder's is derived.
        source_dictionary, target_dictionary: objects with ``len()`` and ``pad()``, such as fairseq's Dictionary.
        seed: seed of initial weights and of counter-based random numbers.
        layout: which rank holds which experts; None: all are local.
        token_frequency: [V] counts of the training text, for hash routing.

    Raises:
        ConfigError: unknown architecture, embeddings that cannot be shared, or a strategy that a decoder cannot use.
    """
    if config.name not in _ARCHITECTURES:
        raise ConfigError(f"there is no model '{config.name}'", remedy=did_you_mean(config.name, _ARCHITECTURES))
    shared = block_inputs(config, seed, layout, token_frequency)
    return _ARCHITECTURES[config.name](config, routing, source_dictionary, target_dictionary, shared)


def block_inputs(
    config: ModelConfig, seed: int, layout: ExpertLayout | None = None, token_frequency: Tensor | None = None
) -> BlockInputs:
    """Arguments that all blocks share."""
    return BlockInputs(
        dim=config.embed_dim,
        ffn_dim=config.ffn_dim,
        activation=config.activation,
        activation_dropout=config.activation_dropout,
        dropout=config.dropout,
        seed=seed,
        layout=layout,
        token_frequency=token_frequency,
    )


def layer_shape(config: ModelConfig) -> LayerShape:
    """Shape that all layers share."""
    return LayerShape(config.embed_dim, config.num_heads, config.norm_order, config.dropout, config.attention_dropout)


def encoder_stack(config: ModelConfig, routing: RoutingConfig, inputs: BlockInputs) -> EncoderStack:
    """The layers of an encoder-only model."""
    shape, placement = layer_shape(config), place(config.sparse_layers, config.encoder_layers)
    blocks, _ = _blocks(routing, placement, config.encoder_layers, inputs, _ENCODER)
    return EncoderStack(shape, _layers(EncoderLayer, shape, blocks, inputs.seed, _ENCODER))


def _build_transformer(
    config: ModelConfig, routing: RoutingConfig, source: Vocabulary, target: Vocabulary, shared: BlockInputs
) -> TransformerModel:
    settings, seed = RoutingSettings(seed=shared.seed), shared.seed
    shape = layer_shape(config)
    tables = _embeddings(config, source, target, seed)
    placement = place(config.sparse_layers, config.encoder_layers)
    inputs = dataclasses.replace(shared, vocabulary=len(source))
    encoder_blocks, count = _blocks(routing, placement, config.encoder_layers, inputs, _ENCODER)
    placement = place(config.for_decoder, config.decoder_layers, "model.decoder_sparse_layers")
    inputs = dataclasses.replace(shared, vocabulary=len(target), layer=count)
    if placement.replaced or placement.inserted_after:
        routing = decoder_config(routing)
    decoder_blocks, _ = _blocks(routing, placement, config.decoder_layers, inputs, _DECODER)
    encoder = EncoderStack(shape, _layers(EncoderLayer, shape, encoder_blocks, seed, _ENCODER))
    decoder = DecoderStack(shape, _layers(DecoderLayer, shape, decoder_blocks, seed, _DECODER))
    embeds = [TokenEmbedding(table, config.max_positions, config.dropout) for table in tables[:2]]
    return TransformerModel(
        TransformerEncoder(source, embeds[0], encoder, settings),
        TransformerDecoder(target, embeds[1], decoder, settings, tables[2]),
        settings,
    )


_ARCHITECTURES: dict[str, Callable[..., TrainableModel]] = {"transformer": _build_transformer}


def _embeddings(
    config: ModelConfig, source: Vocabulary, target: Vocabulary, seed: int
) -> tuple[nn.Embedding, nn.Embedding, nn.Linear | None]:
    """Source embedding, target embedding, and the output layer if it is not tied."""
    with seeded(seed, _EMBEDDINGS):
        table = embedding(source, config.embed_dim)
        if config.share_embeddings:
            if len(source) != len(target) or source.pad() != target.pad():
                raise ConfigError(
                    "model.share_embeddings needs one dictionary for source and target",
                    remedy="prepare the data with a joint vocabulary, or set model.share_embeddings=false",
                )
            return table, table, None
        output = nn.Linear(config.embed_dim, len(target), bias=False)
        nn.init.normal_(output.weight, std=config.embed_dim**-0.5)
        return table, embedding(target, config.embed_dim), output


def _blocks(
    routing: RoutingConfig, placement: Placement, num_layers: int, inputs: BlockInputs, stack: int
) -> tuple[Layers, int]:
    """For each layer its feed-forward and its inserted block, and the number of the next sparse block."""
    sparse = strategy(routing.name).router.layer_kind != "dense"
    number = inputs.layer
    blocks: Layers = []

    def sparse_block(index: int, place: int) -> Block:
        nonlocal number
        with seeded(inputs.seed, stack, index, place):
            block = build_block(routing, dataclasses.replace(inputs, layer=number))
        number += 1
        return block

    for index in range(num_layers):
        if sparse and index in placement.replaced:
            block = sparse_block(index, 1)
        else:
            with seeded(inputs.seed, stack, index, 1):
                block = FeedForward(inputs.dim, inputs.ffn_dim, inputs.activation, inputs.activation_dropout)
        inserted = sparse_block(index, 2) if sparse and index in placement.inserted_after else None
        blocks.append((block, inserted))
    return blocks, number


def _layers(kind: type[L], shape: LayerShape, blocks: Layers, seed: int, stack: int) -> list[L]:
    layers: list[L] = []
    for index, (block, inserted) in enumerate(blocks):
        with seeded(seed, stack, index, 0):
            layers.append(kind(shape, block, inserted))
    return layers
