"""Makes sparse blocks dense whose router gives every token the same expert (THOR with ``inference=fixed``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.experts.parameters import StackedFeedForward
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.sparse import SparseLayer
from moe_train.models.routed import RoutedModel


def fix_experts(model: RoutedModel) -> None:
    """Replaces each sparse block that has one expert for all tokens at inference by a feed-forward of that expert.

    The function of the model in eval mode is the same; the other experts' parameters are gone. Blocks stay as they are
    if their experts are divided over ranks, or are more than a feed-forward with biases.
    """
    for parent in list(model.modules()):
        for name, block in parent.named_children():
            if isinstance(block, SparseLayer):
                expert = block.router.fixed_expert(model.settings.seed, block.layer)
                if expert is not None and _is_plain(block):
                    setattr(parent, name, _dense(block, expert))


def _is_plain(block: SparseLayer) -> bool:
    spec = block.pool.spec
    whole = not block.pool.levels and block.shared is None and not block.owns_norm
    return whole and spec.sublayers == 1 and spec.bias


@torch.no_grad()
def _dense(block: SparseLayer, expert: int) -> FeedForward:
    (stack,) = block.pool.sublayers
    assert isinstance(stack, StackedFeedForward)
    spec = block.pool.spec
    dense = FeedForward(spec.dim, spec.hidden, spec.activation, spec.dropout).train(block.training)
    # Pools compute x @ W, nn.Linear x @ W.T.
    for layer, weight, bias in (
        (dense.fc1, stack.fc1_weight, stack.fc1_bias),
        (dense.fc2, stack.fc2_weight, stack.fc2_bias),
    ):
        layer.weight = _parameter(weight[expert].t())
        assert bias is not None
        layer.bias = _parameter(bias[expert])
    return dense


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
