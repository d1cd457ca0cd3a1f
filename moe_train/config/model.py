"""Config of the architecture. The routing config describes the experts; this one only places them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_train.config import check
from moe_train.config.check import Probability, Range
from moe_train.config.placement import place
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer: an encoder-decoder (the configs ``tiny``, ``iwslt``, ``base``, ``big``), or only an encoder.

    Attributes:
        name: name of the architecture: ``transformer``, ``encoder`` or ``vision_transformer``.
        decoder_layers: 0 for encoders.
        embed_dim: d, the width of the residual stream.
        ffn_dim: hidden width of a dense feed-forward, and of an expert unless ``routing.expert_ffn_dim`` differs.
        norm_order: ``pre`` (x + f(LN(x))) or ``post`` (LN(x + f(x))).
        sparse_layers: sparse layers of the encoder, and of the decoder unless ``decoder_sparse_layers`` is set; the
            grammar is in :mod:`moe_train.config.placement`.
        share_embeddings: one matrix for source, target and output.
        max_positions: longest sentence in tokens, including tags and end.
        patch_size: side of a square patch in pixels (vision Transformer).
    """

    name: str = "transformer"
    encoder_layers: Annotated[int, Range(above=0, most=1000)] = 6
    decoder_layers: Annotated[int, Range(least=0, most=1000)] = 6
    embed_dim: Annotated[int, Range(above=0, most=2**17)] = 512
    ffn_dim: Annotated[int, Range(above=0, most=2**20)] = 2048
    num_heads: Annotated[int, Range(above=0, most=2**17)] = 8
    norm_order: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu"] = "relu"
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    activation_dropout: Probability = 0.0
    share_embeddings: bool = True
    max_positions: Annotated[int, Range(above=0, most=2**20)] = 512
    sparse_layers: Annotated[str | tuple[int, ...], Range(least=0, most=1000)] = "odd"
    decoder_sparse_layers: Annotated[str | tuple[int, ...] | None, Range(least=0, most=1000)] = None
    patch_size: Annotated[int, Range(above=0, most=2**14)] = 16

    def __post_init__(self) -> None:
        check.numbers(self, "model")
        if self.name == "transformer":
            check.positive("model.decoder_layers", self.decoder_layers)
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}",
                remedy="choose a width that the number of heads divides",
            )
        place(self.sparse_layers, self.encoder_layers)
        place(self.for_decoder, self.decoder_layers, "model.decoder_sparse_layers")

    @property
    def for_decoder(self) -> str | tuple[int, ...]:
        """The decoder's sparse layers."""
        if not self.decoder_layers:
            return "none"
        return self.sparse_layers if self.decoder_sparse_layers is None else self.decoder_sparse_layers
