"""Sinusoidal positions, identical to fairseq's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_train.errors import DataError


def sinusoids(rows: int, dim: int) -> Tensor:
    """[rows, dim]: sines in the first half, cosines in the second (tensor2tensor's layout, which fairseq follows)."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(rows, dtype=torch.float32).unsqueeze(1) * rates
    table = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((table, torch.zeros(rows, dim - 2 * half)), dim=1)


class SinusoidalPositions(nn.Module):
    """Table of sinusoidal positions, numbered from ``padding_index + 1`` as in fairseq."""

    table: Tensor

    def __init__(self, dim: int, max_positions: int, padding_index: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        table = sinusoids(padding_index + 1 + max_positions, dim)[padding_index + 1 :]
        self.register_buffer("table", table.contiguous(), persistent=False)

    def forward(self, length: int, start: int = 0, padding: Tensor | None = None) -> Tensor:
        """Positions of ``length`` columns from ``start``: [S, d], or [B, S, d] if ``padding`` [B, S] is given.

        Raises:
            DataError: beyond ``max_positions``.
        """
        if start + length > self.max_positions:
            raise DataError(
                f"a sentence of {start + length} tokens is longer than the model's {self.max_positions} positions",
                remedy="leave such sentences out, or train with a larger model.max_positions",
            )
        if padding is None:
            return self.table[start : start + length]
        order = ((~padding).cumsum(1) - 1).clamp_(min=0)
        return self.table.index_select(0, order.view(-1)).view(*padding.shape, -1)
