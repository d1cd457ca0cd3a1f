"""ZeRO 1 of engine ddp: the same bits as without it, a part of the optimizer's state on each rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.world import Worlds
from tests.training.engine_jobs import Case, joined, run

PLAIN, SHARDED = {"name": "ddp"}, {"name": "ddp", "zero_stage": 1}


def adam(precision: str) -> dict[str, Any]:
    return {"precision": precision, "optimizer": {"name": "adam"}}


@pytest.mark.parametrize(("size", "expert_parallel", "precision"), [(2, 1, "fp32"), (2, 2, "fp16"), (4, 2, "bf16")])
def test_the_same_bits_with_a_part_of_the_state(
    worlds: Worlds, size: int, expert_parallel: int, precision: str
) -> None:
    keys: dict[str, Any] = {"training": adam(precision), "expert_parallel": expert_parallel, "poison": 2, "last": 5}
    sharded, plain = (worlds(size).run(run, Case(engine, **keys)) for engine in (SHARDED, PLAIN))
    for ours, want in zip(joined(sharded), joined(plain), strict=True):
        assert ours.keys() == want.keys() and ours
        assert all(torch.equal(tensor, want[name]) for name, tensor in ours.items())
    assert [r.applied for r in sharded] == [r.applied for r in plain] and sharded[0].applied[2] is False
    held = Counter(name for result in sharded for name in result.moments if not name.endswith(".step"))
    assert set(held.values()) == {1}, "each tensor of the state is on one rank"
    moments = [sum(t.nbytes for t in result.moments.values()) for result in sharded]
    most = max(sum(t.nbytes for t in result.moments.values()) for result in plain)
    replicas = size // expert_parallel
    assert max(moments) <= 0.6 * most if replicas > 1 else max(moments) < most


@pytest.mark.parametrize(("first", "then"), [(SHARDED, PLAIN), (PLAIN, SHARDED)])
def test_checkpoints_go_on_under_any_number_of_ranks(
    worlds: Worlds, first: dict[str, Any], then: dict[str, Any], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"training": adam("fp32"), "expert_parallel": 2}
    worlds(4).run(run, Case(first, last=4, folder=str(tmp_path), **keys))
    tensors, moments = joined(worlds(2).run(run, Case(then, first=4, last=6, folder=str(tmp_path), **keys)))
    whole = run(Case(PLAIN, adam("fp32"), last=6))
    assert moments.keys() == whole.moments.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-4, atol=1e-5)
