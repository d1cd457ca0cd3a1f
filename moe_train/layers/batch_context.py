"""Padding and token metadata of a batch, built once per forward and passed to all layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.kernels.cpu import segment_sum
from moe_train.kernels.varlen import Sequences, VarlenAttention, sequences
from moe_train.routing.context import LocalReduction, RankReduction, RoutingContext


@dataclass
class RoutingSettings:
    """Settings that all routers of a model share. The model owns one; the caller changes it between forwards.

    Attributes:
        seed: seed of counter-based random numbers, of the run or of the evaluation.
        update: optimizer updates done so far. Evaluation always uses 0.
        ranks: reductions over the ranks that share the micro-batch.
    """

    seed: int = 1
    update: int = 0
    ranks: RankReduction = field(default_factory=LocalReduction)


@dataclass(frozen=True)
class BatchContext:
    """A batch of B sentences of S columns, which layers get as x [B, S, d] or as packed rows [R, d].

    Packed rows are the T real tokens in the order of ``real``, and R - T further rows, whose content has no meaning.

    Attributes:
        batch: B.
        length: S.
        real: [T] int64, flat indices (row · S + column) of the tokens that are not padding; None if all are real.
        padding: [B, S] bool, True at padding; None if there is none.
        routing: context of the T real tokens, for routers.
        packed: the sentences of packed rows; None: x is [B, S, d].
    """

    batch: int
    length: int
    real: Tensor | None
    padding: Tensor | None
    routing: RoutingContext
    packed: Sequences | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.batch, self.length

    @property
    def visible(self) -> Tensor | Sequences | None:
        """[B, 1, 1, S] bool, True where a key is visible; None if all are; of packed rows, their sequences."""
        if self.packed is not None:
            return self.packed
        return None if self.padding is None else ~self.padding[:, None, None, :]

    def pack(self, x: Tensor) -> Tensor:
        """x [B, S, d] or [R, d] → rows of the real tokens, [T, d]."""
        if self.packed is not None:
            return x[: self.routing.sentence.shape[0]]
        flat = x.reshape(self.batch * self.length, x.shape[-1])
        return flat if self.real is None else _Pack.apply(flat, self.real)  # type: ignore[no-untyped-call]

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, d] → the form of x, [B, S, d] or [R, d], zero at padding and in further rows."""
        if self.packed is not None:
            return F.pad(rows, (0, 0, 0, self.packed.rows - rows.shape[0]))
        if self.real is None:
            return rows.view(self.batch, self.length, rows.shape[-1])
        flat = _Unpack.apply(rows, self.real, self.batch * self.length)  # type: ignore[no-untyped-call]
        return flat.view(self.batch, self.length, rows.shape[-1])  # type: ignore[no-any-return]

    def replace(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [B, S, d] or [R, d] with other rows [T, d] of the real tokens."""
        if self.packed is not None:
            return torch.cat((rows, x[rows.shape[0] :]))
        flat = rows if self.real is None else x.reshape(-1, x.shape[-1]).index_copy(0, self.real, rows)
        return flat.view(x.shape)

    def packed_for(self, x: Tensor, attention: VarlenAttention | None) -> BatchContext:
        """The context of packed rows if ``attention`` takes rows like x [B, S, d], else this one."""
        if attention is None or x.dtype not in attention.types:
            return self
        if self.padding is None:
            lengths = torch.full((self.batch,), self.length, device=x.device)
        else:
            lengths = (~self.padding).sum(1)
        packed = sequences(lengths, self.length, self.routing.sentence.shape[0], attention.attend)
        return dataclasses.replace(self, packed=packed)

    @property
    def padded(self) -> BatchContext:
        """The context of x [B, S, d]."""
        return dataclasses.replace(self, packed=None)

    def enter(self, x: Tensor) -> Tensor:
        """x [B, S, d] → the form that the layers get."""
        return x if self.packed is None else self.unpack(self.padded.pack(x))

    def leave(self, x: Tensor) -> Tensor:
        """The form that the layers get → x [B, S, d]."""
        return x if self.packed is None else self.padded.unpack(self.pack(x))


class _Pack(torch.autograd.Function):
    """Selects rows that all differ, so that the gradient is a copy; that of ``index_select`` adds row by row."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, real: Tensor) -> Tensor:
        ctx.real, ctx.size = real, flat.shape[0]
        return flat.index_select(0, real)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.real, ctx.size), None


