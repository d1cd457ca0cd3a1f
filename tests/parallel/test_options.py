"""Overlap and fixed sizes: the same function on real ranks, and how often a host has to wait for the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from moe_train.parallel.dispatch_options import DispatchOptions
from tests.distributed.world import Worlds
from tests.parallel.option_jobs import layers, outcomes
from tests.parallel.pools import Case, alone
from tests.parallel.test_dispatch import check

FLAT, ONE_LEVEL, TWO_LEVELS = (4, 4, False), (4, 2, False), (4, 2, True)
EMPTY = (0, 9, 3, 0)


def test_overlap_computes_the_same_and_reads_once(worlds: Worlds) -> None:
    """On ranks some of which are empty; one read for all levels."""
    plain = Case(EMPTY, top_k=3)
    cases = [
        (dataclasses.replace(plain, shared=shared, routing=routing), *layout)
        for shared in (False, True)
        for layout in (FLAT, TWO_LEVELS)
        for routing in ("random", "one")
    ]
    for (case, *_), *found in zip(cases, *worlds(4).run(outcomes, cases), strict=True):
        check(found, alone(case), case)
        assert [outcome.reads for outcome in found] == [1] * 4, case


def test_fixed_rows_with_room_for_all_compute_the_same_and_read_nothing(worlds: Worlds) -> None:
    case = Case(EMPTY, top_k=2, shared=True, dtype=torch.float32)
    cases = [
        (dataclasses.replace(case, routing=routing, top_k=k, options=options), 4, 2, False)
        for routing, k in (("random", 3), ("one", 1), ("grouped", 2))
        for options in (DispatchOptions(fixed_rows=9), DispatchOptions(True, fixed_rows=10))
    ]
    cases.append((dataclasses.replace(case, options=DispatchOptions(fixed_rows=9), spec=(("sublayers", 2),)), *FLAT))
    for (one, *_), *found in zip(cases, *worlds(4).run(outcomes, cases), strict=True):
        check(found, alone(one), one)
        assert [(outcome.reads, outcome.dropped) for outcome in found] == [(0, 0)] * 4, one
        rows = one.options.fixed_rows
        for outcome in found:
            traffic = outcome.traffic.values()
            assert sum(t["dispatched_rows"] for t in traffic) == sum(t["returned_rows"] for t in traffic) == 4 * rows


def test_tokens_without_room_lose_their_experts_there_and_are_counted(worlds: Worlds) -> None:
    """One expert is asked for by all: of each rank's tokens the first three are served."""
    case = Case((5, 2, 0, 7), top_k=1, routing="one", dtype=torch.float32, options=DispatchOptions(fixed_rows=3))
    found = worlds(4).run(outcomes, [(case, *FLAT)])
    want = alone(case)
    starts = [0, 5, 7, 7]
    for (outcome,), share, start in zip(found, case.shares, starts, strict=True):
        served = min(3, share)
        torch.testing.assert_close(outcome.y[:served], want.y[start : start + served])
        torch.testing.assert_close(outcome.grad_x[:served], want.grad_x[start : start + served])
        assert not outcome.y[served:].any() and not outcome.grad_x[served:].any()
        assert outcome.dropped == share - served


TOP_K: dict[str, Any] = {"name": "top_k", "num_experts": 8, "top_k": 2}
SAM: dict[str, Any] = {"name": "sam", "num_experts": 8, "num_groups": 4, "top_k": 2}
CAPACITY = {"capacity_factor": 1.0, "capacity_group": "rank"}
STRATEGIES = [
    {"name": "switch", "num_experts": 8},
    TOP_K,
    {**TOP_K, "shared_expert": True},
    SAM,
    {"name": "hash", "num_experts": 8},
    {"name": "thor", "num_experts": 8, "draw": "token"},
    {"name": "random", "num_experts": 8},
    {"name": "xmoe", "num_experts": 8, "expert_sublayers": 2},
]


def test_a_layer_waits_once_without_limits_and_never_with_fixed_sizes(worlds: Worlds) -> None:
    """By the operators that a GPU would let the host wait for, forward and backward, router and losses included."""
    fixed = DispatchOptions(fixed_rows=13)
    jobs: list[tuple[Any, ...]] = [(routing, DispatchOptions(), 13, torch.float32) for routing in STRATEGIES]
    jobs += [(routing, fixed, 13, torch.float32) for routing in STRATEGIES]
    jobs += [({**routing, **CAPACITY}, fixed, 13, torch.float32) for routing in (TOP_K, SAM)]
    capped = [({**routing, **CAPACITY}, DispatchOptions(), 13, torch.float32) for routing in (TOP_K, SAM)]
    found = worlds(2).run(layers, jobs + capped)
    for rank in found:
        for (routing, options, *_), result in zip(jobs, rank, strict=False):
            assert result.waits == [] and result.dropped == 0, routing
            assert result.reads == (0 if options.fixed_rows else 1), routing
        same = [(rank[i], rank[i + len(STRATEGIES)]) for i in range(len(STRATEGIES))]
        same += list(zip(rank[-4:-2], rank[-2:], strict=True))
        for ours, theirs in same:
            torch.testing.assert_close(ours.y, theirs.y)
            torch.testing.assert_close(ours.grad_x, theirs.grad_x)
            for name, grad in theirs.grads.items():
                torch.testing.assert_close(ours.grads[name], grad)
        assert all(result.routing_dropped > 0 for result in rank[-4:]), "capacity must act"


@pytest.mark.parametrize("options", [DispatchOptions(True), DispatchOptions(fixed_rows=6)], ids=str)
def test_recomputation_meets_again(worlds: Worlds, options: DispatchOptions) -> None:
    case = Case((4, 0), recompute=True, dtype=torch.float32, options=options)
    check(
        [o for (o,) in worlds(2).run(outcomes, [(case, 2, 2, False)])],
        alone(dataclasses.replace(case, recompute=False)),
        case,
    )
