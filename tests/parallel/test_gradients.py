"""Training steps over ranks against one process: dense and expert gradients, their norm, clipping, parameters."""

from __future__ import annotations

import pytest
import torch

from moe_train.experts import ExpertPool, ExpertSpec
from tests.distributed.world import Worlds
from tests.parallel.training import initial, statistics, train


@pytest.mark.parametrize("with_ddp", [False, True], ids=["own reduction", "DDP"])
@pytest.mark.parametrize(("world", "expert_parallel"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_ten_steps_equal_one_process(worlds: Worlds, world: int, expert_parallel: int, with_ddp: bool) -> None:
    want, norms = train(None, False)
    assert max(norms) > 0.5, "clipping must act in this test"
    whole = torch.cat([p.flatten() for p in want.values()]).norm()
    for state, ours in worlds(world).run(train, expert_parallel, with_ddp):
        assert ours == pytest.approx(norms, rel=1e-10)
        for name, value in state.items():
            assert (value - want[name]).norm() <= 1e-12 * whole, name


def test_dist_reduction(worlds: Worlds) -> None:
    assert worlds(4).run(statistics) == [(4, rank, [6, 4], 3.0, False) for rank in range(4)]


@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_experts_start_alike_under_any_layout(worlds: Worlds, expert_parallel: int) -> None:
    torch.manual_seed(5)
    want = ExpertPool(ExpertSpec(dim=6, hidden=10), 8).sublayers[0].fc1_weight
    for held in worlds(4).run(initial, expert_parallel):
        assert len(held) == 8 // expert_parallel
        assert all(torch.equal(weight, want[e]) for e, weight in held.items())
