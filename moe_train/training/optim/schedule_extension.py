"""Where a run had ended before ``training.max_updates`` was raised; its later learning rates depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_train.config import RunConfig
from moe_train.errors import ConfigError
from moe_train.training.optim.lr_schedule import RunEnd

ENDS = "schedule_ends"  # in run.json
FINISHED = ("finished", "stopped_early")  # what run.json calls a run that has ended


def run_ends(info: Mapping[str, Any]) -> tuple[RunEnd, ...]:
    """The ends that ``run.json`` records.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        return tuple(RunEnd(int(end["update"]), int(end["max_updates"]), end["extend"]) for end in info.get(ENDS, ()))
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"'{ENDS}' cannot be read ({error!r})", "run.json", "remove the key") from error


def ends_with_session(info: Mapping[str, Any], before: RunConfig, now: RunConfig) -> tuple[RunEnd, ...]:
    """The ends of a run, with that of its last session if this one extends it.

    ``training.schedule.extend`` of the present session applies after the last end.

    Args:
        info: ``run.json``.
        before: the run's config as it was last started.
        now: the config of the session that begins.
    """
    ends, update = run_ends(info), int(info.get("update", 0))
    extended = info.get("status") in FINISHED and now.training.max_updates > update
    if extended and (not ends or ends[-1].update < update):
        ends = (*ends, RunEnd(update, before.training.max_updates, None))
    return (*ends[:-1], dataclasses.replace(ends[-1], extend=now.training.schedule.extend)) if ends else ()
