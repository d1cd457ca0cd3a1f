"""Encoder-only text models: a masked language model, and a classifier initialised from one.

BERT (Devlin et al., 2019) and XLM-R (Conneau et al., 2020) with X-MoE's experts: ``model.sparse_layers=insert_after:6``
and ``routing.expert_sublayers=3`` in the paper. Positions are sinusoidal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.errors import ConfigError
from moe_train.layers.batch_context import RoutingSettings
from moe_train.layers.block import start_losses
from moe_train.layers.linear import linear
from moe_train.layers.seeding import seeded
from moe_train.layers.transformer import Norm
from moe_train.models.builder import block_inputs, encoder_stack
from moe_train.models.embedding import TokenEmbedding, Vocabulary, embedding
from moe_train.models.encoder_decoder import EncoderOut, TransformerEncoder
from moe_train.models.routed import ModelParts, RoutedModel
from moe_train.routing.base import RoutingConfig

ARCHITECTURE = "encoder"
_EMBEDDING, _HEAD = 20, 21


class _Encodes(RoutedModel):
    """Base class of both models, with the encoder whose weights the classifier takes from the language model."""

    takes_real_tokens: ClassVar[bool] = True
    encoder: TransformerEncoder

    def __init__(self, encoder: TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = encoder.settings

    def encode(
        self,
        src_tokens: Tensor,
        sentence_uid: Tensor | None,
        src_lang: Tensor | None,
        tgt_lang: Tensor | None,
        pass_index: Tensor | None,
        real_tokens: Sequence[int],
        keep_packed: bool = False,
    ) -> EncoderOut:
        """src_tokens [B, S] → output of :class:`TransformerEncoder`."""
        encoded: EncoderOut = self.encoder(
            src_tokens, None, sentence_uid, src_lang, tgt_lang, pass_index, real_tokens, keep_packed=keep_packed
        )
        return {**encoded, "routing": start_losses(encoded["routing"], self.settings.ranks)}


class MaskedLanguageModel(_Encodes):
    """Predicts masked tokens. The output layer is tied to the embedding."""

    def __init__(self, encoder: TransformerEncoder) -> None:
        super().__init__(encoder)
        dim = self.output_weight.shape[1]
        self.dense = nn.Linear(dim, dim)
        self.norm = Norm(dim)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        sentence_uid: Tensor | None = None,
        src_lang: Tensor | None = None,
        tgt_lang: Tensor | None = None,
        pass_index: Tensor | None = None,
        features_only: bool = False,
        real_tokens: Sequence[int] = (),
    ) -> tuple[Tensor, dict[str, Any]]:
        """One forward pass.

        Args:
            src_tokens: [B, S], padded on the right.
            src_lengths: not used; padding is found in the tokens.
            sentence_uid, src_lang, tgt_lang, pass_index: [B] each, sentence metadata for routers.
            features_only: return features, so that the caller computes the vocabulary product.
            real_tokens: number of tokens that are not padding, where it is known: the host then does not wait for it.

        Returns:
            logits [B, S, V] or features [B, S, d], and ``{"routing": records}``. With packed rows ``features_only``
            gives features [N, d] of the N real tokens, and ``rows`` their places among the B · S (None: N = B · S).
        """
        encoded = self.encode(src_tokens, sentence_uid, src_lang, tgt_lang, pass_index, real_tokens, features_only)
        x = encoded["encoder_out"][0]
        features = self.norm(F.gelu(linear(x, self.dense.weight, self.dense.bias)))
        extra = {"routing": encoded["routing"]}
        if (context := encoded["packed"]) is not None:
            return context.pack(features), {**extra, "rows": context.real}
        return (features if features_only else self.output_layer(features)), extra

    @property
    def output_weight(self) -> Tensor:
        """[V, d], the embedding."""
        return self.encoder.embed.tokens.weight

    def output_layer(self, features: Tensor) -> Tensor:
        """features [..., d] → logits [..., V]."""
        return F.linear(features, self.output_weight)

    def parts(self) -> ModelParts:
        """The layers, and the output layers of a predicted token."""
        output = 2.0 * (self.dense.weight.numel() + self.output_weight.numel())
        return ModelParts(self.encoder.stack, None, 0.0, output)


class TextClassifier(_Encodes):
    """Text classifier.

    Class attributes:
        pretrained: prefix of the parameters that ``training.init_from`` loads; the head is newly initialised.
    """

    pretrained: ClassVar[str] = "encoder."

    def __init__(
        self, encoder: TransformerEncoder, num_classes: int, dropout: float, pooling: Literal["mean", "first"]
    ) -> None:
        super().__init__(encoder)
        dim = encoder.embed.tokens.weight.shape[1]
        self.dense = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.pooling = pooling

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        sentence_uid: Tensor | None = None,
        src_lang: Tensor | None = None,
        tgt_lang: Tensor | None = None,
        pass_index: Tensor | None = None,
        real_tokens: Sequence[int] = (),
    ) -> tuple[Tensor, dict[str, Any]]:
        """As :meth:`MaskedLanguageModel.forward` → logits [B, classes] and ``{"routing": records}``."""
        encoded = self.encode(src_tokens, sentence_uid, src_lang, tgt_lang, pass_index, real_tokens)
        mask = encoded["encoder_padding_mask"]
        pooled = self.pool(encoded["encoder_out"][0], mask[0] if mask else None)
        hidden = self.dense(self.dropout(pooled)).tanh()
        return self.out(self.dropout(hidden)), {"routing": encoded["routing"]}

    def pool(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x [B, S, d], padding [B, S] (True at padding) → [B, d]."""
        if self.pooling == "first":
            return x[:, 0]
        if padding is None:
            return x.mean(1)
        real = (~padding).unsqueeze(2)
        return (x * real).sum(1) / real.sum(1).clamp(min=1)

    def parts(self) -> ModelParts:
        """The layers; the head, which runs once per text, is not counted."""
        return ModelParts(self.encoder.stack, None, 0.0, 0.0)


