"""Layer kinds by name: a strategy's ``layer_kind`` says which kind composes its router with the experts."""

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
    """What a block is built from, besides the strategy's config.

    Attributes:
        dim: d.
        ffn_dim: hidden width of the dense feed-forward; an expert's unless the strategy says otherwise.
        layer: number of the sparse block in the model, encoder first.
        activation: ``relu`` or ``gelu``.
        activation_dropout: after the activation.
        dropout: of the residual branch, for kinds that own their residuals.
        seed: of the run.
        layout: which rank owns which expert; None: all here.
        token_frequency: [V] counts of the training text, where known.
        vocabulary: V, 0 where there are no token ids.
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
        """What a router needs of these."""
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
    """The experts of a block."""
    most = strategy(config.name).router.max_experts_per_token(config)
    return ExpertPool(inputs.expert_spec(config), config.num_experts, inputs.layout, most)


BlockBuilder = Callable[[RoutingConfig, BlockInputs], Block]

_KINDS: dict[str, BlockBuilder] = {}


def register_kind(kind: str) -> Callable[[BlockBuilder], BlockBuilder]:
    """Decorates the function (or class) that builds blocks of a kind.

    Raises:
        ValueError: the kind is taken.
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
    """The block that the strategy asks for; without gradients of its own where ``routing.frozen`` says so."""
    block = _KINDS[strategy(config.name).router.layer_kind](config, inputs)
    return block.requires_grad_(not config.frozen)
