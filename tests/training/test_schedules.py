from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import ScheduleConfig
from moe_train.training.schedules import learning_rate

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
