"""How a strategy's tokens spread over experts when loads are equal: what ``moe-plan`` counts rows from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpectedChoices:
    """A part of the tokens that chooses alike: ``picks`` distinct experts among ``count`` consecutive ones.

    A strategy is a list of these. Flat top-k is one; SAM is one a group, each with the group's share of the tokens;
    SMoE is one a stratum, with the share of the tokens that reach it.

    Attributes:
        share: rows that choose so, per token of the layer.
        first: the first expert that may be chosen.
        count: how many may be.
        picks: experts of each row; a fraction only where ``independent``.
        stage: choices of one stage exclude one another (groups), so that given loads move shares between them; those of
            different stages follow one another (strata).
        independent: every expert takes a row on its own, with probability picks / count (expert choice).
    """

    share: float
    first: int
    count: int
    picks: float
    stage: int = 0
    independent: bool = False
