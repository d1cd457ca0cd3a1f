"""The shape of a model. Experts are described by the routing config; here stands only where they are placed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.config import check
from moe_train.config.placement import place
from moe_train.errors import ConfigError

_MOST_LAYERS = 10_000
_MOST_POSITIONS = 1 << 20  # a table of them takes memory whatever the checkpoint holds


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer: encoder-decoder (the configs ``tiny``, ``iwslt``, ``base``, ``big``), or an encoder alone.

    Attributes:
        name: what the registry calls the architecture: ``transformer``, ``encoder`` or ``vision_transformer``.
        decoder_layers: 0 for an encoder alone.
        embed_dim: d, the width of the residual stream.
        ffn_dim: hidden width of a dense feed-forward, and of an expert unless ``routing.expert_ffn_dim`` differs.
        norm_order: ``pre`` (x + f(LN(x))) or ``post`` (LN(x + f(x))).
        sparse_layers: where experts stand in the encoder, and in the decoder unless ``decoder_sparse_layers`` is set;
            the grammar is in :mod:`moe_train.config.placement`.
        share_embeddings: one matrix for source, target and output.
        max_positions: longest sentence in tokens, tags and end included.
        patch_size: of a vision Transformer: pixels of a square patch's side.
    """

    name: str = "transformer"
    encoder_layers: int = 6
    decoder_layers: int = 6
    embed_dim: int = 512
    ffn_dim: int = 2048
    num_heads: int = 8
    norm_order: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    share_embeddings: bool = True
    max_positions: int = 512
    sparse_layers: str | tuple[int, ...] = "odd"
    decoder_sparse_layers: str | tuple[int, ...] | None = None
    patch_size: int = 16

    def __post_init__(self) -> None:
        for key in ("encoder_layers", "embed_dim", "ffn_dim", "num_heads", "max_positions", "patch_size"):
            check.positive(f"model.{key}", getattr(self, key))
        check.not_negative("model.decoder_layers", self.decoder_layers)
        for key in ("encoder_layers", "decoder_layers"):  # placements are lists of layers
            check.at_most(f"model.{key}", getattr(self, key), _MOST_LAYERS)
        check.at_most("model.max_positions", self.max_positions, _MOST_POSITIONS)
        if self.name == "transformer":
            check.positive("model.decoder_layers", self.decoder_layers)
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            check.probability(f"model.{key}", getattr(self, key))
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}",
                remedy="choose a width that the number of heads divides",
            )
        place(self.sparse_layers, self.encoder_layers)
        place(self.for_decoder, self.decoder_layers, "model.decoder_sparse_layers")

    @property
    def for_decoder(self) -> str | tuple[int, ...]:
        """The decoder's placement."""
        if not self.decoder_layers:
            return "none"
        return self.sparse_layers if self.decoder_sparse_layers is None else self.decoder_sparse_layers
