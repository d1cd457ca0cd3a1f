"""Packed rows: the tokens of a batch without padding, and attention over them by ``torch.nn.attention.varlen``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

_LEAST_STEP = 128  # rows
_FURTHER = 8  # sequences of rows without a token: one of all of them would be longer than sentences are


class Attend(Protocol):
    """The arguments of :func:`torch.nn.attention.varlen.varlen_attn` that are used here."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
    ) -> Tensor:
        """query [T, H, d/H], key and value [K, H, d/H], first rows of the sequences [N + 1] int32 → [T, H, d/H]."""


@dataclass(frozen=True)
class VarlenAttention:
    """An attention function without dropout, and the types that it takes."""

    attend: Attend
    types: Sequence[torch.dtype]


@dataclass(frozen=True)
class Sequences:
    """The sentences of packed rows. The rows after the last token are zeros at first, and eight more sequences.

    So no attention kernel gets rows that belong to no sequence (it would not write them), nor an empty batch.

    Attributes:
        starts: [B + 9] int32, first row of each sequence, and at the end the number of rows.
        longest: no sequence has more rows.
        rows: number of rows, more than there are tokens.
        attend: the attention function.
    """

    starts: Tensor
    longest: int
    rows: int
    attend: Attend


def sequences(lengths: Tensor, longest: int, tokens: int, attend: Attend) -> Sequences:
    """Sequences of B sentences; ``lengths`` [B] int64 sum up to ``tokens``. The host does not wait for them."""
    rows = row_count(tokens)
    further = rows - tokens
    ends = torch.arange(1, _FURTHER + 1, device=lengths.device) * further // _FURTHER + tokens
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0), ends))
    return Sequences(starts.int(), max(longest, -(-further // _FURTHER)), rows, attend)


def row_count(tokens: int) -> int:
    """Rows for this many tokens and at least eight more: a multiple of 128, and of 1/64 to 1/32 of the tokens.

    The products of all batches of a training so have few shapes.
    """
    step = max(_LEAST_STEP, 1 << max(tokens.bit_length() - 6, 0))
    return ((tokens + _FURTHER - 1) // step + 1) * step


def torch_varlen(device: torch.device, head_dim: int) -> VarlenAttention | None:
    """torch's attention over packed rows, or None where this torch or this device has none for heads of this width."""
    if device.type != "cuda" or head_dim % 8 or head_dim > 256 or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    attend = find_varlen_attn()
    return None if attend is None else VarlenAttention(attend, (torch.bfloat16, torch.float16))


def find_varlen_attn() -> Attend | None:
    """torch's function, or None before the version in which its causal form is ``window_size=(-1, 0)``."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = "window_size" in inspect.signature(varlen_attn).parameters
    return cast("Attend", varlen_attn) if known else None  # it returns more only where it is asked to
