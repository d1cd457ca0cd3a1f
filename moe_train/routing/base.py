"""Base classes of routers and of the strategies' configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from moe_train.config import check
from moe_train.config.check import NonNegativeFloat, PositiveInt, Range
from moe_train.errors import ConfigError
from moe_train.kernels.device_kernels import TORCH, DeviceKernels
from moe_train.routing.context import RoutingContext
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.types import Routing, RoutingStatistics

ExpertCount = Annotated[int, Range(above=0, most=2**20)]
LayerKind = Literal["dense", "sparse", "stratified", "soft"]


class ExpertPlacement(Protocol):
    """What a strategy may read of a layout. Implemented by :class:`moe_train.parallel.layout_plan.LayoutPlan`."""

    @property
    def expert_parallel(self) -> int:
        """Ranks over which the experts are divided."""

    def split_groups(self, num_experts: int, num_groups: int) -> str | None:
        """A warning if equal groups of experts are split over ranks, else None."""


@dataclass(frozen=True)
class RoutingConfig:
    """Keys of all strategies; each strategy adds its own keys in its file.

    Attributes:
        name: the strategy.
        num_experts: E, experts of one sparse layer, over all ranks.
        expert_ffn_dim: hidden width of an expert; None: ``model.ffn_dim``.
        expert_sublayers: residual feed-forward sub-layers of one expert (X-MoE and BASE: 3).
        passes: forward passes over the batch in training, computed as one pass over the repeated batch (THOR: 2).
        consistency_weight: α of the symmetric divergence between the passes (THOR; R-Drop with one expert).
        frozen: routers and experts of the sparse layers are not trained (X-MoE §3.3, for fine-tuning); auxiliary losses
            stay on and train the layers below.
        decoder: strategy of the decoder, as a name or a mapping of keys; None: the same as the encoder's.

    Class attributes:
        layout_keys: keys that may be ``rank`` or ``node``; :func:`moe_train.routing.registry.resolve` replaces these by
            the number of ranks or nodes at the first launch.
        evaluation_keys: keys that do not affect training, so that an evaluation may override them
            (:mod:`moe_train.routing.inference_overrides`).
        unrecorded: defaults for runs of earlier versions that do not record a key: key → the value that those versions
            used, for keys that are None by default and where None now means something else.
    """

    layout_keys: ClassVar[tuple[str, ...]] = ()
    evaluation_keys: ClassVar[tuple[str, ...]] = ()
    unrecorded: ClassVar[Mapping[str, Any]] = {}

    name: str = ""
    num_experts: ExpertCount = 8
    expert_ffn_dim: Annotated[int | None, Range(above=0, most=2**20)] = None
    expert_sublayers: Annotated[int, Range(above=0, most=1000)] = 1
    passes: PositiveInt = 1
    consistency_weight: NonNegativeFloat = 0.0
    frozen: bool = False
    decoder: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "routing")
        if self.passes not in (1, 2):
            raise ConfigError(f"routing.passes must be 1 or 2, not {self.passes}", remedy="THOR trains with 2")
        if self.consistency_weight and self.passes == 1:
            raise ConfigError("routing.consistency_weight compares two passes", remedy="set routing.passes=2")

    def layout_warning(self, placement: ExpertPlacement) -> str | None:
        """A warning if the strategy works under this layout but probably not as intended, else None."""
        return None

    def of_length(self, tokens: int) -> RoutingConfig:
        """The config for sentences of exactly this many tokens (the patches of an image). Default: unchanged."""
        return self

    @property
    def draws_at_inference(self) -> bool:
        """Whether experts are drawn at random at inference, so that outputs depend on ``draw_seed``."""
        return False

    @property
    def has_shared_expert(self) -> bool:
        """Whether there is one more expert that processes every token."""
        return False

    @property
    def expert_groups(self) -> int | None:
        """Number of equal groups of experts, if all experts of a token belong to one group; None: no groups."""
        return None


@dataclass(frozen=True)
class RouterInputs:
    """Arguments of a router's constructor, in addition to its config.

    Attributes:
        dim: d, width of a token.
        layer: number of its sparse block.
        seed: for tables that are drawn once (hash).
        token_frequency: [V] counts of the training text per vocabulary id, if known (hash balances by it).
        vocabulary: V; 0 if there are no token ids (images).
    """

    dim: int
    layer: int = 0
    seed: int = 1
    token_frequency: Tensor | None = None
    vocabulary: int = 0


class Router(nn.Module):
    """Tokens → :class:`Routing`. Subclasses are registered by :func:`moe_train.routing.registry.register`.

    Class attributes:
        layer_kind: the layer that combines it with the experts.
        causal: False if an output depends on later tokens, which is not allowed in a decoder.

    Attributes:
        kernels: the Triton kernels in use.
    """

    layer_kind: ClassVar[LayerKind] = "sparse"
    causal: ClassVar[bool] = True
    kernels: DeviceKernels = TORCH

    def __init__(self, config: RoutingConfig, inputs: RouterInputs) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]. Scores are computed in at least fp32."""
        raise NotImplementedError

    def fixed_expert(self, seed: int, layer: int) -> int | None:
        """The expert that every token of a layer has at inference, with weight 1; None: it differs between tokens.

        Args:
            seed: of the draws at inference.
            layer: number of the block in the model.
        """
        return None

    def after_update(self, statistics: RoutingStatistics) -> None:
        """Called once per optimizer update with statistics summed over all ranks, to adapt to loads."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves parameters between devices, but keeps them in fp32 when the model is cast to a 16-bit type."""

        def in_full_precision(value: Tensor) -> Tensor:
            moved = fn(value)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return value.to(moved.device) if half else moved

        super()._apply(in_full_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """Expected pairs per token at inference, for closed-form FLOPs (assuming uniform routing where it varies)."""
        raise NotImplementedError

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """FLOPs of the scores per token (multiply-adds count as two)."""
        return 2.0 * dim * config.num_experts

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """Distribution of tokens over experts in training with equal loads, for one forward pass over the batch."""
        return (ExpectedChoices(1.0, 0, config.num_experts, round(cls.experts_per_token(config))),)

    @classmethod
    def max_experts_per_token(cls, config: RoutingConfig) -> int:
        """Maximum number of experts of a token in training, in one call of the pool."""
        choices = cls.expected_choices(config)
        return max(config.num_experts if c.independent else round(c.picks) for c in choices)

    @classmethod
    def max_load_share(cls, config: RoutingConfig, parts: int) -> float:
        """Expected share of a layer's rows in the most loaded of ``parts`` equal parts of the experts, in training.

        1 / parts if tokens choose independently.
        """
        return 1.0 / parts

    @classmethod
    def check_decoder(cls, config: RoutingConfig) -> None:
        """Raises ConfigError if the strategy as configured depends on later tokens."""
        if not cls.causal:
            raise ConfigError(
                f"routing={config.name} looks at later tokens, which a decoder must not see",
                remedy="choose a strategy for the decoder, e.g. routing.decoder=top_k, "
                "or set model.decoder_sparse_layers=none",
            )
