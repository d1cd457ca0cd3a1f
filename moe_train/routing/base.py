"""The base class of routers, and the keys that every strategy's config shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from moe_train.config import check
from moe_train.config.check import NonNegativeFloat, PositiveInt, Range
from moe_train.errors import ConfigError
from moe_train.routing.context import RoutingContext
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.types import Routing, RoutingStatistics

Experts = Annotated[int, Range(above=0, most=2**20)]  # or how many of them
LayerKind = Literal["dense", "sparse", "stratified", "soft"]


class ExpertPlacement(Protocol):
    """What a strategy may know of a layout: :class:`moe_train.parallel.layout_plan.LayoutPlan` is one."""

    @property
    def expert_parallel(self) -> int:
        """Ranks over which the experts are divided."""

    def split_groups(self, num_experts: int, num_groups: int) -> str | None:
        """What to say where equal groups of experts do not stay whole on their ranks."""


@dataclass(frozen=True)
class RoutingConfig:
    """Keys that all strategies have; each strategy adds its own in its own file.

    Attributes:
        name: the strategy.
        num_experts: E, experts of one sparse layer (in all, over all ranks).
        expert_ffn_dim: hidden width of an expert; None takes ``model.ffn_dim``.
        expert_sublayers: residual feed-forward sub-layers that make up one expert (X-MoE and BASE: 3).
        passes: forward passes over the batch in training, done as one over the repeated batch (THOR: 2).
        consistency_weight: α of the symmetric divergence between the passes (THOR; R-Drop with one expert).
        frozen: routers and experts of the sparse layers keep their values (X-MoE §3.3, for fine-tuning); auxiliary
            losses stay on, and then train the layers below.
        decoder: what the decoder uses instead, as a strategy's name or a mapping of its keys; None: the same.

    Class attributes:
        layout_keys: keys that may say ``rank`` or ``node`` until :func:`moe_train.routing.registry.resolve` makes them
            the number of these at the first launch.
        evaluation_keys: keys that change nothing of what was trained, so that an evaluation may set them anew
            (:mod:`moe_train.routing.inference_overrides`).
        unrecorded: keys, None by default, that earlier versions did not have, with what these did where that is not
            what None means now: so goes on a run that does not record such a key.
    """

    layout_keys: ClassVar[tuple[str, ...]] = ()
    evaluation_keys: ClassVar[tuple[str, ...]] = ()
    unrecorded: ClassVar[Mapping[str, Any]] = {}

    name: str = ""
    num_experts: Experts = 8
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

    def layout_warning(self, spread: ExpertPlacement) -> str | None:
        """What works under a layout that divides the experts, but perhaps not as it was meant."""
        return None

    def of_length(self, tokens: int) -> RoutingConfig:
        """The config where every sentence has this many tokens, as an image's patches are; most need not know it."""
        return self

    @property
    def draws_at_inference(self) -> bool:
        """Whether experts are drawn at inference too, so that other seeds give other outputs (``draw_seed``)."""
        return False

    @property
    def has_shared_expert(self) -> bool:
        """Whether one more expert stands beside the routed ones, which every token passes."""
        return False

    @property
    def expert_groups(self) -> int | None:
        """Equal groups of experts of which a token's experts all stand in one; None: there are no groups."""
        return None


@dataclass(frozen=True)
class RouterInputs:
    """What a router is built from, besides its config.

    Attributes:
        dim: d, width of the tokens it sees.
        layer: number of its sparse block.
        seed: for tables that are drawn once (hash).
        token_frequency: [V] counts of the training text per vocabulary id, where known (hash balances by it).
        vocabulary: V, 0 where there are no token ids (images).
    """

    dim: int
    layer: int = 0
    seed: int = 1
    token_frequency: Tensor | None = None
    vocabulary: int = 0


class Router(nn.Module):
    """Tokens → :class:`Routing`. Subclasses are registered by :func:`moe_train.routing.registry.register`.

    Class attributes:
        layer_kind: which layer composes it with the experts.
        causal: false where an output depends on later tokens, which a decoder must not.
    """

    layer_kind: ClassVar[LayerKind] = "sparse"
    causal: ClassVar[bool] = True

    def __init__(self, config: RoutingConfig, inputs: RouterInputs) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]. Scores are computed in fp32 whatever the precision of x."""
        raise NotImplementedError

    def after_update(self, statistics: RoutingStatistics) -> None:
        """Called once per optimizer update with statistics summed over the world; for what learns from loads."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves like any module, but stays in fp32 where the model around it goes to a 16-bit type."""

        def in_full_precision(value: Tensor) -> Tensor:
            moved = fn(value)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return value.to(moved.device) if half else moved

        super()._apply(in_full_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """Expected pairs per token at inference, for the FLOPs in closed form (uniform routing where it varies)."""
        raise NotImplementedError

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """FLOPs of the scores per token (multiply-adds count as two)."""
        return 2.0 * dim * config.num_experts

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """How training's tokens spread over the experts where loads are equal, one forward pass over the batch."""
        return (ExpectedChoices(1.0, 0, config.num_experts, round(cls.experts_per_token(config))),)

    @classmethod
    def max_experts_per_token(cls, config: RoutingConfig) -> int:
        """Experts that a token has at most in training, in one call of the pool."""
        choices = cls.expected_choices(config)
        return max(config.num_experts if c.independent else round(c.picks) for c in choices)

    @classmethod
    def max_load_share(cls, config: RoutingConfig, parts: int) -> float:
        """Expected share of a layer's rows that the fullest of ``parts`` equal parts of the experts gets in training.

        1 / parts where tokens choose apart from one another.
        """
        return 1.0 / parts

    @classmethod
    def check_decoder(cls, config: RoutingConfig) -> None:
        """Raises ConfigError where the strategy as configured would see future tokens in a decoder."""
        if not cls.causal:
            raise ConfigError(
                f"routing={config.name} looks at later tokens, which a decoder must not see",
                remedy="name what the decoder uses instead, e.g. routing.decoder=top_k, "
                "or set model.decoder_sparse_layers=none",
            )
