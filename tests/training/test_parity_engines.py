"""Every strategy under DeepSpeed's ZeRO 0, 1 and 2, on 1, 2 and 4 processes, against DDP on one: fp32, within 1e-5."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from moe_train.data.folder import DataFolder
from tests.distributed.world import Worlds
from tests.training.parity_jobs import Case, Result, compare, train, train_all
from tests.training.test_parity import LAYOUTS, MORE_LAYOUTS, STRATEGIES, case

pytest.importorskip("deepspeed")

WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"expert_parallel": 1}),
    "2 ranks": LAYOUTS["2 ranks"],
    "4 ranks": LAYOUTS["4 ranks"],
    "2 replicas of 2 ranks": MORE_LAYOUTS["2 replicas of 2 ranks"],
}
IN_STEP = 5  # trainings that ranks run in one call, which has its time


@cache
def alone(path: str, name: str, **changes: Any) -> Result:
    return train(path, asked(name, **changes))


def asked(name: str, **changes: Any) -> Case:
    """fp32; a smaller step than in fp64, so that rounding carries no token over to another expert."""
    return case(name, dtype=torch.float32, lr=0.05, **changes)


def check(worlds: Worlds, data: DataFolder, names: list[str], layout: str, stage: int, **changes: Any) -> None:
    world, keys = WORLDS[layout]
    engine = {"name": "deepspeed", "zero_stage": stage}
    cases = [dataclasses.replace(asked(name, engine=engine, **changes), **keys) for name in names]
    found: list[list[Result]] = [[] for _ in range(world)]
    for first in range(0, len(cases), IN_STEP):
        new = worlds(world).run(train_all, str(data.path), cases[first : first + IN_STEP])
        for results, more in zip(found, new, strict=True):
            results += more
    for number, name in enumerate(names):
        try:
            compare([results[number] for results in found], alone(str(data.path), name, **changes), 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{name}, {layout}, ZeRO {stage}: {error}") from error


def test_five_strategies_under_zero_2(worlds: Worlds, tiny_data: DataFolder) -> None:
    """X-MoE and Soft MoE have parameters that are single numbers."""
    check(worlds, tiny_data, ["smoe", "xmoe", "sam", "thor by token", "soft_moe"], "2 ranks", 2)


def test_all_tokens_on_one_rank_under_zero_1(worlds: Worlds, tiny_data: DataFolder) -> None:
    assert alone(str(tiny_data.path), "switch", skewed=True).load == 1.0
    check(worlds, tiny_data, ["switch", "sam"], "2 ranks", 1, skewed=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("layout", WORLDS)
def test_all_strategies(worlds: Worlds, tiny_data: DataFolder, layout: str, stage: int) -> None:
    """A rank that hangs ends the call after the time that a world allows it."""
    check(worlds, tiny_data, list(STRATEGIES), layout, stage)
