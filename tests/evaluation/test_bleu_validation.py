"""Validation BLEU while training: the same for one rank, several ranks, and experts spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.config import LaunchConfig
from moe_train.data.folder import DataFolder
from moe_train.launch.local import launch
from tests.evaluation.jobs import bleu


@pytest.fixture(scope="module")
def alone(tiny_data: DataFolder) -> dict[str, Any]:
    return bleu(str(tiny_data.path), "switch", 1)


def test_every_trained_direction_is_scored(alone: dict[str, Any], tiny_data: DataFolder) -> None:
    assert sorted(alone["bleu"]) == sorted(tiny_data.directions)
    assert len(set(alone["bleu"].values())) > 1
    assert alone["experts"] == 4


@pytest.mark.processes
@pytest.mark.warm_start
@pytest.mark.parametrize("expert_parallel", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_on_two_ranks(
    alone: dict[str, Any], tiny_data: DataFolder, tmp_path: Path, expert_parallel: int
) -> None:
    arguments = {"data": str(tiny_data.path), "strategy": "switch", "expert_parallel": expert_parallel}
    found = launch("tests.evaluation.jobs:bleu", arguments, LaunchConfig(processes=2), tmp_path)
    assert [f["bleu"] for f in found] == [alone["bleu"]] * 2
    assert [f["experts"] for f in found] == [4 // expert_parallel] * 2
