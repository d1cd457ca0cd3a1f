"""Configurations drawn by seed: strategy x layout x sizes x uneven batches, three updates each, against one process."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from moe_train.data.folder import DataFolder
from moe_train.parallel.dispatch_options import DispatchOptions
from tests.distributed.world import Worlds
from tests.training.parity_jobs import Case, compare, train, train_all

STRATEGIES = ("switch", "top_k", "expert_choice", "hash", "random", "thor", "smoe", "xmoe", "sam", "soft_moe")
IN_STEP = 10  # cases that ranks run in one call


def drawn(seed: int, worlds: tuple[int, ...]) -> tuple[int, Case]:
    """A world's size and a training in it; the same for the same seed."""
    draw = random.Random(seed)
    world = draw.choice(worlds)
    sizes = [n for n in (2, 3, 4) if world % n == 0] * 4 + [1]
    expert_parallel = draw.choice(sizes)
    nodes = [n for n in (1, 2, 3, 4) if world % n == 0 and (n % expert_parallel == 0 or expert_parallel % n == 0)]
    case = Case(
        routing=_routing(draw, expert_parallel),
        updates=tuple(_update(draw) for _ in range(3)),
        expert_parallel=expert_parallel,
        ranks_per_node=draw.choice(nodes),
        two_level=draw.random() < 0.5,
        skewed=draw.random() < 0.15,
        clip_norm=draw.choice([0.0, 0.3]),
        model={
            "encoder_layers": draw.choice([1, 2]),
            "sparse_layers": draw.choice(["all", "odd", "insert_after:1"]),
            "decoder_sparse_layers": draw.choice(["none", "all", "insert_after:1"]),
            "embed_dim": draw.choice([6, 8, 14]),
            "ffn_dim": draw.choice([5, 12]),
            "norm_order": draw.choice(["pre", "post"]),
        },
    )
    if draw.random() < 0.5:
        case = dataclasses.replace(case, options=_options(draw))
    return world, case


def _options(draw: random.Random) -> DispatchOptions:
    """Fixed sizes have room for every token of the largest micro-batch, twice."""
    room = draw.choice([0, 0, 2 * 9 * 64])
    return DispatchOptions(overlap=draw.random() < 0.5, fixed_rows=room)


def _routing(draw: random.Random, expert_parallel: int) -> dict[str, Any]:
    name = draw.choice(STRATEGIES)
    experts = expert_parallel * draw.choice([1, 2, 3])
    keys: dict[str, Any] = {"name": name, "num_experts": max(experts, 2 * expert_parallel)}
    if name in ("top_k", "smoe"):
        keys |= {"top_k": draw.choice([1, 2]), "normalise": draw.choice(["none", "after_drop"])}
        keys["normalise"] = "none" if keys["top_k"] == 1 else keys["normalise"]
    if name == "sam":
        keys["num_groups"] = draw.choice([n for n in range(1, experts + 1) if keys["num_experts"] % n == 0])
        keys["top_k"] = draw.randint(1, keys["num_experts"] // keys["num_groups"])
    if name in ("switch", "top_k", "sam") and draw.random() < 0.3:
        keys |= {"capacity_factor": draw.choice([0.6, 1.0]), "capacity_group": "global"}
    if name in ("thor", "random"):
        keys["draw"] = draw.choice(["batch", "sentence", "token"])
    if name == "xmoe":
        keys["expert_sublayers"] = draw.choice([1, 2])
    if name in ("expert_choice", "soft_moe"):
        keys["decoder"] = draw.choice(["switch", "hash"])
    return keys


def _update(draw: random.Random) -> tuple[tuple[int, ...], ...]:
    sizes = [draw.choice([1, 2, 3, 5, 9]) for _ in range(draw.choice([1, 2]))]
    return tuple(tuple(draw.randrange(1200) for _ in range(size)) for size in sizes)


def check(worlds: Worlds, data: DataFolder, seeds: range, sizes: tuple[int, ...]) -> None:
    path = str(data.path)
    by_world: dict[int, list[tuple[int, Case]]] = {}
    for seed in seeds:
        world, case = drawn(seed, sizes)
        by_world.setdefault(world, []).append((seed, case))
    for world, cases in by_world.items():
        for first in range(0, len(cases), IN_STEP):
            some = cases[first : first + IN_STEP]
            found = worlds(world).run(train_all, path, [case for _, case in some])
            for number, (seed, case) in enumerate(some):
                try:
                    compare([results[number] for results in found], train(path, case), 1e-12)
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, {world} ranks, {case}: {error}") from error


def test_ten_configurations(worlds: Worlds, tiny_data: DataFolder) -> None:
    check(worlds, tiny_data, range(10), (2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 210, 20))
def test_two_hundred_configurations(worlds: Worlds, tiny_data: DataFolder, first: int) -> None:
    """A rank that hangs ends the call after the time that a world allows it."""
    check(worlds, tiny_data, range(first, first + 20), (2, 3, 4))
