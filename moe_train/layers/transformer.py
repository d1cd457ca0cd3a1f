"""Transformer layers, pre-norm or post-norm, with a dense or sparse feed-forward and an optional inserted block."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.kernels.cpu.dropout import add_dropout
from moe_train.kernels.varlen import Sequences
from moe_train.layers.attention import CrossAttention, SelfAttention
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Block, Records
from moe_train.layers.decoder_cache import DecoderCache
from moe_train.routing.gate import full_precision


@dataclass(frozen=True)
class LayerShape:
    """Shape of the layers of a stack; see :class:`moe_train.config.ModelConfig` for the fields."""

    dim: int
    num_heads: int
    norm_order: str = "pre"
    dropout: float = 0.1
    attention_dropout: float = 0.1


class Norm(nn.LayerNorm):
    """LayerNorm in the type of its input, with mean and variance in fp32 where that has 16 bits."""

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether weight and bias must have the input's type: on GPUs. The kernel for CPUs takes fp32 ones as well."""
        return self.weight.device.type != "cpu"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] → [..., d]."""
        same = self.computes_in_16_bits
        weight, bias = (p.to(x.dtype) if same else p for p in (self.weight, self.bias))
        with full_precision(x):  # on a GPU autocast would compute this in fp32
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Residual(nn.Module):
    """Residual connection: x + f(LN(x)) (pre-norm) or LN(x + f(x)) (post-norm)."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.norm = Norm(shape.dim)
        self.pre = shape.norm_order == "pre"
        self.dropout = shape.dropout

    def enter(self, x: Tensor) -> Tensor:
        """The input of f."""
        return self.norm(x) if self.pre else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds f's output y to x, both [..., d]."""
        total = add_dropout(x, y, self.dropout, self.training)
        return total if self.pre else self.norm(total)


class BlockResidual(nn.Module):
    """Residual connection around a dense or sparse block, except for the parts that the block owns."""

    def __init__(self, shape: LayerShape, block: Block) -> None:
        super().__init__()
        self.block = block
        self.dropout = shape.dropout
        self.residual = None if block.owns_residual or block.owns_norm else Residual(shape)

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, Records]:
        """x [B, S, d] → (x [B, S, d], the block's record if it is sparse)."""
        y, record = self.block(self.residual.enter(x) if self.residual else x, context)
        records = () if record is None else (record,)
        if self.block.owns_residual:
            return y, records
        if self.residual:
            return self.residual.leave(x, y), records
        return add_dropout(x, y, self.dropout, self.training), records


class EncoderLayer(nn.Module):
    """Self-attention, feed-forward, and optionally an inserted sparse block."""

    def __init__(self, shape: LayerShape, block: Block, inserted: Block | None = None) -> None:
        super().__init__()
        self.self_attention = SelfAttention(shape.dim, shape.num_heads, shape.attention_dropout)
        self.attention_residual = Residual(shape)
        self.feed_forward = BlockResidual(shape, block)
        self.inserted = None if inserted is None else BlockResidual(shape, inserted)

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, Records]:
        """x [B, S, d] → (x [B, S, d], records), or packed rows [R, d] if the context has their sequences."""
        h = self.self_attention(self.attention_residual.enter(x), context.visible)
        return self.after_attention(self.attention_residual.leave(x, h), context)

    def after_attention(self, x: Tensor, context: BatchContext) -> tuple[Tensor, Records]:
        """The feed-forward and the inserted block."""
        x, records = self.feed_forward(x, context)
        if self.inserted is None:
            return x, records
        x, more = self.inserted(x, context)
        return x, records + more


class DecoderLayer(EncoderLayer):
    """Causal self-attention, attention over the encoder's output, feed-forward, optionally an inserted block."""

    def __init__(self, shape: LayerShape, block: Block, inserted: Block | None = None) -> None:
        super().__init__(shape, block, inserted)
        self.cross_attention = CrossAttention(shape.dim, shape.num_heads, shape.attention_dropout)
        self.cross_residual = Residual(shape)

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | Sequences | None, context: BatchContext
    ) -> tuple[Tensor, Records]:
        """x [B, S, d] over memory [B, K, d] → (x, records). The target must be padded on the right only.

        Packed rows: both [R, d] and [K, d], with the memory's sequences as ``memory_mask``.
        """
        h = self.self_attention(self.attention_residual.enter(x), context.packed, causal=True)
        x = self.attention_residual.leave(x, h)
        h = self.cross_attention(self.cross_residual.enter(x), memory, memory_mask, context.packed)
        return self.after_attention(self.cross_residual.leave(x, h), context)

    def step(self, x: Tensor, cache: DecoderCache, layer: int, context: BatchContext) -> tuple[Tensor, Records]:
        """Decodes one position: x [N, 1, d] → (x [N, 1, d], records); ``cache`` holds the earlier positions."""
        q, k, v = self.self_attention.project(cache.by_sentence(self.attention_residual.enter(x)))
        keys, values = cache.append(layer, k, v)
        h = self.self_attention.attend(q, keys, values, mask=cache.visible)
        x = self.attention_residual.leave(x, h.view_as(x))
        q = self.cross_attention.project_query(cache.by_sentence(self.cross_residual.enter(x)))
        h = self.cross_attention.attend(q, *cache.memory[layer], mask=cache.memory_mask)
        return self.after_attention(self.cross_residual.leave(x, h.view_as(x)), context)
