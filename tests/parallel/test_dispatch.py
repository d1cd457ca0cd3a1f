"""Experts over real processes against one process: outputs, gradients, rows; with empty ranks and one-sided loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.distributed.world import Worlds
from tests.parallel.pools import Case, Outcome, alone, on_rank

LAYOUTS = [
    # world, expert_parallel, ranks per node, two levels
    (2, 1, 2, False),
    (2, 2, 2, False),
    (4, 1, 4, False),
    (4, 2, 2, False),
    (4, 4, 4, False),
    (4, 4, 2, False),
    (4, 4, 2, True),
    (4, 4, 1, True),
]


def shares(world: int, uneven: bool) -> tuple[int, ...]:
    return ((0, 9, 3, 0) if world == 4 else (7, 0)) if uneven else (5,) * world


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (got - want).norm() <= bound * want.norm().clamp_min(1e-3)


def check(outcomes: list[Outcome], want: Outcome, case: Case) -> None:
    for name in ("y", "grad_x", "grad_weight"):
        close(torch.cat([getattr(o, name) for o in outcomes]), getattr(want, name), case.dtype)
    for name, by_expert in want.experts.items():
        whole = torch.stack([by_expert[e] for e in range(case.num_experts)])
        for e in range(case.num_experts):
            held = [o.experts[name][e] for o in outcomes if e in o.experts[name]]
            assert held
            for grad in held:
                bound = 1e-12 if case.dtype == torch.float64 else 1e-5
                assert (grad - by_expert[e]).norm() <= bound * whole.norm().clamp_min(1e-3)
    for outcome in outcomes:
        assert outcome.norm == pytest.approx(want.norm, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "empty ranks"])
@pytest.mark.parametrize("routing", ["random", "one", "few"])
def test_parity_with_one_process(
    worlds: Worlds, layout: tuple[int, int, int, bool], dtype: torch.dtype, uneven: bool, routing: str
) -> None:
    size, *rest = layout
    case = Case(shares(size, uneven), routing=routing, dtype=dtype)
    check(worlds(size).run(on_rank, case, *rest), alone(case), case)


def test_no_token_anywhere(worlds: Worlds) -> None:
    case = Case((0, 0, 0, 0))
    for outcome in worlds(4).run(on_rank, case, 4, 4, False):
        assert outcome.y.shape == (0, case.dim) and outcome.norm == 0.0


@pytest.mark.parametrize("spec", [{"sublayers": 2}, {"activation": "gelu", "bias": False}], ids=str)
def test_every_kind_of_expert(worlds: Worlds, spec: dict) -> None:
    case = Case((5, 0, 2, 6), spec=tuple(spec.items()))
    check(worlds(4).run(on_rank, case, 2, 4, False), alone(case), case)


def test_recomputation_meets_again_in_the_collectives(worlds: Worlds) -> None:
    case = Case((4, 0, 7, 2), recompute=True)
    check(worlds(4).run(on_rank, case, 4, 2, True), alone(replace(case, recompute=False)), case)


def test_bf16_travels_as_bf16_and_sums_in_fp32(worlds: Worlds) -> None:
    # GELU: where rounding carries a number over ReLU's corner, its whole gradient comes or goes.
    case = Case((8,) * 4, top_k=4, dtype=torch.bfloat16, dim=32, spec=(("activation", "gelu"),))
    outcomes = worlds(4).run(on_rank, case, 4, 4, False)
    exact = alone(replace(case, dtype=torch.float64))
    for name in ("y", "grad_x", "grad_weight"):
        got, want = torch.cat([getattr(o, name) for o in outcomes]), getattr(exact, name)
        assert (got.double() - want).norm() < 0.02 * want.norm()
    for outcome in outcomes:
        for traffic in outcome.traffic.values():
            assert traffic["payload_bytes"] == 2 * (traffic["dispatched_rows"] + traffic["returned_rows"]) * 32 * 2


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_rows_of_grouped_and_flat_choices(worlds: Worlds, top_k: int) -> None:
    """SAM's promise: groups inside a rank cost one row whatever k is; flat choices at most min(k, ranks)."""
    world, tokens = worlds(4), 6
    grouped = Case((tokens,) * 4, num_experts=16, top_k=top_k, routing="grouped")
    flat = Case((tokens,) * 4, num_experts=16, top_k=top_k)
    for case, most in ((grouped, 1), (flat, min(top_k, 4))):
        outcomes = world.run(on_rank, case, 4, 4, False)
        _, choices, _, _ = case.batch()
        wanted = sum(len({int(e) // 4 for e in row}) for row in choices)
        sent = sum(t["dispatched_rows"] for o in outcomes for t in o.traffic.values())
        back = sum(t["returned_rows"] for o in outcomes for t in o.traffic.values())
        assert sent == back == wanted <= most * tokens * 4
        assert case is flat or sent == tokens * 4


def test_bytes_are_counted_by_link(worlds: Worlds) -> None:
    case = Case((6,) * 4, num_experts=16, top_k=4, dtype=torch.float32)
    world = worlds(4)
    one, two = (world.run(on_rank, case, 4, 2, levels) for levels in (False, True))
    for outcomes in (one, two):
        for outcome in outcomes:
            for traffic in outcome.traffic.values():
                rows = traffic["dispatched_rows"] + traffic["returned_rows"]
                # Forward and backward carry the same rows, in opposite directions.
                assert traffic["payload_bytes"] == 2 * rows * case.dim * 4

    def across(outcomes: list[Outcome]) -> int:
        return sum(o.traffic["across"]["dispatched_rows"] for o in outcomes)

    _, choices, _, _ = case.batch()
    nodes = [{int(e) // 8 for e in row} for row in choices]
    home = [token // 12 for token in range(24)]
    assert across(two) == sum(len(n - {h}) for n, h in zip(nodes, home, strict=True))
    assert across(one) > across(two)