def build_masked_language_model(
    config: ModelConfig,
    routing: RoutingConfig,
    dictionary: Vocabulary,
    *,
    seed: int,
    layout: Any = None,
    token_frequency: Tensor | None = None,
) -> MaskedLanguageModel:
    """A new model. Its weights depend on ``seed`` and their position in the model.

    Raises:
        ConfigError: the architecture is not ``encoder``.
    """
    encoder = _build_encoder(config, routing, dictionary, seed, layout, token_frequency)
    with seeded(seed, _HEAD):
        return MaskedLanguageModel(encoder)


def build_text_classifier(
    config: ModelConfig,
    routing: RoutingConfig,
    dictionary: Vocabulary,
    num_classes: int,
    *,
    seed: int,
    pooling: Literal["mean", "first"] = "mean",
    layout: Any = None,
    token_frequency: Tensor | None = None,
) -> TextClassifier:
    """A new model; see :func:`build_masked_language_model`."""
    encoder = _build_encoder(config, routing, dictionary, seed, layout, token_frequency)
    with seeded(seed, _HEAD):
        return TextClassifier(encoder, num_classes, config.dropout, pooling)


def _build_encoder(
    config: ModelConfig,
    routing: RoutingConfig,
    dictionary: Vocabulary,
    seed: int,
    layout: Any,
    frequency: Tensor | None,
) -> TransformerEncoder:
    if config.name != ARCHITECTURE:
        raise ConfigError(
            f"model '{config.name}' is not a text encoder", remedy="set model=encoder_tiny or encoder_base"
        )
    with seeded(seed, _EMBEDDING):
        embed = TokenEmbedding(embedding(dictionary, config.embed_dim), config.max_positions, config.dropout)
    inputs = dataclasses.replace(block_inputs(config, seed, layout, frequency), vocabulary=len(dictionary))
    stack = encoder_stack(config, routing, inputs)
    return TransformerEncoder(dictionary, embed, stack, RoutingSettings(seed=seed))
