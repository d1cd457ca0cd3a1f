"""Checks that the config dataclasses share, so that every message reads the same way."""

from __future__ import annotations

from moe_train.errors import ConfigError


def positive(key: str, value: float) -> None:
    """Raises ConfigError unless ``value > 0``."""
    if not value > 0:
        raise ConfigError(f"'{key}' must be above 0, not {value}", remedy=f"set {key} to a positive number")


def not_negative(key: str, value: float) -> None:
    """Raises ConfigError unless ``value >= 0``."""
    if not value >= 0:
        raise ConfigError(f"'{key}' must not be negative, not {value}", remedy=f"set {key} to 0 or more")


def probability(key: str, value: float) -> None:
    """Raises ConfigError unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise ConfigError(f"'{key}' must lie in [0, 1), not {value}", remedy=f"set {key} to a probability below 1")


def at_most(key: str, value: float, limit: float) -> None:
    """Raises ConfigError unless ``value <= limit``."""
    if not value <= limit:
        raise ConfigError(f"'{key}' must be at most {limit:,}, not {value}", remedy=f"set {key} to {limit:,} or less")
