"""``routing=soft_moe``: Soft MoE (Puigcerver et al., ICLR 2024, arXiv 2308.00951, §2).

For each sentence X [m, d], with n experts of p slots each and slot vectors Φ [d, n·p]:

    logits = scale · l2norm(X) l2norm(Φ)       D = softmax over tokens       C = softmax over slots
    slots = Dᵀ X       outputs = f_{slot // p}(slots)       Y = C · outputs

Every token contributes to every slot: there are no drops and no balance loss, and every output depends on the whole
sentence, so decoders reject it. The mixes are applied in :mod:`moe_train.layers.soft`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_train.config.check import PositiveInt, Range
from moe_train.errors import ConfigError
from moe_train.routing.base import ExpertCount, LayerKind, Router, RouterInputs, RoutingConfig
from moe_train.routing.constant_routing import constant_routing
from moe_train.routing.context import RoutingContext
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.gate import full_precision, routing_dtype
from moe_train.routing.registry import register
from moe_train.routing.types import Routing

EPSILON = 1e-6


@dataclass(frozen=True)
class SoftMoEConfig(RoutingConfig):
    """Keys of Soft MoE.

    Attributes:
        slots_per_expert: p.
        num_slots: n·p, instead of ``slots_per_expert``.
        normalisation: ``paper`` divides by ‖x‖ + 1e-6 (Algorithm 2), ``official`` by sqrt(‖x‖² + 1e-6) (the released
            code), ``none`` uses plain products (Appendix E: softmaxes collapse as d grows). Slot vectors start with
            length 1; with ``official`` 1/√n, as in the released code.
        decayed: the router parameter with weight decay: the ``scale`` (as in the released configs) or the ``slots`` Φ.
            None: the scale; the slots in runs started by an earlier version.
        identical_experts: all experts start with the same weights, as in the released configs.
        expected_tokens: tokens of a typical sentence, for the number of slots if it is not set, and for closed-form
            FLOPs.
    """

    unrecorded: ClassVar[Mapping[str, Any]] = {"decayed": "slots"}
    name: str = "soft_moe"
    slots_per_expert: ExpertCount | None = None
    num_slots: Annotated[int | None, Range(above=0, most=2**24)] = None
    normalisation: Literal["paper", "official", "none"] = "paper"
    decayed: Literal["scale", "slots"] | None = None
    identical_experts: bool = False
    expected_tokens: PositiveInt = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots_per_expert is not None and self.num_slots is not None:
            raise ConfigError(
                "routing.slots_per_expert and routing.num_slots say the same thing twice",
                remedy="set one of them to null",
            )
        if self.num_slots is not None and self.num_slots % self.num_experts:
            raise ConfigError(
                f"routing.num_slots={self.num_slots} is not divisible by routing.num_experts={self.num_experts}",
                remedy="choose a number of slots that the experts divide",
            )

    def of_length(self, tokens: int) -> SoftMoEConfig:
        """With ``expected_tokens`` set to that number."""
        return dataclasses.replace(self, expected_tokens=tokens)

    @property
    def p(self) -> int:
        """Slots per expert; if not set, so that there are about ``expected_tokens`` slots, at least 1 per expert."""
        if self.num_slots is not None:
            return self.num_slots // self.num_experts
        return self.slots_per_expert or max(1, round(self.expected_tokens / self.num_experts))

    @property
    def slots(self) -> int:
        """n·p, slots per sentence."""
        return self.p * self.num_experts


@dataclass(frozen=True)
class SoftMixes:
    """Attributes:
    dispatch: [B, m, s], sums to 1 over real tokens; 0 at padding.
    combine: [B, m, s], sums to 1 over slots; 0 at padding.
    """

    dispatch: Tensor
    combine: Tensor


@register("soft_moe", SoftMoEConfig)
class SoftMoERouter(Router):
    """Computes the weights that mix tokens into slots and slots into tokens.

    Attributes:
        phi: [s, d], one slot per row; the p slots of an expert are contiguous. Initialised with standard deviation
            1/√d, or 1/√(n·d) with ``official``: the released code uses the fan-in of [d, n, p].
        scale: 0-dim, initialised to 1.
    """

    layer_kind: ClassVar[LayerKind] = "soft"
    causal: ClassVar[bool] = False

    def __init__(self, config: SoftMoEConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: SoftMoEConfig = config
        fan_in = inputs.dim * (config.num_experts if config.normalisation == "official" else 1)
        self.phi = nn.Parameter(lecun_normal(torch.empty(config.slots, inputs.dim), fan_in))
        self.scale = nn.Parameter(torch.ones(()))
        self.phi.decays = config.decayed == "slots"  # type: ignore[attr-defined]
        self.scale.decays = not self.phi.decays  # type: ignore[attr-defined]

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, m, s], fp32 (fp64 for fp64), of x [B, m, d]."""
        dtype = routing_dtype(x)
        with full_precision(x):
            tokens, slots = self.normalised(x.to(dtype)), self.normalised(self.phi.to(dtype))
            return (tokens @ slots.t()) * self.scale.to(dtype)

    def normalised(self, x: Tensor) -> Tensor:
        """Rows scaled to length (nearly) 1."""
        if self.config.normalisation == "none":
            return x
        if self.config.normalisation == "official":
            return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / (norm + EPSILON)

    def mixes(self, x: Tensor, padding: Tensor | None) -> SoftMixes:
        """Dispatch and combine weights of x [B, m, d]; ``padding`` [B, m] is True at padding."""
        logits = self.logits(x)
        combine = torch.softmax(logits, dim=2)
        if padding is None:
            return SoftMixes(torch.softmax(logits, dim=1), combine)
        absent = padding.unsqueeze(2)
        # A finite minimum instead of -inf: a sentence that is all padding must not become NaN.
        dispatch = torch.softmax(logits.masked_fill(absent, torch.finfo(logits.dtype).min), dim=1)
        return SoftMixes(dispatch.masked_fill(absent, 0.0), combine.masked_fill(absent, 0.0))

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Routes slots x [B·s, d], ordered by sentence: slot i of a sentence to expert i // p with weight 1."""
        slot = torch.arange(x.shape[0], device=x.device) % self.config.slots
        return constant_routing(x, (slot // self.config.p).unsqueeze(1), self.num_experts)

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """Slots per token in a sentence of ``expected_tokens`` tokens."""
        assert isinstance(config, SoftMoEConfig)
        return config.slots / config.expected_tokens

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """Rows are slots, each assigned to one expert."""
        return (ExpectedChoices(cls.experts_per_token(config), 0, config.num_experts, 1),)

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """FLOPs of logits, dispatch and combine."""
        assert isinstance(config, SoftMoEConfig)
        return 6.0 * dim * config.slots


def lecun_normal(weight: Tensor, fan_in: int) -> Tensor:
    """Truncated normal with std sqrt(1 / fan_in), as in flax."""
    std = math.sqrt(1 / fan_in) / 0.87962566103423978  # std of a standard normal truncated at two
    with torch.no_grad():
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
