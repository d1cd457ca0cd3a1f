"""The reduction of experts' gradients over replicas while backward runs, against the one after it."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.world import Worlds
from tests.parallel.replica_jobs import sums


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "16-bit copies"])
@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_the_reduction_after_backward(worlds: Worlds, world: int, half: bool) -> None:
    results = worlds(world).run(sums, half)
    for ours, want, order, _ in results:
        assert order == results[0][2] and [len(sizes) for sizes in order] == [2, 2], "the same on every rank"
        for one, other in zip(ours, want, strict=True):
            if world == 2:
                assert torch.equal(one, other)
            else:  # a ring adds up in an order that depends on the bucket
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert [begun for *_, begun in results] == [0, *[2] * (world - 1)], "a rank that has all gradients does not wait"