class _Unpack(torch.autograd.Function):
    """The inverse of :class:`_Pack`, with zeros in the other rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, real: Tensor, size: int) -> Tensor:
        ctx.real = real
        return _spread(rows, real, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.real), None, None


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """[size, d]: the rows [T, d] at their places, which ascend, zero elsewhere."""
    if rows.shape[0] and segment_sum.is_supported(rows):  # in one pass
        taken = torch.zeros(size, dtype=torch.int64).index_fill_(0, places, 1)
        return segment_sum.weighted_sums(rows, torch.arange(rows.shape[0]), taken.cumsum(0) - taken, None)
    return rows.new_zeros(size, rows.shape[-1]).index_copy_(0, places, rows)


def indices_of(mask: Tensor, count: int | None) -> Tensor:
    """[count] int64: indices at which ``mask`` [N] is True. The host waits only if it does not know their number."""
    return (mask.nonzero() if count is None else mask.nonzero_static(size=count)).squeeze(1)


@dataclass(frozen=True)
class BatchInfo:
    """Metadata of each sentence: [B] int64, or None if unknown.

    Attributes:
        sentence_uid: unique number of the sentence (default: its row).
        language: target-language number (default: -1).
        pass_index: pass of the sentence in a doubled batch (default: 0).
    """

    sentence_uid: Tensor | None = None
    language: Tensor | None = None
    pass_index: Tensor | None = None


def batch_context(
    padding: Tensor | None,
    shape: tuple[int, int],
    settings: RoutingSettings,
    info: BatchInfo,
    *,
    token_ids: Tensor | None = None,
    real_tokens: int | None = None,
    start: int = 0,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> BatchContext:
    """Builds the context of a batch.

    Args:
        padding: [B, S] bool, True at padding (left or right), or None.
        shape: (B, S).
        token_ids: [B, S] vocabulary ids, if there are any.
        real_tokens: tokens that are not padding; None: counted, for which the host waits.
        start: position of the first column (in step-by-step decoding, the number of tokens decoded so far).
        training: whether routers train (jitter, draws that change with the update).
    """
    batch, length = shape
    if padding is not None and (batch * length == real_tokens if real_tokens is not None else not bool(padding.any())):
        padding = None
    rows = torch.arange(batch, device=device)
    columns = torch.arange(start, start + length, device=device).expand(batch, length)
    real = None
    if padding is not None:
        real = indices_of((~padding).view(-1), real_tokens)
        columns = (~padding).cumsum(1) - 1 + start

    def per_token(sentences: Tensor | None, default: Tensor) -> Tensor:
        values = default if sentences is None else sentences
        return pick(values.unsqueeze(1).expand(batch, length))

    def pick(values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return flat if real is None else flat.index_select(0, real)

    unknown = torch.full_like(rows, -1)
    routing = RoutingContext(
        sentence=per_token(None, rows),
        position=pick(columns),
        sentence_uid=per_token(info.sentence_uid, rows),
        token_id=per_token(None, unknown) if token_ids is None else pick(token_ids),
        language=per_token(info.language, unknown),
        pass_index=per_token(info.pass_index, torch.zeros_like(rows)),
        num_sentences=batch,
        seed=settings.seed,
        update=settings.update if training else 0,
        training=training,
        first_pass=info.pass_index is None,
        ranks=settings.ranks,
    )
    return BatchContext(batch, length, real, padding, routing)
