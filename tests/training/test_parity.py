"""Every strategy with its experts divided over ranks, against one process: outputs, gradients, norm, parameters.

fp64, SGD with clipping: the parameters after one update tell its (clipped) gradient. The real task, criterion, engine
and step; micro-batches that are uneven, leave ranks without a sentence, or send all tokens to one expert.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from moe_train.data.folder import DataFolder
from moe_train.parallel.dispatch_options import DispatchOptions
from tests.distributed.world import Worlds
from tests.training.parity_jobs import Case, Result, compare, train, train_all

STRATEGIES: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "switch": {"name": "switch", "balance_weight": 0.3, "z_weight": 0.1},
    "top_k": {"name": "top_k", "top_k": 2},
    "top_k, shared expert, balancing bias": {
        "name": "top_k", "top_k": 2, "shared_expert": True, "scores": "sigmoid", "balancing_bias_rate": 0.01,
    },
    "expert_choice": {"name": "expert_choice", "decoder": "top_k"},
    "hash": {"name": "hash"},
    "random": {"name": "random"},
    "thor": {"name": "thor", "draw": "batch"},
    "thor by token": {"name": "thor", "draw": "token"},
    "smoe": {"name": "smoe"},
    "xmoe": {"name": "xmoe", "expert_sublayers": 2},
    "sam": {"name": "sam", "num_groups": 4},
    "sam, two matrices": {"name": "sam", "num_groups": 2, "top_k": 3, "matrices": "two"},
    "soft_moe": {"name": "soft_moe", "decoder": "switch"},
}  # fmt: skip
SIZES = ((9, 2), (1,), (4,), (6, 3), (2,), (7,), (3,), (8,), (5,), (10,))
LAYOUTS = {"2 ranks": (2, {"expert_parallel": 2}), "4 ranks": (4, {"expert_parallel": 4})}
MORE_LAYOUTS = {
    "1 rank": (1, {"expert_parallel": 1}),
    "2 replicas": (2, {"expert_parallel": 1}),
    "2 replicas of 2 ranks": (4, {"expert_parallel": 2}),
    "4 ranks on 2 nodes": (4, {"expert_parallel": 4, "ranks_per_node": 2}),
    "4 ranks on 2 nodes, two levels": (4, {"expert_parallel": 4, "ranks_per_node": 2, "two_level": True}),
}
each_strategy = pytest.mark.parametrize("name", STRATEGIES)


def updates() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Ten updates; sentences of all directions, as the sizes say: fewer than ranks in some, one in one."""
    start, made = 0, []
    for sizes in SIZES:
        micro_batches = []
        for size in sizes:
            micro_batches.append(tuple((start + 37 * i) % 1200 for i in range(size)))
            start += 401
        made.append(tuple(micro_batches))
    return tuple(made)


def case(name: str, **changes: Any) -> Case:
    return Case({"num_experts": 8, **STRATEGIES[name]}, updates(), **changes)


@cache
def alone(path: str, name: str, **changes: Any) -> Result:
    return train(path, case(name, **changes))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("4 ranks", name) for name in STRATEGIES),
        *(("2 ranks", name) for name in ("dense", "switch", "sam", "soft_moe")),
    ],
)
def test_ten_updates_are_those_of_one_process(worlds: Worlds, tiny_data: DataFolder, name: str, layout: str) -> None:
    """On two ranks one strategy of each kind of exchange: none, pairs, groups, slots."""
    check(worlds, tiny_data, name, *LAYOUTS[layout])


@pytest.mark.slow
@each_strategy
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_so_are_those_of_other_layouts(worlds: Worlds, tiny_data: DataFolder, name: str, layout: str) -> None:
    check(worlds, tiny_data, name, *MORE_LAYOUTS[layout])


def check(worlds: Worlds, data: DataFolder, name: str, world: int, layout: dict[str, Any]) -> None:
    path, want = str(data.path), alone(str(data.path), name)
    assert max(want.norms) > 0.5 > 0.0, "clipping must act"
    found = worlds(world).run(train, path, dataclasses.replace(case(name), **layout))
    compare(found, want, 1e-12)
    if name != "dense":
        assert (found[0].traffic > 0) == (layout["expert_parallel"] > 1)


@pytest.mark.parametrize("name", ["switch", "sam", "top_k"])
def test_all_tokens_on_one_rank(worlds: Worlds, tiny_data: DataFolder, name: str) -> None:
    path, want = str(tiny_data.path), alone(str(tiny_data.path), name, skewed=True)
    assert want.load == {"switch": 1.0, "sam": 0.5, "top_k": 0.5}[name], "each token must choose alike"
    layouts = [LAYOUTS["4 ranks"][1], MORE_LAYOUTS["4 ranks on 2 nodes, two levels"][1]]
    cases = [dataclasses.replace(case(name, skewed=True), **layout) for layout in layouts]
    found = worlds(4).run(train_all, path, cases)
    for number in range(len(cases)):
        compare([results[number] for results in found], want, 1e-12)


def test_overlap_and_fixed_sizes_train_alike(worlds: Worlds, tiny_data: DataFolder) -> None:
    """A shared expert is computed while rows are on their way, over two levels; and dispatch of fixed size."""
    name, path = "top_k, shared expert, balancing bias", str(tiny_data.path)
    two_levels = MORE_LAYOUTS["4 ranks on 2 nodes, two levels"][1]
    cases = [
        case(name, options=DispatchOptions(overlap=True), **two_levels),
        case(name, options=DispatchOptions(overlap=True, fixed_rows=640), expert_parallel=2),
    ]
    found = worlds(4).run(train_all, path, cases)
    for number in range(len(cases)):
        compare([results[number] for results in found], alone(path, name), 1e-12)


def test_adam_in_fp64(worlds: Worlds, tiny_data: DataFolder) -> None:
    changes: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3}
    want = alone(str(tiny_data.path), "switch", **changes)
    compare(
        worlds(4).run(train, str(tiny_data.path), case("switch", expert_parallel=2, **changes)), want, 1e-10
    )  # fmt: skip
