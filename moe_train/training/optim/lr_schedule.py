"""Learning rates: a linear warm-up, then a named decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_train.config import ScheduleConfig
from moe_train.errors import ConfigError, did_you_mean

# share of the peak rate, from (updates after the warm-up, updates of the decay, config)
Decay = Callable[[int, int, ScheduleConfig], float]
_DECAYS: dict[str, Decay] = {}
_ENDING = ("linear", "polynomial", "cosine")  # those that reach end_lr at max_updates


def register_decay(name: str) -> Callable[[Decay], Decay]:
    """Makes ``training.schedule.name=name`` use the decorated function."""

    def decorate(decay: Decay) -> Decay:
        if name in _DECAYS:
            raise ValueError(f"the schedule {name!r} is registered twice")
        _DECAYS[name] = decay
        return decay

    return decorate


@dataclass(frozen=True)
class RunEnd:
    """Where a run had ended before ``training.max_updates`` was raised.

    Attributes:
        update: its last one.
        max_updates: of its schedule.
        extend: ``training.schedule.extend`` of the updates after it.
    """

    update: int
    max_updates: int
    extend: str | None


def learning_rate(
    config: ScheduleConfig, peak: float, max_updates: int, update: int, ends: Sequence[RunEnd] = ()
) -> float:
    """The rate of an update.

    Args:
        peak: ``training.optimizer.lr``, reached at the end of the warm-up.
        max_updates: where decays with an end reach it.
        update: counted from 1.
        ends: of a run that was extended, in their order.
    """
    ends = [end for end in ends if end.extend]  # the others' updates are part of what came later
    before = [end for end in ends if end.update < update]
    planned = ends[len(before)].max_updates if len(before) < len(ends) else max_updates
    if before and before[-1].extend == "hold":
        return learning_rate(config, peak, before[-1].max_updates, before[-1].update, before[:-1])
    begun = before[-1].update if before else 0
    return _rate(config, peak, planned - begun, update - begun)


def _rate(config: ScheduleConfig, peak: float, max_updates: int, update: int) -> float:
    if update <= config.warmup_updates:
        return config.warmup_init_lr + (peak - config.warmup_init_lr) * update / config.warmup_updates
    if config.name not in _DECAYS:
        raise ConfigError(f"there is no schedule '{config.name}'", remedy=did_you_mean(config.name, _DECAYS))
    after, span = update - config.warmup_updates, max(1, max_updates - config.warmup_updates)
    floor = config.end_lr if config.name in _ENDING else 0.0
    return floor + (peak - floor) * _DECAYS[config.name](after, span, config)


@register_decay("constant")
def _constant(after: int, span: int, config: ScheduleConfig) -> float:
    return 1.0


@register_decay("inverse_sqrt")
def _inverse_sqrt(after: int, span: int, config: ScheduleConfig) -> float:
    """Vaswani et al. 2017, eq. 3, scaled so that the peak is at the end of the warm-up."""
    warmup = max(1, config.warmup_updates)
    return math.sqrt(warmup / (after + config.warmup_updates))


@register_decay("linear")
def _linear(after: int, span: int, config: ScheduleConfig) -> float:
    return 1.0 - min(1.0, after / span)


@register_decay("polynomial")
def _polynomial(after: int, span: int, config: ScheduleConfig) -> float:
    return (1.0 - min(1.0, after / span)) ** config.power


@register_decay("cosine")
def _cosine(after: int, span: int, config: ScheduleConfig) -> float:
    """Loshchilov & Hutter 2017, without restarts."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, after / span)))
