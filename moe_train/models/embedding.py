"""Token ids → the first hidden states."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_train.kernels.cpu.dropout import dropout
from moe_train.layers.positions import SinusoidalPositions


class Vocabulary(Protocol):
    """What a model needs of a fairseq Dictionary."""

    def __len__(self) -> int: ...

    def pad(self) -> int:
        """The index of padding."""


def embedding(vocabulary: Vocabulary, dim: int) -> nn.Embedding:
    """A table [V, d], normal with deviation d^-1/2, its padding row 0 (as fairseq's)."""
    table = nn.Embedding(len(vocabulary), dim, padding_idx=vocabulary.pad())
    nn.init.normal_(table.weight, std=dim**-0.5)
    nn.init.zeros_(table.weight[vocabulary.pad()])
    return table


class TokenEmbedding(nn.Module):
    """√d · embedding + sinusoidal position, then dropout."""

    def __init__(self, table: nn.Embedding, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.tokens = table
        self.scale = math.sqrt(table.embedding_dim)
        self.padding_index = int(table.padding_idx or 0)
        self.positions = SinusoidalPositions(table.embedding_dim, max_positions, self.padding_index)
        self.dropout = dropout

    def padding(self, tokens: Tensor) -> Tensor:
        """[B, S] bool, true at padding."""
        return tokens.eq(self.padding_index)

    def forward(self, tokens: Tensor, start: int = 0, padding: Tensor | None = None) -> Tensor:
        """tokens [B, S] → [B, S, d]; ``padding`` only where it may stand on the left."""
        x = torch.add(self.positions(tokens.shape[1], start, padding), self.tokens(tokens), alpha=self.scale)
        return dropout(x, self.dropout, self.training)
