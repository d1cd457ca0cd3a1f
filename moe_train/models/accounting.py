"""Total and active parameters, and FLOPs per token, in closed form from a model's modules (on any device, also meta).

What is counted, for comparison with papers:

- A multiply-add is two FLOPs. Only products with weights count (attention, feed-forward, experts, routers, output), not
  embedding look-ups, norms, biases, activations, softmax, or products of queries with keys (which grow with the
  length of the sentence).
- "Per token" is one source token through the encoder and one target token through the decoder and the output layer;
  keys and values of the source count once per source token. For encoder-only models it is one token through the model;
  the tokens of an image are its patches, and share its head.
- Sparse blocks count the experts per token that the strategy expects with uniform routing
  (``Router.experts_per_token``), or those measured in a run, if given.
- Active parameters are all parameters outside the experts, and the share of each pool that a token uses.

SMoE (Xu et al., 2023, tables 1 and 2) counts in the same way: parameters, and differences in FLOPs from the dense
model, agree within 1 %. Its absolute FLOPs (167 M for base and 506 M for big, with 32k words) exceed ours by 46 M and
88 M, terms of the dense model that the paper does not name and that are in all its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol, cast

from torch import nn

from moe_train.experts import ExpertPool
from moe_train.layers import CrossAttention, FeedForward, SelfAttention
from moe_train.layers.block import Block
from moe_train.models.routed import RoutedModel
from moe_train.routing import Router


class RoutedBlock(Protocol):
    """Attributes of every sparse block."""

    router: Router
    pool: ExpertPool
    layer: int
    owns_residual: bool


@dataclass(frozen=True)
class BlockAccount:
    """Size and cost of one sparse block.

    Attributes:
        layer: number of the block in the model, encoder first.
        strategy: name of its routing strategy.
        num_experts: E, over all ranks.
        experts_per_token: expected with uniform routing, or measured.
        parameters: parameters of all its experts.
        flops_experts, flops_router: FLOPs per token.
    """

    layer: int
    strategy: str
    num_experts: int
    experts_per_token: float
    parameters: int
    flops_experts: float
    flops_router: float


@dataclass(frozen=True)
class Accounting:
    """A model's size and cost.

    Attributes:
        parameters_total: tied tensors once; experts of all ranks.
        parameters_active: parameters that one token's forward pass uses.
        parameters_experts: parameters of all pools.
        flops_encoder, flops_decoder, flops_output: forward FLOPs per token.
        blocks: the sparse blocks; their FLOPs are included in encoder and decoder.
    """

    parameters_total: int
    parameters_active: int
    parameters_experts: int
    flops_encoder: float
    flops_decoder: float
    flops_output: float
    blocks: tuple[BlockAccount, ...]

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one source token and one target token. Training needs about three times as many."""
        return self.flops_encoder + self.flops_decoder + self.flops_output

    @property
    def flops_routing(self) -> float:
        """FLOPs of the routers."""
        return sum(block.flops_router for block in self.blocks)

    def to_mapping(self) -> dict[str, object]:
        """Plain values for ``run.json``."""
        values = asdict(self)
        values["blocks"] = [asdict(block) for block in self.blocks]
        return {**values, "flops_per_token": self.flops_per_token, "flops_routing": self.flops_routing}


def account(model: nn.Module, experts_per_token: Mapping[int, float] | None = None) -> Accounting:
    """Size and cost of a model of any task; ``flops_decoder`` is 0 without a decoder.

    Args:
        model: as built by :mod:`moe_train.models`, on any device.
        experts_per_token: measured pairs per token of each sparse block by its number (load.sum() / tokens); for other
            blocks the strategy's expectation is used.

    Raises:
        TypeError: the model is not a RoutedModel.
    """
    if not isinstance(model, RoutedModel):
        raise TypeError(f"there is no accounting for {type(model).__name__}")
    measured, parts = experts_per_token or {}, model.parts()
    encoder = list(_blocks(parts.encoder, measured))
    decoder = [] if parts.decoder is None else list(_blocks(parts.decoder, measured))
    blocks = tuple(encoder + decoder)
    local = sum(p.numel() for p in model.parameters() if getattr(p, "expert", False))
    shared = sum(p.numel() for p in model.parameters()) - local
    active = sum(block.parameters * min(1.0, block.experts_per_token / block.num_experts) for block in blocks)
    experts = sum(block.parameters for block in blocks)
    return Accounting(
        parameters_total=shared + experts,
        parameters_active=round(shared + active),
        parameters_experts=experts,
        flops_encoder=parts.flops_input + _flops_dense(parts.encoder) + _flops_sparse(encoder),
        flops_decoder=0.0 if parts.decoder is None else _flops_dense(parts.decoder) + _flops_sparse(decoder),
        flops_output=parts.flops_output,
        blocks=blocks,
    )


def sparse_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """Blocks with a router and a pool by their module names, in the order of their numbers."""
    return {
        name: cast(RoutedBlock, module)
        for name, module in model.named_modules()
        if isinstance(module, Block) and hasattr(module, "router") and hasattr(module, "pool")
    }


def _blocks(stack: nn.Module, measured: Mapping[int, float]) -> Iterator[BlockAccount]:
    for block in sparse_blocks(stack).values():
        config, spec = block.router.config, block.pool.spec
        per_token = measured.get(block.layer, block.router.experts_per_token(config))
        yield BlockAccount(
            layer=block.layer,
            strategy=config.name,
            num_experts=block.pool.num_experts,
            experts_per_token=per_token,
            parameters=block.pool.num_experts * spec.parameters,
            flops_experts=per_token * spec.flops_per_row,
            flops_router=block.router.router_flops_per_token(config, spec.dim),
        )


def _flops_dense(stack: nn.Module) -> float:
    """FLOPs per token of attention and dense feed-forwards: twice the elements of their matrices."""
    matrices = [
        parameter.numel()
        for module in stack.modules()
        if isinstance(module, (SelfAttention, CrossAttention, FeedForward))
        for parameter in module.parameters()
        if parameter.dim() == 2
    ]
    return 2.0 * sum(matrices)


def _flops_sparse(blocks: list[BlockAccount]) -> float:
    return sum(block.flops_experts + block.flops_router for block in blocks)
