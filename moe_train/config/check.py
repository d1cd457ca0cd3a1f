"""Ranges of the numbers in a config, declared by fields: ``lr: Annotated[float, Range(above=0)]``.

Messages name the key, the range and the value.
"""

from __future__ import annotations

import functools
import math
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from moe_train.errors import ConfigError

LARGEST = 2**63 - 1  # whole number that a tensor holds
LARGEST_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; without an end it is unbounded there.

    Attributes:
        least, above: lower end, inclusive or exclusive.
        most, below: upper end, inclusive or exclusive.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            is_finite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def check(self, key: str, value: float) -> None:
        """Raises ConfigError naming ``key`` unless ``value`` is in the range."""
        if value in self:
            return
        if not is_finite(value):
            must = "be a finite number"
        elif self.above is not None and value <= self.above:
            must = f"be above {show(self.above)}"
        elif self.least is not None and value < self.least:
            must = f"be {show(self.least)} or more" if self.least else "not be negative"
        else:
            must = f"be {show(self.most)} or less" if self.most is not None else f"be below {show(self.below)}"
        raise ConfigError(f"'{key}' must {must}, not {show(value)}", remedy=f"set {key} to a number {self}")

    def __str__(self) -> str:
        """For example ``above 0 and up to 1``."""
        low = [f"above {show(self.above)}"] if self.above is not None else []
        low += [f"from {show(self.least)}"] if self.least is not None else []
        high = [f"up to {show(self.most)}"] if self.most is not None else []
        high += [f"below {show(self.below)}"] if self.below is not None else []
        return " and ".join([*low, *high]) or "that is finite"


ANY = Range()  # for fields that declare no range
PositiveInt = Annotated[int, Range(above=0, most=2**31 - 1)]
NonNegativeInt = Annotated[int, Range(least=0, most=2**31 - 1)]
Seed = Annotated[int, Range(least=0, most=LARGEST)]
Probability = Annotated[float, Range(least=0, below=1)]
RankCount = Annotated[int, Range(least=0, most=2**20)]  # 0: all
Threads = Annotated[int, Range(least=0, most=1024)]  # 0: one per core
SamplingTemperature = Annotated[float, Range(least=0.05, most=1e12)]  # size^(1/temperature) stays finite
# For factors, weights and ratios: products of two of them fit in fp32.
PositiveFloat = Annotated[float, Range(above=0, most=1e12)]
NonNegativeFloat = Annotated[float, Range(least=0, most=1e12)]


def numbers(config: Any, group: str) -> None:
    """Checks every number of a config dataclass, including items of lists, against the range of its field.

    Args:
        group: dotted name of the group, for messages; "" at the top.

    Raises:
        ConfigError: names the key.
    """
    for name, allowed in ranges(config.__class__).items():
        number(allowed, f"{group}.{name}" if group else name, getattr(config, name))


def number(allowed: Range, key: str, value: Any) -> None:
    """Checks a number, or the numbers of a list; other values are ignored."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        allowed.check(key, value)
    elif isinstance(value, (tuple, list)):
        for n, item in enumerate(value):
            number(allowed, f"{key}[{n}]", item)


def ranges(config: Any) -> Mapping[str, Range]:
    """The ranges of a config dataclass by field; a subclass inherits those that it does not redeclare."""
    return _ranges(config)


@functools.cache
def _ranges(config: type) -> Mapping[str, Range]:
    found: dict[str, Range] = {}
    for base in reversed(config.__mro__):
        hints = typing.get_type_hints(base, include_extras=True)
        found |= {name: allowed for name, hint in hints.items() for allowed in _ranges_in(hint)}
    return found


def _ranges_in(hint: Any) -> Iterator[Range]:
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range))
    for part in typing.get_args(hint):
        yield from _ranges_in(part)


def is_finite(value: float) -> bool:
    """Whether the number is neither infinite nor NaN; integers may have any size."""
    return isinstance(value, int) or math.isfinite(value)


def show(value: float | None) -> str:
    """A number for a message: 3.0 as 3, and a huge integer by its number of bits."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return str(value)


def positive(key: str, value: float) -> None:
    """Raises ConfigError unless ``value > 0`` and finite."""
    Range(above=0).check(key, value)


def probability(key: str, value: float) -> None:
    """Raises ConfigError unless ``0 <= value < 1``."""
    Range(least=0, below=1).check(key, value)
