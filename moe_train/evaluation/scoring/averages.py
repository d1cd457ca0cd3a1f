"""Averages over directions: all, from English, into English, and by resource tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_train.data.text.languages import is_english
from moe_train.evaluation.scoring.bleu_chrf import CorpusScores

TIERS = ("high", "medium", "low")


def tier_of(direction: str, tiers: Mapping[str, str]) -> str:
    """The resource tier of a direction: that of its language other than English, of two the lower; "" where unknown."""
    known = [tiers[code] for code in direction.split("-") if code in tiers and not is_english(code)]
    return max(known, key=lambda tier: TIERS.index(tier) if tier in TIERS else -1, default="")


def group_directions(directions: Sequence[str], tiers: Mapping[str, str]) -> dict[str, list[str]]:
    """Named groups of directions, without empty ones. ``all`` is first."""
    found: dict[str, list[str]] = {"all": list(directions)}
    found["from English"] = [d for d in directions if is_english(d.split("-")[0])]
    found["into English"] = [d for d in directions if is_english(d.split("-")[1])]
    found["between others"] = [d for d in directions if not any(is_english(code) for code in d.split("-"))]
    for tier in TIERS:
        found[f"{tier} resource"] = [d for d in directions if tier_of(d, tiers) == tier]
    return {name: members for name, members in found.items() if members}


def mean(scores: Sequence[CorpusScores]) -> CorpusScores:
    """The mean of each score over directions; every direction has the same weight.

    Raises:
        ValueError: ``scores`` is empty.
    """
    if not scores:
        raise ValueError("no scores to average")
    bleu, chrf = (sum(values) / len(scores) for values in ([s.bleu for s in scores], [s.chrf for s in scores]))
    return CorpusScores(round(bleu, 4), round(chrf, 4))
