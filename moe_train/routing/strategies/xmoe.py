"""``routing=xmoe``: routing on a low-dimensional hypersphere (X-MoE, Chi et al., NeurIPS 2022, arXiv 2204.09179, §3).

Tokens are projected, ``z = W h`` with d_e ≪ d, and scored by the cosine to each expert's embedding,
``s_i = z · e_i / (‖z‖ ‖e_i‖)`` (Eq. 6). The token goes to ``k = argmax s`` and its output is weighted by
``softmax(s / τ)_k`` or ``σ(s_k / τ)`` with a learnt temperature τ (Eq. 7). The balance loss uses ``softmax(s / τ₀)``
with a fixed τ₀ (§3.2). Low-dimensional scores in [-1, 1] prevent hidden states from collapsing onto expert embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.check import Range
from moe_train.errors import ConfigError
from moe_train.kernels.cpu.gate_scores import softmax
from moe_train.routing.base import RouterInputs, RoutingConfig
from moe_train.routing.context import RoutingContext
from moe_train.routing.gate import LinearGate, full_precision, linear_init, routing_dtype
from moe_train.routing.noise import jitter
from moe_train.routing.registry import register
from moe_train.routing.strategies.top_k import SecondExpert, select, skip_second
from moe_train.routing.token_choice import RouterScores, TokenChoiceConfig, TokenChoiceRouter
from moe_train.routing.types import Routing

BALANCE_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}  # §4.1
TORCHSCALE_DIM = 16
SMALLEST_TEMPERATURE = 1e-4
Temperature = Annotated[float, Range(least=SMALLEST_TEMPERATURE, most=1e12)]


@dataclass(frozen=True)
class XMoEConfig(TokenChoiceConfig):
    """Keys in addition to those of all token-choice strategies.

    Attributes:
        mode: ``paper``, or ``torchscale`` as in the released code: two experts per token with normalised weights, the
            second kept at random in training; z is not normalised (its length acts as a temperature); no learnt
            temperature; d_e = 16; the balance loss uses the gate's probabilities; a capacity is rounded as in fairseq,
            floor(factor · 2 · ceil(T / E)).
        gate: ``softmax`` or ``sigmoid`` (paper mode).
        routing_dim: d_e; None: num_experts / 2 in paper mode (the best in Table 4), 16 in torchscale mode.
        balance_temperature: τ₀; None: 0.3 for softmax, 0.07 for sigmoid.
        initial_temperature: initial value of τ; None: τ₀.
    """

    name: str = "xmoe"
    mode: Literal["paper", "torchscale"] = "paper"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    routing_dim: Annotated[int | None, Range(above=0, most=2**20)] = None
    balance_temperature: Temperature | None = None
    initial_temperature: Temperature | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        temperatures = self.initial_temperature is not None or self.balance_temperature is not None
        if self.mode == "torchscale" and (self.gate != "softmax" or temperatures):
            raise ConfigError(
                "routing.mode=torchscale has no sigmoid gate and no temperature of gate or balance loss",
                remedy="set routing.mode=paper, or leave routing.gate and both temperatures alone",
            )
        if self.top_k > self.num_experts:
            raise ConfigError(
                "routing.mode=torchscale needs two experts", remedy="set routing.num_experts to 2 or more"
            )

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return 1 if self.mode == "paper" else 2

    @property
    def dim(self) -> int:
        """d_e."""
        default = max(self.num_experts // 2, 1) if self.mode == "paper" else TORCHSCALE_DIM
        return self.routing_dim or default

    @property
    def tau_0(self) -> float:
        """Temperature of the balance loss."""
        return self.balance_temperature or BALANCE_TEMPERATURE[self.gate]


@register("xmoe", XMoEConfig)
class XMoERouter(TokenChoiceRouter):
    """Cosine scores in d_e dimensions.

    Attributes:
        embedding: [E, d_e].
        log_temperature: 0-dim, log τ; torchscale mode has none.
    """

    def __init__(self, config: XMoEConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: XMoEConfig = config
        self.projection = LinearGate(inputs.dim, config.dim, linear_init)
        self.embedding = nn.Parameter(nn.init.orthogonal_(torch.empty(config.num_experts, config.dim), gain=0.32))
        self.capacity_rounding = "result" if config.mode == "paper" else "share"
        self.log_temperature = None
        if config.mode == "paper":
            initial = config.initial_temperature or config.tau_0
            self.log_temperature = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]."""
        if self.config.jitter:
            x = jitter(x, self.config.jitter, context)
        cosine = self.scores(x)
        if self.config.mode == "torchscale":
            return self.torchscale_routing(cosine, context)
        logits = cosine / self.temperature
        gates = torch.sigmoid(logits) if self.config.gate == "sigmoid" else softmax(logits)
        choices = cosine.detach().argmax(dim=-1, keepdim=True)
        balanced = softmax(cosine / self.config.tau_0)
        return self.build_routing(RouterScores(logits, balanced), choices, gates.gather(1, choices), context)

    def scores(self, x: Tensor) -> Tensor:
        """Scores [T, E] of x [T, d]: cosines in [-1, 1]; in torchscale mode cosines times ‖z‖."""
        z = self.projection(x)
        with full_precision(x):
            embedding = F.normalize(self.embedding.to(routing_dtype(x)), dim=-1)
            return F.linear(z if self.config.mode == "torchscale" else F.normalize(z, dim=-1), embedding)

    @property
    def temperature(self) -> Tensor:
        """τ, 0-dim; its logarithm is the parameter, so that τ stays positive."""
        assert self.log_temperature is not None
        return self.log_temperature.exp().clamp(min=SMALLEST_TEMPERATURE)

    def torchscale_routing(self, logits: Tensor, context: RoutingContext) -> Routing:
        """Top-2 softmax as in torchscale's recipes; at evaluation the second expert is always used."""
        gates = softmax(logits)
        policy: SecondExpert = "random" if context.training else "all"
        choices = select(gates.detach(), logits.detach(), 2, policy, context)
        weights = gates.gather(1, choices)
        if policy == "random":
            choices = skip_second(choices, weights.detach(), "before_drop", context)
        return self.build_routing(RouterScores(logits, gates), choices, weights, context, "before_drop")

    def may_skip_choices(self, context: RoutingContext) -> bool:
        """True in torchscale mode, which skips second experts at random."""
        return self.config.mode == "torchscale" and context.training

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One; two in torchscale mode."""
        assert isinstance(config, XMoEConfig)
        return float(config.top_k)

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """The projection and the cosines."""
        assert isinstance(config, XMoEConfig)
        return 2.0 * config.dim * (dim + config.num_experts)
