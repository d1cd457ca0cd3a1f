"""Reads the config that a run has recorded, of any version of moe_train."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig, build, to_mapping
from moe_train.config.from_mapping import without_unknown
from moe_train.routing import find_strategy, routing_config

LOG = logging.getLogger("moe_train")


def recorded_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The config of a run; keys that this version does not have are left out, those that it adds have their defaults.

    Keys of a routing strategy that earlier versions did not record have those versions' values (``unrecorded``).

    Raises:
        ConfigError: a value of the wrong type or out of its range.
    """
    config = build(RunConfig, without_unknown(RunConfig, mapping)[0])
    target = find_strategy(str(config.routing.get("name")))
    if target is None:  # a strategy from outside that is not imported: an error where its model is built
        return config
    known = without_unknown(target.config, config.routing)[0]
    routing = {**target.config.unrecorded, **known}
    routing_config(routing)
    return dataclasses.replace(config, routing=routing)


def to_record(config: RunConfig) -> dict[str, Any]:
    """The config as a run records it, with every key whose absence would mean an earlier version."""
    target = find_strategy(str(config.routing.get("name")))
    named = dict.fromkeys(target.config.unrecorded) if target else {}
    return to_mapping(dataclasses.replace(config, routing={**named, **config.routing}))


def with_defaults(config: RunConfig) -> dict[str, Any]:
    """The config as a mapping with every key of its routing strategy, by which sessions of a run are compared."""
    routing = config.routing
    if find_strategy(str(routing.get("name"))):
        routing = {**to_mapping(routing_config(routing)), **routing}
    return to_mapping(dataclasses.replace(config, routing=routing))


def note_ignored_keys(mapping: Mapping[str, Any], where: Path) -> None:
    """Logs one warning that names the recorded keys which this version does not have; nothing where there are none."""
    ignored = list(without_unknown(RunConfig, mapping)[1])
    routing = mapping.get("routing")
    if isinstance(routing, Mapping) and (target := find_strategy(str(routing.get("name")))):
        ignored += without_unknown(target.config, routing, "routing")[1]
    if ignored:
        _warn(where, ", ".join(ignored))


@functools.lru_cache(maxsize=64)
def _warn(where: Path, ignored: str) -> None:
    """Once for each file, however often a command reads it."""
    LOG.warning("%s: ignored keys that this version of moe_train does not have: %s", where, ignored)
