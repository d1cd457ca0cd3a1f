"""Shape of a model for the cost model: stacks of layers, sparse blocks, with parameters and FLOPs of each.

Read from a model on the meta device, so that parameters are those of the real modules; or in closed form for models
that this framework does not build (:func:`decoder_only`, to compare with published language models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_train.config import LanguageModelConfig, ModelConfig
from moe_train.config.planner import PlanImages
from moe_train.experts import ExpertSpec
from moe_train.routing import Router, RoutingConfig, registered_strategies, routing_config


@dataclass(frozen=True)
class SparseShape:
    """One sparse block.

    Attributes:
        routing: its strategy's config.
        spec: one of its experts.
        router_parameters: of its routers and its own norms.
    """

    routing: RoutingConfig
    spec: ExpertSpec
    router_parameters: int

    @property
    def router(self) -> type[Router]:
        """The strategy's router class."""
        return registered_strategies()[self.routing.name].router

    @property
    def num_experts(self) -> int:
        """E, of all ranks."""
        return self.routing.num_experts

    @property
    def parameters(self) -> int:
        """Parameters of all its experts."""
        return self.num_experts * self.spec.parameters

    @property
    def pairs(self) -> float:
        """Expected pairs per token in training where routing is uniform."""
        return sum(choice.share * choice.picks for choice in self.router.expected_choices(self.routing))


@dataclass(frozen=True)
class StackShape:
    """An encoder or a decoder.

    Attributes:
        name: ``encoder`` or ``decoder``.
        layers: Transformer layers.
        dense_ffn: number of them with a dense feed-forward.
        cross: whether each also attends to an encoder's output.
        is_source: whether its tokens are source tokens; False for a model with only an encoder.
        parameters: except those of experts and embeddings.
        flops: forward per token, of products with dense weights.
        sparse: its sparse blocks in order.
    """

    name: str
    layers: int
    dense_ffn: int
    cross: bool
    is_source: bool
    parameters: int
    flops: float
    sparse: tuple[SparseShape, ...]


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        config: widths, dropouts, activation.
        vocabulary: number of words, or classes of an image model.
        stacks: encoder and decoder, or one of them.
        embedding_parameters: each table once, including an untied output layer.
        output_flops: forward per token of the batch, of products before and after the layers.
        sentence_tokens: of every sequence, where the model fixes it: patches of an image.
    """

    config: ModelConfig
    vocabulary: int
    stacks: tuple[StackShape, ...]
    embedding_parameters: int
    output_flops: float
    sentence_tokens: int | None = None

    @property
    def sparse(self) -> tuple[SparseShape, ...]:
        """All sparse blocks."""
        return tuple(block for stack in self.stacks for block in stack.sparse)

    @property
    def dense_parameters(self) -> int:
        """All parameters except those of experts; every rank has them."""
        return self.embedding_parameters + sum(stack.parameters for stack in self.stacks)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(block.parameters for block in self.sparse)

    @property
    def active_parameters(self) -> int:
        """Parameters used in the forward pass of one token."""
        used = sum(b.parameters * min(1.0, b.pairs / b.num_experts) for b in self.sparse)
        return round(self.dense_parameters + used)

    @property
    def passes(self) -> int:
        """Forward passes over each batch in training (THOR: 2)."""
        return max((block.routing.passes for block in self.sparse), default=1)


class SizedVocabulary:
    """A vocabulary of which only the size is known."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def pad(self) -> int:
        """Padding id, as in fairseq's dictionaries."""
        return 1


