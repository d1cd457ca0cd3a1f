"""Step-by-step decoding by C kernels, with weights packed once: fp32, bf16 or int8, on CPUs with matrix units.

Products, norms and attention of a step are one call (kernels/decoder/decoder.c); sparse blocks are called between parts
of it. Without the kernels :class:`TransformerModel` decodes by torch's operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_train.experts.packed_pool import PackedPool
from moe_train.kernels.decoder.program import (
    PackedWeight,
    Program,
    State,
    WeightFormat,
    addresses,
    continue_hypotheses,
    is_supported,
    pack,
)
from moe_train.layers.batch_context import BatchContext, BatchInfo, RoutingSettings, batch_context
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.sparse import SparseLayer
from moe_train.layers.transformer import BlockResidual, DecoderLayer, Norm, Residual
from moe_train.models.decoder_state import repeat_rows, select_rows

if TYPE_CHECKING:
    from moe_train.models.encoder_decoder import TransformerDecoder


class _Layer:
    """The packed weights of one layer. ``feed_forward``: None where the layer calls its blocks."""

    def __init__(self, layer: DecoderLayer, format: WeightFormat) -> None:
        own, cross = layer.self_attention, layer.cross_attention
        self.module, self.heads = layer, own.heads
        self.qkv, self.own_out = pack(own.qkv_weight, format), pack(own.out.weight, format)
        self.query, self.cross_out = pack(cross.query_weight, format), pack(cross.out.weight, format)
        self.memory = pack(cross.key_value_weight, format)
        self.qkv_bias = torch.cat((own.query_bias, torch.zeros_like(own.query_bias), own.value_bias)).detach()
        self.memory_bias = torch.cat((torch.zeros_like(cross.value_bias), cross.value_bias)).detach()
        block, residual = layer.feed_forward.block, layer.feed_forward.residual
        self.feed_forward: tuple[PackedWeight, PackedWeight] | None = None
        if isinstance(block, FeedForward) and block.activation == "relu" and residual is not None:
            self.feed_forward = pack(block.fc1.weight, format), pack(block.fc2.weight, format)
        blocks = [part.block for part in (layer.feed_forward, layer.inserted) if part is not None]
        sparse = [block for block in blocks if isinstance(block, SparseLayer) and PackedPool.supports(block.pool)]
        self.pools = {block: PackedPool(block.pool, format) for block in sparse}


class PackedDecoder:
    """A decoder with packed weights, as they were when it was made.

    Args:
        decoder: in fp32 on the CPU.
        format: of the weights of its products and of experts, unless they are divided over ranks; all else is fp32.
    """

    def __init__(self, decoder: TransformerDecoder, format: WeightFormat) -> None:
        self.decoder, self.settings, self.format = decoder, decoder.settings, format
        self.layers = [_Layer(layer, format) for layer in decoder.stack.layers if isinstance(layer, DecoderLayer)]
        self.output = pack(decoder.output_weight, format)
        self.pools = {block: pool for layer in self.layers for block, pool in layer.pools.items()}

    @staticmethod
    def supports(decoder: TransformerDecoder) -> bool:
        """Whether the kernels can be used in this process, for parameters like these."""
        return is_supported(decoder.output_weight)

    def start_decoding(self, encoder_out: Any, beam: int, max_length: int) -> PackedState:
        """As :meth:`TransformerModel.start_decoding`; no more than ``max_length`` steps can follow."""
        return PackedState(self, encoder_out, beam, max_length)


class PackedState:
    """State of a search of N = sentences · beam hypotheses.

    A table has the slots of each hypothesis's positions among its sentence's keys and values. Sentences that have left
    the search keep their places, so nothing is copied when they leave.
    """

    def __init__(self, packed: PackedDecoder, encoder_out: Any, beam: int, max_length: int) -> None:
        self._settings: RoutingSettings = packed.settings
        self._pools = packed.pools
        self._info: BatchInfo = repeat_rows(encoder_out["info"], beam)
        x = torch.as_tensor(encoder_out["encoder_out"][0])
        padding = encoder_out["encoder_padding_mask"]
        batch, length, dim = x.shape
        lengths = (~padding[0]).sum(1) if padding else torch.full((batch,), length)
        real = x[~padding[0]] if padding else x.reshape(-1, dim)
        room, rows = max(max_length, 1), batch * beam
        self._tables = {
            "place": torch.arange(batch),
            "table": torch.zeros(batch, beam, room, dtype=torch.int32),
            "source_start": lengths.cumsum(0) - lengths,
            "source_length": lengths,
        }
        heads = packed.layers[0].heads
        shape = {"beam": beam, "heads": heads, "dim": dim, "room": room, "slots": beam * room}
        self._state = State(sentences=batch, **shape, **addresses(**self._tables))
        self._cache = torch.empty(len(packed.layers), 2, batch, beam * room, dim)
        self._x, self._logits = torch.empty(rows, dim), torch.empty(rows, packed.output.outputs)
        self._parts = self._build(packed, _memory(packed, real.float().contiguous()), rows)
        self._order: Tensor | None = None  # of the hypotheses, since the last step

    def decode(self, tokens: Tensor) -> Tensor:
        """Next symbols' logits [N, V] after tokens [N]."""
        rows, tokens = tokens.shape[0], tokens.contiguous()
        if rows and self._state.position >= self._state.room:
            raise ValueError(f"the state has room for {self._state.room} positions")
        continue_hypotheses(self._state, self._order, rows // self._state.beam)
        self._order = None
        self._state.token = tokens.data_ptr()
        context = None
        for part in self._parts:
            if isinstance(part, Program):
                part.run(self._state)
                continue
            if context is None:
                context = batch_context(
                    None,
                    (rows, 1),
                    self._settings,
                    self._info,
                    token_ids=tokens.view(-1, 1),
                    start=self._state.position,
                )
            self._x[:rows] = self._call(part, self._x[:rows].unsqueeze(1), context).squeeze(1)
        self._state.position += 1
        return self._logits[:rows]

    def _call(self, part: BlockResidual, x: Tensor, context: BatchContext) -> Tensor:
        """The block on x [N, 1, d], with packed experts where it has them."""
        block = part.block
        if not isinstance(block, SparseLayer) or block not in self._pools:
            return part(x, context)[0]  # type: ignore[no-any-return]
        block.packed = self._pools[block]
        try:
            return part(x, context)[0]  # type: ignore[no-any-return]
        finally:
            block.packed = None

    def reorder(self, rows: Tensor) -> None:
        """As :meth:`DecoderState.reorder`, but sentences keep their order."""
        self._order = rows if self._order is None else self._order[rows]
        if len(self._parts) > 1 and rows.shape[0] != self._state.sentences * self._state.beam:
            self._info = select_rows(self._info, rows)  # which blocks between programs use

    def _build(self, packed: PackedDecoder, memory: list[Tensor], rows: int) -> list[Program | BlockResidual]:
        """The step: programs, and blocks that are called between them."""
        embed, stack, x, dim = packed.decoder.embed, packed.decoder.stack, self._x, self._x.shape[1]
        hidden = max((layer.feed_forward[0].outputs for layer in packed.layers if layer.feed_forward), default=0)
        wide, attended, query = torch.empty(rows, 3 * dim), torch.empty(rows, dim), torch.empty(rows, dim)
        between = torch.empty(rows, hidden)
        parts: list[Program | BlockResidual] = []
        program = Program(rows)
        program.embed(x, embed.tokens.weight.detach(), embed.positions.table, embed.scale)
        for layer, kept, cache in zip(packed.layers, memory, self._cache, strict=True):
            module = layer.module
            norm = _norm_before(module.attention_residual)
            program.product(x, layer.qkv, wide, layer.qkv_bias, norm)
            program.self_attention(wide, cache[0], cache[1], attended)
            program.product(attended, layer.own_out, x, module.self_attention.out.bias.detach(), add=True)
            _norm_after(program, x, module.attention_residual)
            norm = _norm_before(module.cross_residual)
            program.product(x, layer.query, query, module.cross_attention.query_bias.detach(), norm)
            program.cross_attention(query, kept, attended)
            program.product(attended, layer.cross_out, x, module.cross_attention.out.bias.detach(), add=True)
            _norm_after(program, x, module.cross_residual)
            blocks = [module.feed_forward, module.inserted]
            if layer.feed_forward is not None:
                first, second = layer.feed_forward
                dense, residual = module.feed_forward.block, module.feed_forward.residual
                assert isinstance(dense, FeedForward) and residual is not None
                inner = between.view(-1)[: rows * first.outputs].view(rows, first.outputs)
                program.product(x, first, inner, dense.fc1.bias.detach(), _norm_before(residual), relu=True)
                program.product(inner, second, x, dense.fc2.bias.detach(), add=True)
                _norm_after(program, x, residual)
                blocks = [module.inserted]
            for block in blocks:
                if block is not None:
                    parts += [program, block]
                    program = Program(rows)
        program.product(x, packed.output, self._logits, norm=stack.norm if isinstance(stack.norm, Norm) else None)
        return [*parts, program]


def _memory(packed: PackedDecoder, real: Tensor) -> list[Tensor]:
    """Keys and values of the sources' tokens [R, d], [R, 2 d] for each layer."""
    kept = [real.new_empty(real.shape[0], layer.memory.outputs) for layer in packed.layers]
    program = Program(real.shape[0])
    for layer, to in zip(packed.layers, kept, strict=True):
        program.product(real, layer.memory, to, layer.memory_bias)
    program.run(State(sentences=real.shape[0], beam=1))
    return kept


def _norm_before(residual: Residual) -> Norm | None:
    return residual.norm if residual.pre else None


def _norm_after(program: Program, x: Tensor, residual: Residual) -> None:
    if not residual.pre:
        program.normalise(x, residual.norm)
