"""Stacked weights of a pool's local experts, one module per sub-layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_train.experts.spec import ExpertSpec


class StackedFeedForward(nn.Module):
    """Parameters of one feed-forward sub-layer of E local experts; computes nothing itself.

    Attributes:
        fc1_weight: [E, d, h], used as x @ W.
        fc1_bias: [E, h] or None.
        fc2_weight: [E, h, d].
        fc2_bias: [E, d] or None.
        norm_weight, norm_bias: [E, d] or None.
    """

    computes_in_16_bits: ClassVar[bool] = True
    fc1_bias: nn.Parameter | None
    fc2_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, spec: ExpertSpec, num_local: int) -> None:
        super().__init__()
        self.spec = spec
        self.fc1_weight = _expert_parameter(num_local, spec.dim, spec.hidden)
        self.fc2_weight = _expert_parameter(num_local, spec.hidden, spec.dim)
        for name, width, wanted in (
            ("fc1_bias", spec.hidden, spec.bias),
            ("fc2_bias", spec.dim, spec.bias),
            ("norm_weight", spec.dim, spec.norm),
            ("norm_bias", spec.dim, spec.norm),
        ):
            self.register_parameter(name, _expert_parameter(num_local, width) if wanted else None)

    @torch.no_grad()
    def reset(self, row: int, generator: torch.Generator | None) -> None:
        """Draws the weights of local expert ``row``."""
        for name, fan_in, fan_out in (
            ("fc1", self.spec.dim, self.spec.hidden),
            ("fc2", self.spec.hidden, self.spec.dim),
        ):
            xavier = self.spec.init == "xavier"
            bound = math.sqrt(6.0 / (fan_in + fan_out)) if xavier else 1.0 / math.sqrt(fan_in)
            _uniform(getattr(self, f"{name}_weight")[row], bound, generator)
            if self.spec.bias:
                _uniform(getattr(self, f"{name}_bias")[row], 0.0 if xavier else bound, generator)
        if self.spec.zero_output:
            self.fc2_weight[row].zero_()
            if self.fc2_bias is not None:
                self.fc2_bias[row].zero_()
        if self.norm_weight is not None and self.norm_bias is not None:
            self.norm_weight[row].fill_(1.0)
            self.norm_bias[row].zero_()


def initialise(stacks: Sequence[StackedFeedForward], expert_ids: Sequence[int]) -> None:
    """Initialises every local expert from its own generator, seeded by its global id.

    Exactly one number is drawn from torch's default generator under any layout, so expert e starts with the same
    weights on one process and on many, if all use the same seed.
    """
    base = int(torch.randint(2**62, (), device="cpu").item())
    device = stacks[0].fc1_weight.device
    if device.type == "meta":
        return
    for row, expert in enumerate(expert_ids):
        generator = torch.Generator(device=device).manual_seed((base + 0x9E3779B97F4A7C15 * (expert + 1)) % 2**63)
        for stack in stacks:
            stack.reset(row, generator)


def _expert_parameter(*shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape))
    parameter.expert = True  # type: ignore[attr-defined]
    return parameter


def _uniform(weight: Tensor, bound: float, generator: torch.Generator | None) -> None:
    weight.uniform_(-bound, bound, generator=generator) if bound else weight.zero_()
