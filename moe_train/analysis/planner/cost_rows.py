"""Expected number of rows that a sparse layer sends to each destination, from strategy and layout.

A token is sent once to each rank (or node) that has one of its experts, so rows are the number of *distinct*
destinations of its choices. By linearity of expectation that is the sum over destinations of the probability that at
least one chosen expert is there, which needs no independence between destinations.

**Equal loads.** k distinct experts, all sets equally likely, among n of which the destination has m::

    P(row) = 1 - C(n - m, k) / C(n, k) = 1 - Π_{i<k} (n - m - i) / (n - i)

**Given loads.** Of all distributions over sets of k distinct experts in which expert e has its load π_e (Σ π = k), the
one of largest entropy chooses the set S with probability proportional to Π_{e in S} w_e (conditional Poisson sampling;
Chen, Dempster and Liu, Biometrika 81, 1994). With e_k the elementary symmetric polynomial::

    P(row) = 1 - e_k(w outside the destination) / e_k(w)

which is the formula above where all w are equal. Weights are found from the loads by the fixed point of the same paper.
Real routers correlate their choices, so with given loads this is an estimate; with one expert per token it is exact.

**Groups and strata** (SAM, SMoE) are sums of such terms, weighted by the share of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.traffic import LINKS, LinkType
from moe_train.routing.expected_load import ExpectedChoices

Vector = NDArray[np.float64]
_FIT_STEPS = 200


@dataclass(frozen=True)
class Flow:
    """One step of an exchange, forward, in one direction; per token of the layer, averaged over the ranks of a group.

    Attributes:
        rows: rows by link.
        pairs: (row, expert) pairs by link.
        peers: members of the group by link.
        max_over_mean: rows of the most loaded destination over the mean of all.
    """

    rows: dict[LinkType, float]
    pairs: dict[LinkType, float]
    peers: dict[LinkType, int]
    max_over_mean: float


def expected_flows(
    plan: LayoutPlan, choices: Sequence[ExpectedChoices], num_experts: int, load: Sequence[float] | None = None
) -> tuple[Flow, ...]:
    """The steps of an exchange: none where no token leaves its rank, two with a two-level exchange.

    Args:
        plan: the layout.
        choices: expected choices of tokens (:meth:`moe_train.routing.Router.expected_choices`).
        num_experts: E.
        load: relative loads of the experts, [E]; None: equal.
    """
    if plan.expert_parallel == 1:
        return ()
    ranks, inside = plan.expert_parallel, min(plan.ranks_per_node, plan.expert_parallel)
    rows, pairs = expected_rows(choices, num_experts, ranks, load), expected_pairs(choices, num_experts, ranks, load)
    if not plan.dispatches_by_node:
        return (_flow(rows, pairs, {"local": 1, "node": inside - 1, "across": ranks - inside}),)
    nodes = plan.nodes_per_group
    per_node = expected_rows(choices, num_experts, nodes, load)
    pairs_by_node = expected_pairs(choices, num_experts, nodes, load)
    return (
        _flow(per_node, pairs_by_node, {"local": 1, "node": 0, "across": nodes - 1}),
        _flow(rows, pairs, {"local": 1, "node": inside - 1, "across": 0}),
    )


def _flow(rows: Vector, pairs: Vector, peers: dict[LinkType, int]) -> Flow:
    """Sources are distributed evenly over the group, so a link carries the share of its members."""
    members = sum(peers.values())

    def by_link(total: float) -> dict[LinkType, float]:
        return {link: total * peers[link] / members for link in LINKS}

    total = float(rows.sum())
    return Flow(by_link(total), by_link(float(pairs.sum())), peers, float(rows.max()) / total * len(rows))


def expected_rows(
    choices: Sequence[ExpectedChoices], num_experts: int, parts: int, load: Sequence[float] | None = None
) -> Vector:
    """[parts]: rows per token that each of ``parts`` equal parts of the experts receives."""
    rows = np.zeros(parts)
    each = num_experts // parts
    for choice, weights in _weighted(choices, num_experts, load):
        low, high = choice.first // each, -(-(choice.first + choice.count) // each)
        rows[low:high] += choice.share * (1.0 - _missed(choice, weights, each, low, high))
    return rows


def expected_pairs(
    choices: Sequence[ExpectedChoices], num_experts: int, parts: int, load: Sequence[float] | None = None
) -> Vector:
    """[parts]: pairs per token that each part processes."""
    per_expert = np.zeros(num_experts)
    for choice, weights in _weighted(choices, num_experts, load):
        chosen = np.full(choice.count, choice.picks / choice.count)
        if weights is not None and not choice.independent:
            chosen = inclusion(weights, int(choice.picks))
        per_expert[choice.first : choice.first + choice.count] += choice.share * chosen
    pairs: Vector = per_expert.reshape(parts, -1).sum(1)
    return pairs


def _weighted(
    choices: Sequence[ExpectedChoices], num_experts: int, load: Sequence[float] | None
) -> list[tuple[ExpectedChoices, Vector | None]]:
    """Each choice with the weights of its experts, None if equal; loads also change shares within a stage."""
    if load is None:
        return [(choice, None) for choice in choices]
    every = np.asarray(load, dtype=np.float64)
    held = [every[c.first : c.first + c.count] for c in choices]
    stages = {c.stage for c in choices}
    share = {s: sum(c.share for c in choices if c.stage == s) for s in stages}
    mass = {s: sum(float(h.sum()) for c, h in zip(choices, held, strict=True) if c.stage == s) for s in stages}
    return [
        (
            ExpectedChoices(
                share[c.stage] * float(h.sum()) / mass[c.stage], c.first, c.count, c.picks, c.stage, c.independent
            ),
            None if h.sum() == 0 else sampling_weights(c.picks * h / h.sum()),
        )
        for c, h in zip(choices, held, strict=True)
    ]


def _missed(choice: ExpectedChoices, weights: Vector | None, each: int, low: int, high: int) -> Vector:
    """[high - low]: probability that a row has no expert in a part, of the parts low … high - 1 of ``each`` experts."""
    edges = np.arange(low, high + 1) * each
    inside = np.clip(edges, choice.first, choice.first + choice.count) - choice.first
    held = np.diff(inside).astype(np.float64)
    n, k = choice.count, choice.picks
    if choice.independent:
        return (1.0 - min(1.0, k / n)) ** held
    if weights is None:
        factors = [np.maximum(n - held - i, 0.0) / (n - i) for i in range(int(k))]
        return np.prod(factors, axis=0)  # type: ignore[no-any-return]
    blocks = [symmetric_sums(weights[a:b], int(k)) for a, b in pairwise(inside)]
    outside = _products_of_others(blocks, int(k))
    return np.array([other[-1] for other in outside]) / symmetric_sums(weights, int(k))[-1]  # type: ignore[no-any-return]


def symmetric_sums(weights: Vector, k: int) -> Vector:
    """[k + 1]: e_0 … e_k of the weights."""
    sums = np.zeros(k + 1)
    sums[0] = 1.0
    for weight in weights:
        sums[1:] += weight * sums[:-1]
    return sums


def inclusion(weights: Vector, k: int) -> Vector:
    """[n]: the probability of each expert to be among the k, π_e = w_e · e_{k-1}(others) / e_k."""
    total = symmetric_sums(weights, k)
    without = np.ones_like(weights)  # e_0 of the others; e_j(others) = e_j - w · e_{j-1}(others)
    for j in range(1, k):
        without = total[j] - weights * without
    return weights * without / total[k]  # type: ignore[no-any-return]


def sampling_weights(loads: Vector) -> Vector:
    """Weights whose inclusion probabilities are the given loads [n], which sum to k; none is above 1."""
    k = round(float(loads.sum()))
    target = np.minimum(loads, 1.0 - 1e-6)
    target = target * (k / target.sum())
    weights = target.copy()
    for _ in range(_FIT_STEPS if k > 1 else 0):
        got = inclusion(weights, k)
        weights *= np.where(got > 0, target / np.where(got > 0, got, 1.0), 0.0)
        weights /= weights.max()
    return weights


def _products_of_others(blocks: Sequence[Vector], k: int) -> list[Vector]:
    """For each block the polynomial of all others up to degree k (prefix times suffix, without division)."""

    def times(a: Vector, b: Vector) -> Vector:
        return np.convolve(a, b)[: k + 1]

    one = symmetric_sums(np.zeros(0), k)
    prefixes, suffixes = [one], [one]
    for block in blocks[:-1]:
        prefixes.append(times(prefixes[-1], block))
    for block in reversed(blocks[1:]):
        suffixes.append(times(suffixes[-1], block))
    return [times(a, b) for a, b in zip(prefixes, reversed(suffixes), strict=True)]
