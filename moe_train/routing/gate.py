"""The gate: a linear map from tokens to scores, computed in at least fp32.

Routing in half precision is unstable (Fedus et al., 2022, §2.4 "selective precision"), so autocast is disabled here and
half-precision inputs and weights are cast to fp32. fp64 stays fp64, for gradient checks and parity tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.kernels.cpu import gate_scores

Initialiser = Callable[[Tensor], Any]


def routing_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is disabled on x's device."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def switch_init(weight: Tensor) -> Tensor:
    """Truncated normal of std sqrt(0.1 / d), cut at two std (Fedus et al., 2022, §2.4)."""
    std = math.sqrt(0.1 / weight.shape[1])
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear_init(weight: Tensor) -> Tensor:
    """The default of ``nn.Linear``, which fairseq's gates use."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class LinearGate(nn.Module):
    """Scores of tokens: ``x Wᵀ (+ b)``.

    Args:
        dim: d.
        outputs: E, scores per token.
        init: fills the weight [E, d].
        bias: add a bias, initialised to 0 (SAM).
    """

    def __init__(self, dim: int, outputs: int, init: Initialiser = linear_init, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, dim))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the weight, and sets the bias to 0."""
        with torch.no_grad():
            self.init(self.weight)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Scores [T, E], fp32 (fp64 for fp64), of x [T, d]."""
        if x.dtype == torch.bfloat16 and gate_scores.is_supported(x, self.weight):
            return gate_scores.scores(x, self.weight, self.bias)
        dtype = routing_dtype(x)
        with full_precision(x):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def scores_of_gates(gates: Sequence[LinearGate], x: Tensor) -> Sequence[Tensor]:
    """The scores of several gates without biases, of x [T, d]; where a C kernel reads x, in one pass over it."""
    weights: list[Tensor] = [gate.weight for gate in gates]
    sizes = [weight.shape[0] for weight in weights]
    if x.dtype != torch.bfloat16 or not gate_scores.is_supported(x, weights[0].new_empty(sum(sizes), 0)):
        return [gate(x) for gate in gates]
    return torch.split(gate_scores.scores(x, torch.cat(weights), None), sizes, dim=1)
