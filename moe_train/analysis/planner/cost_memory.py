"""Memory of one rank in a training step, in bytes, in closed form.

Activations are the tensors that autograd keeps for backward, each storage once; a test compares them with
``torch.autograd.graph.saved_tensors_hooks`` in real steps. Bytes per token, with a bytes for a number of the residual
stream or of a matrix product, m = 1 for one of a dropout mask:

    self-attention   a d + a d (norm)  + 3 a d (q, k, v)  + a d (output)  + 4 H (log-sum-exp)  + m d (dropout)
    cross-attention  a d + a d         + a d + 2 a d · source ratio  + a d + 4 H + m d
    feed-forward     a d + a d         + a f (twice for GELU)        + m d
    sparse block     a d + a d         + 8 E (router)  + m d,  and per pair  2 a d + a h + indices

On a CPU attention dropout has no fused kernel, so probabilities, noise and their product are kept: 3 · 4 · H · S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.analysis.planner.cost_shape import ModelShape, SparseShape, StackShape
from moe_train.analysis.planner.cost_traffic import BYTES, StepTraffic, Workload
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.traffic import LINKS

_STATISTICS = 8  # mean and deviation of a norm
_INDEX = 8
_MASK = 1  # of dropout; inside experts its noise is kept in the type of the activations


@dataclass(frozen=True)
class StateSharding:
    """Sharding of optimizer states, gradients and parameters.

    Parameters and gradients are fp32 under both engines; casts are the weights' 16-bit copies.

    Attributes:
        name: ``ddp`` or ``deepspeed``.
        zero_stage: 1 divides optimizer states over data-parallel ranks, 2 gradients, 3 also parameters (as fairseq's
            fully sharded mode does for dense parameters; moe-train refuses it).
        offload: optimizer states in the host's memory.
        optimizer_bytes: state per parameter (Adam: two fp32 moments).
    """

    name: str = "ddp"
    zero_stage: int = 0
    offload: bool = False
    optimizer_bytes: int = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank; ``exchange``: buffers of one layer, ``loss``: gradients kept by the fused loss."""

    parameters: float
    gradients: float
    optimizer: float
    casts: float
    activations: float
    exchange: float
    loss: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


def memory_plan(
    shape: ModelShape, plan: LayoutPlan, work: Workload, traffic: StepTraffic, sharding: StateSharding
) -> MemoryPlan:
    """Memory of a rank at the end of a forward pass: the maximum, except for temporary buffers."""
    experts = shape.expert_parameters / plan.expert_parallel
    parts = ((shape.dense_parameters, plan.world), (experts, plan.replicas))

    def held(stage: int, per_parameter: float) -> float:
        """Bytes over all parameters, divided over data-parallel ranks from a ZeRO stage on."""
        over = [n if sharding.zero_stage >= stage else 1 for _, n in parts]
        return sum(count * per_parameter / n for (count, _), n in zip(parts, over, strict=True))

    # DeepSpeed's flat copy of the parameters that a rank updates
    master = 4 if sharding.zero_stage and sharding.name == "deepspeed" else 0
    optimizer = 0.0 if sharding.offload else held(1, sharding.optimizer_bytes + master)
    casts = 2.0 * (shape.dense_parameters + experts) if work.precision != "fp32" else 0.0
    return MemoryPlan(
        parameters=held(3, 4),
        gradients=held(2, 4),
        optimizer=optimizer,
        casts=casts,
        activations=activation_bytes(shape, work),
        exchange=_exchange_bytes(shape, work, traffic),
        loss=4.0 * shape.vocabulary * shape.config.embed_dim
        + work.tokens * shape.passes * shape.config.embed_dim * BYTES[work.precision],
    )


def activation_bytes(shape: ModelShape, work: Workload) -> float:
    """Largest size of tensors kept by autograd for one micro-batch on one rank, averaged over ranks.

    With recomputation: the layers' inputs, and one layer's activations while its backward runs.
    """
    if not work.recompute:
        return kept_bytes(shape, work)
    again = (work.tokens_of(s, shape) * max(_layers(s, shape, work), default=0.0) for s in shape.stacks)
    return kept_bytes(shape, work) + max(again)


def kept_bytes(shape: ModelShape, work: Workload) -> float:
    """Bytes kept by autograd at the end of the forward pass."""
    total = 0.0
    d, a = shape.config.embed_dim, BYTES[work.precision]
    for stack in shape.stacks:
        inside = stack.layers * a * d if work.recompute else sum(_layers(stack, shape, work))
        final = float(a * d if stack.is_source else 0)  # the decoder's features are the loss's
        final += a * d + _STATISTICS if shape.config.norm_order == "pre" else 0
        total += work.tokens_of(stack, shape) * (inside + final + _INDEX + _dropped(shape.config.dropout, _MASK * d))
    return total


def _layers(stack: StackShape, shape: ModelShape, work: Workload) -> Iterator[float]:
    """Bytes per token of each layer; inserted blocks count as layers of their own."""
    d, a, config = shape.config.embed_dim, BYTES[work.precision], shape.config
    noise = _dropped(config.dropout, _MASK * d)
    frame = a * d + _STATISTICS + noise
    attention = frame + 5 * a * d + _scores(shape, work)
    if stack.cross:
        attention += frame + (3 + 2 * work.source_ratio) * a * d + _scores(shape, work)
    hidden: float = a * config.ffn_dim * (1 if config.activation == "relu" else 2)
    hidden += _dropped(config.activation_dropout, _MASK * config.ffn_dim)
    dense = frame + a * d + hidden
    sparse = [block_bytes(block, shape, work) + (0 if _owns_frame(block) else frame + a * d) for block in stack.sparse]
    for index in range(stack.layers):
        yield attention + (dense if index < stack.dense_ffn else sparse[index - stack.dense_ffn])
    yield from sparse[stack.layers - stack.dense_ffn :]


def block_bytes(block: SparseShape, shape: ModelShape, work: Workload) -> float:
    """Per token of the layer: router, pairs, and the block's own norms and residuals (SMoE)."""
    d, a, h = block.spec.dim, BYTES[work.precision], block.spec.hidden
    choices = block.router.expected_choices(block.routing)
    visits = sum(choice.share for choice in choices if choice.stage) if _owns_frame(block) else 0.0
    noise = _dropped(block.spec.dropout, BYTES[work.precision] * h)
    pair = a * d + block.spec.sublayers * ((4 if block.spec.norm else 1) * a * d + a * h + noise)
    frames = 2 * a * d + _dropped(shape.config.dropout, _MASK * d)
    own = (1 + visits) * frames if _owns_frame(block) else 0.0
    return own + 8.0 * block.num_experts + block.pairs * (pair + 5 * _INDEX)


def _owns_frame(block: SparseShape) -> bool:
    return block.router.layer_kind == "stratified"


def _scores(shape: ModelShape, work: Workload) -> float:
    """Bytes of attention per token: the log-sum-exp, or all scores where no fused kernel supports dropout."""
    heads = shape.config.num_heads
    if work.device == "cpu" and shape.config.attention_dropout:
        return 3 * 4.0 * heads * work.sentence_tokens
    return 4.0 * heads


def _dropped(probability: float, size: float) -> float:
    return size if probability else 0.0


def _exchange_bytes(shape: ModelShape, work: Workload, traffic: StepTraffic) -> float:
    """Rows sent, rows received and rows returned of the largest exchange."""
    row = shape.config.embed_dim * BYTES[work.precision]
    rows = (block.tokens * sum(f.rows[link] for f in block.flows for link in LINKS) for block in traffic.blocks)
    return 3.0 * row * max(rows, default=0.0)
