"""Base of models with sparse blocks: passes the training loop's settings on to their routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from moe_train.layers.batch_context import RoutingSettings
from moe_train.layers.block import Block
from moe_train.layers.stack import DecoderStack, EncoderStack
from moe_train.models.trainable import TrainableModel
from moe_train.routing.base import Router
from moe_train.routing.context import RankReduction
from moe_train.routing.types import RoutingStatistics


@dataclass(frozen=True)
class ModelParts:
    """What a model's FLOPs are counted by.

    Attributes:
        flops_input, flops_output: per token, of the products before and after the layers.
    """

    encoder: EncoderStack
    decoder: DecoderStack | None
    flops_input: float
    flops_output: float


class RoutedModel(TrainableModel):
    """Mixed into models; ``settings`` is what their routers share."""

    settings: RoutingSettings

    def parts(self) -> ModelParts:
        """Its stacks, and the products around them."""
        raise NotImplementedError

    def set_num_updates(self, num_updates: int) -> None:
        """Optimizer updates done so far, for counted draws."""
        self.settings.update = num_updates

    def set_seed(self, seed: int) -> None:
        """The seed of counted draws (an evaluation may want its own)."""
        self.settings.seed = seed

    def set_ranks(self, ranks: RankReduction) -> None:
        """Who shares the micro-batch."""
        self.settings.ranks = ranks

    def after_update(self, statistics: Mapping[int, RoutingStatistics]) -> None:
        """Hands each sparse block's counts of an optimizer update, summed over the world, to its router.

        Args:
            statistics: by the block's number; what learns from loads (a balancing bias) moves.
        """
        for block in self.modules():
            router, layer = getattr(block, "router", None), int(getattr(block, "layer", -1))
            if isinstance(block, Block) and isinstance(router, Router) and layer in statistics:
                router.after_update(statistics[layer])

    def set_recompute(self, recompute: bool) -> None:
        """Whether each layer's activations are computed again in the backward pass instead of kept."""
        for stack in stacks(self):
            stack.recompute = recompute


def block_names(model: nn.Module) -> dict[int, str]:
    """Where each sparse block stands, by its number: ``encoder layer 1``; layers count from 0, as in the config.

    A block that is inserted is named by the layer that it follows (``after encoder layer 1``).
    """
    names: dict[int, str] = {}
    for stack in stacks(model):
        side = "decoder" if isinstance(stack, DecoderStack) else "encoder"
        for index, layer in enumerate(stack.layers):
            place = f"{side} layer {index}"
            for name, block in layer.named_modules():
                if isinstance(block, Block) and (number := int(getattr(block, "layer", -1))) >= 0:
                    names[number] = f"after {place}" if name.startswith("inserted") else place
    return names


def stacks(model: nn.Module) -> Iterator[EncoderStack | DecoderStack]:
    """The stacks of layers of a model."""
    for module in model.modules():
        if isinstance(module, (EncoderStack, DecoderStack)):
            yield module
