"""Expected distribution of tokens over experts with equal loads, from which ``moe-plan`` computes row counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpectedChoices:
    """A part of the tokens, each of which chooses ``picks`` distinct experts among ``count`` consecutive ones.

    A strategy is a list of these. Top-k has one; SAM has one per group, with the group's share of the tokens; SMoE has
    one per stratum, with the share of the tokens that reach it.

    Attributes:
        share: rows of this part, per token of the layer.
        first: first expert that may be chosen.
        count: number of experts that may be chosen.
        picks: experts per row; not an integer only if ``independent``.
        stage: parts of one stage are alternatives (groups), so that given loads change their shares; parts of different
            stages follow one another (strata).
        independent: each expert takes a row independently, with probability picks / count (expert choice).
    """

    share: float
    first: int
    count: int
    picks: float
    stage: int = 0
    independent: bool = False
