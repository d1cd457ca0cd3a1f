"""Layers: sparse layers (routing and experts), attention, Transformer layers and stacks. Torch only."""

from __future__ import annotations

from moe_train.layers.attention import CrossAttention, SelfAttention
from moe_train.layers.batch_context import BatchContext, BatchInfo, RoutingSettings, batch_context
from moe_train.layers.block import Block, Records, RoutingRecord, start_losses
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.moe_layer import MoELayer
from moe_train.layers.registry import BlockInputs, build_block, kinds, register_kind
from moe_train.layers.soft import SoftLayer
from moe_train.layers.sparse import SparseLayer
from moe_train.layers.stack import DecoderStack, EncoderStack
from moe_train.layers.stratified import StratifiedLayer, requested_capacity
from moe_train.layers.transformer import DecoderLayer, EncoderLayer, LayerShape

__all__ = [
    "BatchContext",
    "BatchInfo",
    "Block",
    "BlockInputs",
    "CrossAttention",
    "DecoderLayer",
    "DecoderStack",
    "EncoderLayer",
    "EncoderStack",
    "FeedForward",
    "LayerShape",
    "MoELayer",
    "Records",
    "RoutingRecord",
    "RoutingSettings",
    "SelfAttention",
    "SoftLayer",
    "SparseLayer",
    "StratifiedLayer",
    "batch_context",
    "build_block",
    "kinds",
    "register_kind",
    "requested_capacity",
    "start_losses",
]
