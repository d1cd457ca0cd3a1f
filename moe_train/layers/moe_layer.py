"""MoELayer: the public sparse layer, for use in any torch model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moe_train.kernels.device_kernels import DeviceKernels
from moe_train.layers.batch_context import BatchInfo, RoutingSettings, batch_context
from moe_train.layers.block import RoutingRecord
from moe_train.layers.registry import BlockInputs, build_block
from moe_train.layers.seeding import seeded
from moe_train.routing.balance_losses import WorldSums
from moe_train.routing.context import RankReduction
from moe_train.routing.registry import routing_config

if TYPE_CHECKING:
    from moe_train.parallel.layout import ExpertLayout


class MoELayer(nn.Module):
    """A sparse feed-forward with any routing strategy::

        layer = MoELayer(dim=512, hidden=2048, routing={"name": "switch", "num_experts": 8})
        y, record = layer(x)                                # x, y: [batch, length, 512]
        loss = task_loss + record.total_loss

    The caller adds norm and residual, unless the strategy has its own (SMoE; see ``layer.owns_residual``).

    Args:
        dim: d.
        hidden: hidden width of an expert.
        routing: the strategy's name and keys, as in ``configs/routing``.
        activation: ``relu`` or ``gelu``.
        dropout: after the activation.
        layer: number of this block in the model; blocks with different numbers get different random numbers.
        seed: seed of initial weights and of counter-based random numbers.
        layout: which rank holds which experts; None: all are local.

    Raises:
        ConfigError: unknown strategy or key, or invalid value.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        routing: Mapping[str, Any],
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        layer: int = 0,
        seed: int = 1,
        layout: ExpertLayout | None = None,
    ) -> None:
        super().__init__()
        inputs = BlockInputs(
            dim, hidden, layer=layer, activation=activation, activation_dropout=dropout, seed=seed, layout=layout
        )
        self.settings = RoutingSettings(seed=seed)
        with seeded(seed, layer):
            self.block = build_block(routing_config(routing), inputs)

    @property
    def owns_residual(self) -> bool:
        """Whether y already contains x."""
        return self.block.owns_residual

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of optimizer updates done so far, for counter-based random numbers."""
        self.settings.update = num_updates

    def set_ranks(self, ranks: RankReduction) -> None:
        """Sets the reductions over the ranks that share the micro-batch."""
        self.settings.ranks = ranks

    def set_kernels(self, kernels: DeviceKernels) -> None:
        """Sets the Triton kernels in use (:func:`moe_train.kernels.device_kernels.select_kernels`)."""
        self.block.set_kernels(kernels)

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        token_ids: Tensor | None = None,
        sentence_uid: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Routes x and computes its experts.

        Args:
            x: [B, S, d].
            padding_mask: [B, S] bool, True at padding, which is not routed and gets 0.
            token_ids: [B, S], for hash routing.
            sentence_uid: [B], unique numbers of the sentences, for draws that do not depend on the batch.
            start: position of the first column.

        Returns:
            y [B, S, d] and the record of the routing (None for ``dense``).
        """
        context = batch_context(
            padding_mask,
            (x.shape[0], x.shape[1]),
            self.settings,
            BatchInfo(sentence_uid=sentence_uid),
            token_ids=token_ids,
            start=start,
            training=self.training,
            device=x.device,
        )
        y, record = self.block(x, context)
        if record is None:
            return y, None
        world = WorldSums(record.router_losses.values(), self.settings.ranks)
        return y, dataclasses.replace(record, world=world)
