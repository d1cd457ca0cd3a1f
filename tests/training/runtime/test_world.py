"""Ranks tell one another plain values; what another process sends in their place is never built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import CheckpointError
from moe_train.training.runtime.world import World
from tests.distributed.world import Worlds
from tests.training import world_jobs


@pytest.mark.parametrize("value", [None, True, "ä" * 70_000, {"a": [1, 2.5, {"b": "\x1b"}], "c": None}, [0.1 + 0.2]])
def test_plain_values_arrive_as_they_are(value: Any, worlds: Worlds) -> None:
    assert worlds(2).run(world_jobs.broadcast_from_rank0, value) == [(value, [[0, value], [1, value]])] * 2


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        World(size=2).broadcast({1, 2})


def test_infinite_scores_arrive(worlds: Worlds) -> None:
    (seen, _), _ = worlds(2).run(world_jobs.broadcast_from_rank0, [math.inf, -math.inf, math.nan])
    assert seen[:2] == [math.inf, -math.inf] and math.isnan(seen[2])


def test_one_rank_s_error_is_everybody_s(worlds: Worlds) -> None:
    arguments = ("the tensor 'ü' is missing", "a/b", "train again")
    seen = worlds(2).run(world_jobs.failed, "user")
    assert seen == [(CheckpointError, arguments, False), (CheckpointError, arguments, True)]
    assert worlds(2).run(world_jobs.failed, "system")[0] == (FileNotFoundError, (2, "a/b"), False)


@pytest.mark.parametrize(("way", "target"), [("broadcast", 1), ("gather", 1), ("plan", 0)])
def test_a_pickle_from_another_rank_runs_nothing(way: str, target: int, worlds: Worlds, tmp_path: Path) -> None:
    said = worlds(2).run(world_jobs.bombed, str(tmp_path), way)
    assert not (tmp_path / f"built-{way}").exists()
    assert said[target] in ("UnicodeDecodeError", "UnpicklingError") and not said[1 - target]
