"""Vision Transformer with experts.

Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, in Soft MoE's variant (Puigcerver et al., 2024, §3.3): patches, learnt
positions, pre-norm layers, no class token, global average pooling before the head. The paper's models also normalise
queries and keys (0.01 % of the parameters), which this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.errors import ConfigError
from moe_train.layers.batch_context import BatchInfo, RoutingSettings, batch_context
from moe_train.layers.block import start_losses
from moe_train.layers.linear import linear
from moe_train.layers.seeding import seeded
from moe_train.layers.stack import EncoderStack
from moe_train.models.builder import block_inputs, encoder_stack
from moe_train.models.embedding import in_compute_type
from moe_train.models.routed import ModelParts, RoutedModel
from moe_train.routing.base import RoutingConfig

ARCHITECTURE = "vision_transformer"
_PATCHES, _HEAD = 10, 11


@dataclass(frozen=True)
class ImageShape:
    """Shape and number of classes of the images."""

    height: int
    width: int
    channels: int
    classes: int


class PatchEmbedding(nn.Module):
    """Images → one row per patch: a linear map of its pixels plus a learnt position."""

    def __init__(self, images: ImageShape, patch: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.patch, self.channels = patch, images.channels
        self.project = nn.Linear(patch * patch * images.channels, dim)
        nn.init.trunc_normal_(self.project.weight, std=self.project.in_features**-0.5)
        nn.init.zeros_(self.project.bias)
        patches = (images.height // patch) * (images.width // patch)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(patches, dim), std=0.02))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, H, W, C] uint8 → [B, patches, d], patches in row-major order; pixels are scaled to -1 .. 1."""
        rows = self.cut(images).to(self.project.weight.dtype) / 127.5 - 1.0
        embedded = linear(rows, self.project.weight, self.project.bias) + self.positions
        return self.dropout(in_compute_type(embedded))  # type: ignore[no-any-return]

    def cut(self, images: Tensor) -> Tensor:
        """[B, H, W, C] → [B, patches, patch · patch · C]."""
        batch, height, width, channels = images.shape
        p = self.patch
        grid = images.view(batch, height // p, p, width // p, p, channels).transpose(2, 3)
        return grid.reshape(batch, (height // p) * (width // p), p * p * channels)


class VisionTransformer(RoutedModel):
    """Image classifier."""

    def __init__(self, embed: PatchEmbedding, stack: EncoderStack, head: nn.Linear, settings: RoutingSettings) -> None:
        super().__init__()
        self.embed = embed
        self.stack = stack
        self.head = head
        self.settings = settings

    def forward(
        self,
        images: Tensor,
        sentence_uid: Tensor | None = None,
        pass_index: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """One forward pass.

        Args:
            images: [B, H, W, C] uint8.
            sentence_uid: [B] unique numbers of the images; routers treat an image as a sentence.
            pass_index: [B], pass of the image in a doubled batch.

        Returns:
            logits [B, classes] and ``{"routing": records}``.
        """
        x = self.embed(images)
        context = batch_context(
            None,
            (x.shape[0], x.shape[1]),
            self.settings,
            BatchInfo(sentence_uid, None, pass_index),
            training=self.training,
            device=x.device,
        )
        x, records = self.stack(x, context)
        logits = linear(x.mean(1), self.head.weight, self.head.bias)
        return logits, {"routing": start_losses(records, self.settings.ranks)}

    def parts(self) -> ModelParts:
        """The layers, the patch embedding, and the head divided by the number of tokens."""
        head = 2.0 * self.head.weight.numel() / self.patches
        return ModelParts(self.stack, None, 2.0 * self.embed.project.weight.numel(), head)

    @property
    def patches(self) -> int:
        """Number of tokens of an image."""
        return self.embed.positions.shape[0]


def build_vision_model(
    config: ModelConfig,
    routing: RoutingConfig,
    images: ImageShape,
    *,
    seed: int,
    layout: Any = None,
) -> VisionTransformer:
    """A new model. Its weights depend on ``seed`` and their position in the model.

    All images have the same number of tokens, which becomes Soft MoE's ``expected_tokens``.

    Raises:
        ConfigError: the architecture is not a vision Transformer, or patches do not fill the image.
    """
    if config.name != ARCHITECTURE:
        raise ConfigError(f"model '{config.name}' is not for images", remedy="set model=vit_tiny, vit_s16, vit_b16 …")
    patch = config.patch_size
    if images.height % patch or images.width % patch:
        common = [n for n in range(1, images.height + 1) if not images.height % n and not images.width % n]
        raise ConfigError(
            f"patches of {patch} pixels do not fill images of {images.width} x {images.height}",
            "model.patch_size",
            f"choose one of {', '.join(map(str, common))}, or another task.image_size",
        )
    routing = routing.of_length((images.height // patch) * (images.width // patch))
    with seeded(seed, _PATCHES):
        embed = PatchEmbedding(images, patch, config.embed_dim, config.dropout)
    with seeded(seed, _HEAD):
        head = nn.Linear(config.embed_dim, images.classes)
        nn.init.zeros_(head.bias)
    stack = encoder_stack(config, routing, block_inputs(config, seed, layout))
    return VisionTransformer(embed, stack, head, RoutingSettings(seed=seed))
