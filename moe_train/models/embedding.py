"""Token embedding: token ids → input of the first layer."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_train.kernels.cpu.dropout import dropout
from moe_train.layers.positions import SinusoidalPositions


class Vocabulary(Protocol):
    """The part of a fairseq Dictionary that a model needs."""

    def __len__(self) -> int: ...

    def pad(self) -> int:
        """Index of padding."""


def embedding(vocabulary: Vocabulary, dim: int) -> nn.Embedding:
    """Embedding [V, d], normal with standard deviation d^-1/2, padding row 0 (as in fairseq)."""
    table = nn.Embedding(len(vocabulary), dim, padding_idx=vocabulary.pad())
    nn.init.normal_(table.weight, std=dim**-0.5)
    nn.init.zeros_(table.weight[vocabulary.pad()])
    return table


def in_compute_type(x: Tensor) -> Tensor:
    """x in the type of products: autocast's, where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class TokenEmbedding(nn.Module):
    """√d · embedding + sinusoidal position, then dropout. The table and its gradient stay fp32 under autocast."""

    def __init__(self, table: nn.Embedding, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.tokens = table
        self.scale = math.sqrt(table.embedding_dim)
        self.padding_index = int(table.padding_idx or 0)
        self.positions = SinusoidalPositions(table.embedding_dim, max_positions, self.padding_index)
        self.dropout = dropout

    def padding(self, tokens: Tensor) -> Tensor:
        """[B, S] bool, True at padding."""
        return tokens.eq(self.padding_index)

    def forward(self, tokens: Tensor, start: int = 0, padding: Tensor | None = None) -> Tensor:
        """tokens [B, S] → [B, S, d]; ``padding`` is needed only if there may be padding on the left."""
        x = torch.add(self.positions(tokens.shape[1], start, padding), self.tokens(tokens), alpha=self.scale)
        return dropout(in_compute_type(x), self.dropout, self.training)
