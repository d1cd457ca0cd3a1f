"""Cycles are collected at fixed updates only, and the collector is as before afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from moe_train.training.runtime.garbage_collection import EVERY, PeriodicCollection


class Node:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("enabled", [True, False])
def test_cycles_live_until_the_update_of_a_collection(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with PeriodicCollection() as garbage:
            found = weakref.ref(Node())
            many = [[] for _ in range(50_000)]  # far above the thresholds of automatic collection
            garbage.after_update(EVERY + 1)
            assert not gc.isenabled() and gc.get_freeze_count() > 0 and found() is not None
            garbage.after_update(2 * EVERY)
            assert found() is None and len(many) == 50_000
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_runs_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="stopped"), PeriodicCollection():
        raise ValueError("stopped")
    assert gc.isenabled()