def model_shape(
    config: ModelConfig, routing: Mapping[str, Any], vocabulary: int, images: PlanImages | None = None
) -> ModelShape:
    """The shape of the model that ``moe-train`` would build.

    Args:
        config: the architecture: an encoder-decoder, an encoder of text (as a masked language model) or of images.
        routing: the ``routing`` group.
        vocabulary: words of the joint dictionary, or classes of images.
        images: their size, for an image model.

    Raises:
        ConfigError: invalid values.
    """
    build = _BUILDERS.get(config.name, _translator)
    with torch.device("meta"):
        model, predicted = build(config, routing_config(routing), vocabulary, images or PlanImages())
    parts = model.parts()
    stacks = [_stack("encoder", parts.encoder, cross=False, is_source=parts.decoder is not None)]
    if parts.decoder is not None:
        stacks.append(_stack("decoder", parts.decoder, cross=True, is_source=False))
    dense = sum(p.numel() for p in model.parameters() if not getattr(p, "expert", False))
    return ModelShape(
        config,
        vocabulary,
        tuple(stacks),
        dense - sum(stack.parameters for stack in stacks),
        parts.flops_input + predicted * parts.flops_output,
        getattr(model, "patches", None),
    )


# Each returns a model, and the share of the batch's tokens for which the output layer is computed.


def _translator(config: ModelConfig, routing: RoutingConfig, vocabulary: int, _: PlanImages) -> tuple[Any, float]:
    from moe_train.models import build_model

    words = SizedVocabulary(vocabulary)
    return build_model(config, routing, words, words, seed=1), 1.0


def _encoder(config: ModelConfig, routing: RoutingConfig, vocabulary: int, _: PlanImages) -> tuple[Any, float]:
    from moe_train.models.encoder import build_masked_language_model

    model = build_masked_language_model(config, routing, SizedVocabulary(vocabulary), seed=1)
    return model, LanguageModelConfig().mask_probability


def _vision(config: ModelConfig, routing: RoutingConfig, classes: int, images: PlanImages) -> tuple[Any, float]:
    from moe_train.models.vision import ImageShape, build_vision_model

    shape = ImageShape(images.size, images.size, images.channels, classes)
    return build_vision_model(config, routing, shape, seed=1), 1.0


_BUILDERS = {"encoder": _encoder, "vision_transformer": _vision}


def _stack(name: str, stack: nn.Module, *, cross: bool, is_source: bool) -> StackShape:
    from moe_train.layers import CrossAttention, FeedForward, SelfAttention
    from moe_train.models.accounting import sparse_blocks

    blocks = sparse_blocks(stack)
    shared = [m for m in stack.modules() if isinstance(m, (SelfAttention, CrossAttention, FeedForward))]
    matrices = sum(p.numel() for module in shared for p in module.parameters() if p.dim() == 2)
    return StackShape(
        name,
        layers=len(stack.layers),  # type: ignore[arg-type]
        dense_ffn=sum(isinstance(module, FeedForward) for module in shared),
        cross=cross,
        is_source=is_source,
        parameters=sum(p.numel() for p in stack.parameters() if not getattr(p, "expert", False)),
        flops=2.0 * matrices,
        sparse=tuple(
            SparseShape(
                block.router.config,
                block.pool.spec,
                sum(p.numel() for p in block.parameters() if not getattr(p, "expert", False)),  # type: ignore[attr-defined]
            )
            for block in blocks.values()
        ),
    )


def decoder_only(config: ModelConfig, routing: Mapping[str, Any], vocabulary: int) -> ModelShape:
    """A language model of ``config.decoder_layers`` layers, every second one sparse, in closed form.

    GPT-style as in fairseq: self-attention with biases, two norms a layer, a tied embedding.
    """
    d, f, layers = config.embed_dim, config.ffn_dim, config.decoder_layers
    sparse = layers // 2
    strategy = routing_config(routing)
    block = SparseShape(strategy, ExpertSpec(d, strategy.expert_ffn_dim or f), d * strategy.num_experts)
    attention, ffn = 4 * d * d, 2 * d * f
    dense = layers * (attention + 4 * d + 4 * d) + (layers - sparse) * (ffn + d + f) + 2 * d
    flops = 2.0 * (layers * attention + (layers - sparse) * ffn)
    stack = StackShape(
        "decoder",
        layers,
        layers - sparse,
        False,
        False,
        dense + sparse * block.router_parameters,
        flops,
        (block,) * sparse,
    )
    return ModelShape(config, vocabulary, (stack,), vocabulary * d, 2.0 * vocabulary * d)
