from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_train.config import ScheduleConfig
from moe_train.training.optim.lr_schedule import RunEnd, learning_rate

PEAK, LAST = 0.5, 1000


def rate(update: int, **keys: Any) -> float:
    return learning_rate(ScheduleConfig(**{"warmup_updates": 100, "warmup_init_lr": 0.0, **keys}), PEAK, LAST, update)


@pytest.mark.parametrize("name", ["inverse_sqrt", "linear", "cosine", "polynomial", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(name: str) -> None:
    assert rate(1, name=name) == pytest.approx(PEAK / 100)
    assert rate(50, name=name) == pytest.approx(PEAK / 2)
    assert rate(100, name=name) == pytest.approx(PEAK)
    assert rate(50, name=name, warmup_init_lr=0.1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("keys", "update", "share"),
    [
        ({"name": "inverse_sqrt"}, 400, 0.5),
        ({"name": "inverse_sqrt"}, 10000, 0.1),
        ({"name": "constant"}, 10000, 1.0),
        ({"name": "linear"}, 550, 0.5),
        ({"name": "linear"}, 1000, 0.0),
        ({"name": "linear"}, 5000, 0.0),
        ({"name": "cosine"}, 550, 0.5),
        ({"name": "cosine"}, 325, 0.5 * (1 + math.cos(math.pi / 4))),
        ({"name": "polynomial", "power": 2.0}, 550, 0.25),
    ],
)
def test_decay(keys: dict[str, Any], update: int, share: float) -> None:
    assert rate(update, **keys) == pytest.approx(PEAK * share, abs=1e-12)


def test_floor() -> None:
    assert rate(1000, name="cosine", end_lr=0.1) == pytest.approx(0.1)
    assert rate(550, name="linear", end_lr=0.1) == pytest.approx(0.3)


@given(st.sampled_from(["inverse_sqrt", "linear", "cosine", "polynomial", "constant"]), st.integers(0, 50), st.data())
def test_never_rises_after_the_warmup_and_stays_in_bounds(name: Any, warmup: int, data: st.DataObject) -> None:
    config = ScheduleConfig(name=name, warmup_updates=warmup)
    update = data.draw(st.integers(warmup + 1, 200))
    now, later = (learning_rate(config, PEAK, 120, u) for u in (update, update + 1))
    assert 0.0 <= later <= now <= PEAK


@pytest.mark.parametrize("name", ["inverse_sqrt", "polynomial"])
def test_an_update_has_the_rate_that_fairseq_gives_the_next(name: Any) -> None:
    """fairseq's trainer asks its scheduler after n updates for the rate of update n + 1; ours has it at update n."""
    from moe_train.fairseq_compat import apply

    apply()
    from fairseq.optim.lr_scheduler import inverse_square_root_schedule, polynomial_decay_schedule
    from fairseq.optim.sgd import SGD

    optimizer = SGD(SimpleNamespace(lr=[PEAK], momentum=0.0, weight_decay=0.0), [nn.Parameter(torch.zeros(1))])
    if name == "inverse_sqrt":
        config: Any = SimpleNamespace(lr=[PEAK], warmup_updates=100, warmup_init_lr=-1)
        theirs: Any = inverse_square_root_schedule.InverseSquareRootSchedule(config, optimizer)
    else:
        config = SimpleNamespace(lr=[PEAK], warmup_updates=100, end_learning_rate=0.01, power=2.0)
        config.total_num_update, config.force_anneal = LAST, None
        theirs = polynomial_decay_schedule.PolynomialDecayLRSchedule(config, optimizer)
    for update in (1, 2, 50, 99, 100, 101, 150, 999, 1000, 1001):
        floor = 0.01 if name == "polynomial" else 0.0
        assert rate(update, name=name, power=2.0, end_lr=floor) == pytest.approx(theirs.step_update(update))


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt"])
def test_an_extended_run_holds_its_rate_or_has_a_schedule_of_its_own(name: Any) -> None:
    config = ScheduleConfig(name=name, warmup_updates=4, warmup_init_lr=0.0, end_lr=0.01)

    def rates(*ends: RunEnd, max_updates: int, updates: range) -> list[float]:
        return [learning_rate(config, PEAK, max_updates, update, ends) for update in updates]

    first, all_anew = (rates(max_updates=last, updates=range(1, 41)) for last in (20, 40))
    for extend, then in (("hold", [first[19]] * 20), ("restart", first[:20]), (None, all_anew[20:])):
        end = RunEnd(20, 20, extend)
        assert rates(end, max_updates=40, updates=range(21, 41)) == then
        begun = all_anew[:20] if extend is None else first[:20]  # where an earlier checkpoint is gone back to
        assert rates(end, max_updates=40, updates=range(1, 21)) == begun
    twice = (RunEnd(20, 20, "restart"), RunEnd(40, 40, "hold"))
    assert rates(*twice, max_updates=60, updates=range(21, 61)) == first[:20] + [first[19]] * 20
    stopped_early = RunEnd(12, 20, "hold")
    assert rates(stopped_early, max_updates=20, updates=range(13, 21)) == [first[11]] * 8
