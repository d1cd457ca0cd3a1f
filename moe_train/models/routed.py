"""Base of models with sparse blocks: passes the training loop's settings on to their routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from moe_train.kernels.device_kernels import DeviceKernels
from moe_train.kernels.varlen import VarlenAttention
from moe_train.layers.batch_context import RoutingSettings
from moe_train.layers.block import Block
from moe_train.layers.stack import DecoderStack, EncoderStack
from moe_train.models.trainable import TrainableModel
from moe_train.routing.base import Router
from moe_train.routing.context import RankReduction
from moe_train.routing.types import RoutingStatistics


@dataclass(frozen=True)
class ModelParts:
    """Parts of a model for counting FLOPs.

    Attributes:
        flops_input, flops_output: FLOPs per token of the products before and after the layers.
    """

    encoder: EncoderStack
    decoder: DecoderStack | None
    flops_input: float
    flops_output: float


class RoutedModel(TrainableModel):
    """Base class; ``settings`` are shared by all routers."""

    settings: RoutingSettings

    def parts(self) -> ModelParts:
        """Stacks, and FLOPs of the products before and after them."""
        raise NotImplementedError

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of optimizer updates done so far, for counter-based random numbers."""
        self.settings.update = num_updates

    def set_seed(self, seed: int) -> None:
        """Sets the seed of counter-based random numbers (an evaluation may use another)."""
        self.settings.seed = seed

    def set_ranks(self, ranks: RankReduction) -> RankReduction:
        """Sets the reductions over the ranks that share the micro-batch, and returns the former."""
        former, self.settings.ranks = self.settings.ranks, ranks
        return former

    def after_update(self, statistics: Mapping[int, RoutingStatistics]) -> None:
        """Calls ``after_update`` of each router, which may adapt to loads (a balancing bias).

        Args:
            statistics: counts of an optimizer update, summed over all ranks, by the number of the sparse block.
        """
        for block in self.modules():
            router, layer = getattr(block, "router", None), int(getattr(block, "layer", -1))
            if isinstance(block, Block) and isinstance(router, Router) and layer in statistics:
                router.after_update(statistics[layer])

    def set_recompute(self, recompute: bool) -> None:
        """Sets whether each layer's activations are recomputed in backward instead of kept."""
        for stack in stacks(self):
            stack.recompute = recompute

    def set_kernels(self, kernels: DeviceKernels) -> None:
        """Sets the Triton kernels that sparse layers use."""
        for block in self.modules():
            if isinstance(block, Block):
                block.set_kernels(kernels)

    def compile_routing(self, backend: str = "inductor") -> None:
        """Compiles routers and row plans with ``torch.compile``; the exchange and the experts stay as they are.

        torch's settings for shapes that depend on data are switched on for the process: with drops the number of pairs
        is one.
        """
        from torch._dynamo import config  # takes seconds

        config.capture_dynamic_output_shape_ops = True
        config.capture_scalar_outputs = True
        for block in self.modules():
            if isinstance(block, Block):
                block.compile_routing(backend)

    def set_packed(self, attention: VarlenAttention | None) -> None:
        """Sets the attention over packed rows, with which text batches that it takes are packed."""
        for stack in stacks(self):
            stack.varlen = attention


def block_names(model: nn.Module) -> dict[int, str]:
    """Position of each sparse block by its number: ``encoder layer 1``; layers are numbered from 0, as in the config.

    An inserted block is named after the layer before it (``after encoder layer 1``).
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
