"""Counter-based random numbers: a draw is a hash of its coordinates, not of a generator's state.

Every draw hashes (seed, update, pass, layer, sentence, position, stream). So activation recomputation, resuming, any
number of ranks, step-by-step decoding and beam reordering all get the same draw, which a stateful generator cannot
guarantee. The hash is SplitMix64's finaliser (Steele et al., 2014) in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.context import RoutingContext

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """Hashes int64 of any shape into uniformly distributed int64."""
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def hash_numbers(*parts: int) -> int:
    """:func:`combine` of these numbers in turn, starting from 0, in plain Python (no kernel is launched)."""
    state = 0
    for part in parts:
        state = _splitmix64_int(state ^ _splitmix64_int(part))
    return state - (1 << 64) if state >> 63 else state


def _splitmix64_int(value: int) -> int:
    """:func:`splitmix64` of one number, unsigned."""
    value = (value + _GOLDEN) & _ALL
    value = ((value ^ (value >> 30)) * _MIX_1) & _ALL
    value = ((value ^ (value >> 27)) * _MIX_2) & _ALL
    return value ^ (value >> 31)


def combine(state: Tensor | int, part: Tensor | int) -> Tensor:
    """Adds one more coordinate to a hash state (broadcasting)."""
    if not isinstance(part, Tensor):
        part = torch.full((), part, device=state.device if isinstance(state, Tensor) else None)
    return splitmix64(splitmix64(part) ^ state)


def uniform_from(state: Tensor) -> Tensor:
    """fp64 in [0, 1) from hashed int64: the top 53 bits."""
    return _shift(state, 11).to(torch.float64) * (1.0 / (1 << 53))


def counter_hash(context: RoutingContext, stream: int, *, per: str = "token") -> Tensor:
    """Hashed int64 [T] for each token of the context.

    Args:
        stream: a number that distinguishes the draws of one router (jitter, second expert ...).
        per: ``token`` (one draw each), ``sentence`` (shared by a sentence's tokens), ``position`` (shared by the tokens
            at one position of all sentences) or ``batch`` (shared by all).

    Raises:
        ValueError: ``per`` has another value.
    """
    if per not in ("token", "sentence", "position", "batch"):
        raise ValueError(f"draws are per token, sentence, position or batch, not per {per!r}")
    coordinates = (context.seed, context.update, context.layer, stream, *((0,) if context.first_pass else ()))
    state: Tensor | int
    if torch.compiler.is_compiling():  # as tensors: the hash of a number that changes would be traced bit by bit
        state = torch.zeros((), dtype=torch.int64, device=context.pass_index.device)
        for coordinate in coordinates:
            state = combine(state, coordinate)
    else:
        state = hash_numbers(*coordinates)
    if not context.first_pass:
        state = combine(state, context.pass_index)
    if per in ("token", "sentence"):
        state = combine(state, context.sentence_uid)
    if per in ("token", "position"):
        state = combine(state, context.position)
    if not isinstance(state, Tensor):
        return torch.full_like(context.pass_index, state)
    return state.expand_as(context.pass_index)


def counter_uniform(context: RoutingContext, stream: int, width: int = 1, *, per: str = "token") -> Tensor:
    """fp64 uniforms in [0, 1), [T, width]; see :func:`counter_hash`."""
    state = counter_hash(context, stream, per=per).unsqueeze(1)
    return uniform_from(combine(state, torch.arange(width, device=state.device)))


def counter_integer(context: RoutingContext, stream: int, high: int, *, per: str = "token") -> Tensor:
    """int64 uniforms in 0 .. high - 1, [T]; see :func:`counter_hash`."""
    return (uniform_from(counter_hash(context, stream, per=per)) * high).long().clamp_(max=high - 1)
