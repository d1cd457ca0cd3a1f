"""The dense position-wise feed-forward (Vaswani et al., 2017, §3.3)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.kernels.cpu.dropout import dropout
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Block, RoutingRecord
from moe_train.layers.linear import feed_forward, linear
from moe_train.layers.registry import BlockInputs, register_kind
from moe_train.routing.base import RoutingConfig


class FeedForward(Block):
    """W2 · dropout(act(W1 x + b1)) + b2. Initialised like ``nn.Linear``, as in fairseq 0.12.2."""

    computes_in_16_bits: ClassVar[bool] = True

    def __init__(self, dim: int, hidden: int, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor, context: BatchContext | None = None) -> tuple[Tensor, RoutingRecord | None]:
        """x [..., d] → (y [..., d], None)."""
        relu, dropped = self.activation == "relu", self.dropout and self.training
        if relu and not dropped:
            return feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias), None
        h = linear(x, self.fc1.weight, self.fc1.bias, relu)
        if not relu:
            h = F.gelu(h)
        if dropped:
            h = dropout(h, self.dropout)
        return linear(h, self.fc2.weight, self.fc2.bias), None


@register_kind("dense")
def build_feed_forward(config: RoutingConfig, inputs: BlockInputs) -> FeedForward:
    """The dense kind; ``config`` is not used."""
    return FeedForward(inputs.dim, inputs.ffn_dim, inputs.activation, inputs.activation_dropout)
