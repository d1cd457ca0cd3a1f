"""What a router may know besides the hidden states: who the tokens are, when, and which ranks share the batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class RankReduction(Protocol):
    """Reductions over the ranks that share the micro-batch. Never differentiated."""

    @property
    def size(self) -> int:
        """How many ranks."""

    @property
    def rank(self) -> int:
        """Which of them this is."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, on every rank."""


@dataclass(frozen=True)
class LocalReduction:
    """One process: reductions are the identity."""

    size: int = 1
    rank: int = 0

    def sum(self, value: Tensor) -> Tensor:
        """Returns ``value``."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """Returns ``value``."""
        return value


@dataclass(frozen=True)
class RoutingContext:
    """T rows, one per real token: padding never reaches a router.

    Attributes:
        sentence: [T] int64, row of the sentence in the batch (0 .. num_sentences - 1), non-decreasing.
        position: [T] int64, position of the token in its sentence (0 is the first; a tag counts).
        sentence_uid: [T] int64, the sentence's own number: the same on any rank, in any batch, in every beam.
        token_id: [T] int64, vocabulary id (the decoder's is that of its input token); -1 where there is none.
        language: [T] int64, target-language number; -1 unknown.
        pass_index: [T] int64, which pass of a doubled batch (THOR) the token belongs to.
        num_sentences: rows of the batch.
        seed: the run's seed, or evaluation's.
        update: optimizer updates done so far; 0 in evaluation.
        layer: number of the sparse block in the model, encoder first.
        training: dropout, jitter, capacity policies and draws may depend on it.
        first_pass: all of ``pass_index`` is known to be 0, which spares draws a coordinate.
        ranks: who shares the micro-batch.
        fixed_size: the assignment's size must not depend on what is dropped (see
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
        """The same tokens, seen by another sparse block."""
        return dataclasses.replace(self, layer=layer, fixed_size=fixed_size)

    def select(self, rows: Tensor) -> RoutingContext:
        """The context of some tokens only; ``rows`` [R] int64, increasing (SMoE's later strata)."""
        taken = {n: getattr(self, n)[rows] for n in _PER_TOKEN}
        return dataclasses.replace(self, **taken)

    @classmethod
    def of_batch(cls, batch: int, length: int, device: torch.device | str = "cpu", **changes: object) -> RoutingContext:
        """A context for ``batch`` sentences of ``length`` tokens, nothing known of them (tests, single layers)."""
        sentence = torch.arange(batch, device=device).repeat_interleave(length)
        position = torch.arange(length, device=device).repeat(batch)
        unknown = torch.full_like(sentence, -1)
        zero = torch.zeros_like(sentence)
        context = cls(sentence, position, sentence.clone(), unknown, unknown, zero, num_sentences=batch)
        return dataclasses.replace(context, **changes)  # type: ignore[arg-type]


_PER_TOKEN = ("sentence", "position", "sentence_uid", "token_id", "language", "pass_index")
