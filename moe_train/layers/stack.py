"""Stacks of Transformer layers, with activation recomputation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_train.kernels.varlen import Sequences, VarlenAttention
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Records
from moe_train.layers.decoder_cache import DecoderCache
from moe_train.layers.transformer import DecoderLayer, EncoderLayer, LayerShape, Norm


class _Stack(nn.Module):
    """Layers in order, with a final norm if the layers are pre-norm.

    Attributes:
        recompute: whether each layer's activations are recomputed in backward instead of kept.
        varlen: attention over packed rows, with which the model packs batches that it takes; None: it packs none.
    """

    def __init__(self, shape: LayerShape, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(shape.dim) if shape.norm_order == "pre" else nn.Identity()
        self.recompute = False
        self.varlen: VarlenAttention | None = None

    def _call(self, function: Callable[..., tuple[Tensor, Records]], *arguments: Any) -> tuple[Tensor, Records]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]
        return function(*arguments)


class EncoderStack(_Stack):
    """Stack of encoder layers."""

    def __init__(self, shape: LayerShape, layers: Sequence[EncoderLayer]) -> None:
        super().__init__(shape, layers)

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, Records]:
        """x [B, S, d], or packed rows → (x in the same form, records of all sparse blocks in order)."""
        records: Records = ()
        for layer in self.layers:
            x, more = self._call(layer, x, context)
            records += more
        return self.norm(x), records


class DecoderStack(_Stack):
    """Stack of decoder layers, with causal self-attention and attention over the encoder's output."""

    def __init__(self, shape: LayerShape, layers: Sequence[DecoderLayer]) -> None:
        super().__init__(shape, layers)

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | Sequences | None, context: BatchContext
    ) -> tuple[Tensor, Records]:
        """x [B, T, d], memory [B, S, d], memory_mask [B, 1, 1, S] (true = visible) → (x [B, T, d], records).

        Or packed rows of both, with the memory's sequences as ``memory_mask``.
        """
        records: Records = ()
        for layer in self.layers:
            x, more = self._call(layer, x, memory, memory_mask, context)
            records += more
        return self.norm(x), records

    def cache(self, memory: Tensor, memory_mask: Tensor | None, beam: int, max_length: int) -> DecoderCache:
        """An empty cache for the sentences of ``memory`` [B, S, d], with the keys and values of ``memory``."""
        kept = [layer.cross_attention.project_memory(memory) for layer in self._decoder_layers()]
        return DecoderCache([(k.contiguous(), v.contiguous()) for k, v in kept], memory_mask, beam, max_length)

    def step(self, x: Tensor, cache: DecoderCache, context: BatchContext) -> tuple[Tensor, Records]:
        """Decodes the next position of every hypothesis: x [N, 1, d] → (x [N, 1, d], records)."""
        cache.advance()
        records: Records = ()
        for index, layer in enumerate(self._decoder_layers()):
            x, more = layer.step(x, cache, index, context)
            records += more
        return self.norm(x), records

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
