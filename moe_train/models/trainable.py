"""The interface between the training loop and a model, apart from its forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from moe_train.kernels.device_kernels import DeviceKernels
from moe_train.kernels.varlen import VarlenAttention
from moe_train.routing.context import RankReduction
from moe_train.routing.types import RoutingStatistics


class TrainableModel(nn.Module):
    """Base class of models that the training loop trains. Every method does nothing by default.

    Attributes:
        pretrained: prefix of the tensor names that ``training.init_from`` loads; "": all tensors.
        takes_real_tokens: whether ``forward`` takes ``real_tokens``, the tokens of each input that are not padding.
    """

    pretrained: ClassVar[str] = ""
    takes_real_tokens: ClassVar[bool] = False

    def set_num_updates(self, num_updates: int) -> None:
        """Called before each update with the number of finished ones."""

    def set_ranks(self, ranks: RankReduction) -> RankReduction:
        """Sets the ranks that share a micro-batch, for the statistics of routers, and returns the former ones."""
        return ranks

    def set_recompute(self, recompute: bool) -> None:
        """Sets whether activations are recomputed in the backward pass instead of kept."""

    def set_kernels(self, kernels: DeviceKernels) -> None:
        """Sets the Triton kernels that sparse layers use."""

    def compile_routing(self, backend: str = "inductor") -> None:
        """Compiles routers and row plans with ``torch.compile``."""

    def set_packed(self, attention: VarlenAttention | None) -> None:
        """Sets the attention over packed rows, the tokens of a batch without padding; None: batches are padded."""

    def set_seed(self, seed: int) -> None:
        """Sets the seed of random routing."""

    def after_update(self, statistics: Mapping[int, RoutingStatistics]) -> None:
        """Called after each update.

        Args:
            statistics: number of a sparse block → its routing statistics, summed over micro-batches and ranks; zeros
                where the update was not applied.
        """
