"""Registry of layer kinds by name. A strategy's ``layer_kind`` selects the layer that combines router and experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.layers.block import Block
from moe_train.routing.base import RouterInputs, RoutingConfig
from moe_train.routing.registry import strategy

if TYPE_CHECKING:
    from moe_train.parallel.layout import ExpertLayout


@dataclass(frozen=True)
class BlockInputs:
    """Arguments of a block's builder, in addition to the strategy's config.

    Attributes:
        dim: d.
        ffn_dim: hidden width of the dense feed-forward, and of an expert unless the strategy sets another.
        layer: number of the sparse block in the model, encoder first.
        activation: ``relu`` or ``gelu``.
        activation_dropout: dropout after the activation.
        dropout: dropout of the residual branch, for kinds that own their residuals.
        seed: seed of the run.
        layout: which rank holds which experts; None: all are local.
        token_frequency: [V] counts of the training text, if known.
        vocabulary: V; 0 if there are no token ids.
    """

    dim: int
    ffn_dim: int
    layer: int = 0
    activation: str = "relu"
    activation_dropout: float = 0.0
    dropout: float = 0.0
    seed: int = 1
    layout: ExpertLayout | None = None
    token_frequency: Tensor | None = None
    vocabulary: int = 0

    def for_router(self) -> RouterInputs:
        """The part that a router's constructor needs."""
        return RouterInputs(self.dim, self.layer, self.seed, self.token_frequency, self.vocabulary)

    def expert_spec(self, config: RoutingConfig) -> ExpertSpec:
        """The shape of one expert."""
        return ExpertSpec(
            self.dim,
            config.expert_ffn_dim or self.ffn_dim,
            sublayers=config.expert_sublayers,
            activation=self.activation,  # type: ignore[arg-type]
            dropout=self.activation_dropout,
        )


def build_pool(config: RoutingConfig, inputs: BlockInputs) -> ExpertPool:
    """The expert pool of a block."""
    max_experts = strategy(config.name).router.max_experts_per_token(config)
    return ExpertPool(inputs.expert_spec(config), config.num_experts, inputs.layout, max_experts)


BlockBuilder = Callable[[RoutingConfig, BlockInputs], Block]

_KINDS: dict[str, BlockBuilder] = {}


def register_kind(kind: str) -> Callable[[BlockBuilder], BlockBuilder]:
    """Decorator that registers a function (or class) as the builder of a kind.

    Raises:
        ValueError: the kind is already registered.
    """

    def decorate(builder: BlockBuilder) -> BlockBuilder:
        if kind in _KINDS:
            raise ValueError(f"the layer kind {kind!r} is registered twice")
        _KINDS[kind] = builder
        return builder

    return decorate


def kinds() -> Mapping[str, BlockBuilder]:
    """All registered layer kinds by name."""
    return dict(_KINDS)


def build_block(config: RoutingConfig, inputs: BlockInputs) -> Block:
    """Builds the block of the strategy; its parameters need no gradient if ``routing.frozen``."""
    block = _KINDS[strategy(config.name).router.layer_kind](config, inputs)
    return block.requires_grad_(not config.frozen)
