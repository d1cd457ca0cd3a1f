"""Inputs of a router besides the hidden states: token metadata, update, seed, and the ranks that share the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class RankReduction(Protocol):
    """Reductions over the ranks that share the micro-batch. Never differentiated."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def rank(self) -> int:
        """Index of this rank among them."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """Starts :meth:`sum`; the returned function waits for the result."""

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, on every rank."""


@dataclass(frozen=True)
class LocalReduction:
    """Reductions of a single process: the identity."""

    size: int = 1
    rank: int = 0

    def sum(self, value: Tensor) -> Tensor:
        """Returns ``value``."""
        return value

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """There is nothing to wait for."""
        return lambda: value

    def max(self, value: Tensor) -> Tensor:
        """Returns ``value``."""
        return value


@dataclass(frozen=True)
class RoutingContext:
    """T rows, one per real token; padding is removed before routing.

    Attributes:
        sentence: [T] int64, row of the sentence in the batch (0 .. num_sentences - 1), non-decreasing.
        position: [T] int64, position of the token in its sentence (0 is the first; a tag counts).
        sentence_uid: [T] int64, unique number of the sentence, the same on any rank, in any batch and in every beam.
        token_id: [T] int64, vocabulary id (in the decoder, of the input token); -1: none.
        language: [T] int64, target-language number; -1: unknown.
        pass_index: [T] int64, pass of the token in a doubled batch (THOR).
        num_sentences: number of sentences in the batch.
        seed: seed of the run or of the evaluation.
        update: optimizer updates done so far; 0 in evaluation.
        layer: number of the sparse block in the model, encoder first.
        training: whether the router trains (jitter, capacity policies and random draws depend on it).
        first_pass: whether all of ``pass_index`` is known to be 0, which saves a hash per draw.
        ranks: reductions over the ranks that share the micro-batch.
        fixed_size: whether the assignment's size must not depend on drops (see
            :func:`moe_train.routing.types.assignment_from_choices`).
    """

    sentence: Tensor
    position: Tensor
    sentence_uid: Tensor
    token_id: Tensor
    language: Tensor
    pass_index: Tensor
    num_sentences: int
    seed: int = 1
    update: int = 0
    layer: int = 0
    training: bool = False
    first_pass: bool = False
    ranks: RankReduction = field(default_factory=LocalReduction)
    fixed_size: bool = False

    def at_layer(self, layer: int, fixed_size: bool = False) -> RoutingContext:
        """The same tokens for another sparse block."""
        return dataclasses.replace(self, layer=layer, fixed_size=fixed_size)

    def select(self, rows: Tensor) -> RoutingContext:
        """The context of the tokens ``rows`` [R] int64, increasing (for SMoE's later strata)."""
        taken = {n: getattr(self, n)[rows] for n in _PER_TOKEN}
        return dataclasses.replace(self, **taken)


_PER_TOKEN = ("sentence", "position", "sentence_uid", "token_id", "language", "pass_index")
