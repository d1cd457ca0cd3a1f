"""Placement of sparse layers: the grammar of ``model.sparse_layers``.

Layers are numbered from 0. THOR replaces the even layers, SMoE and NLLB the odd ones ("every second layer"), Soft MoE
the second half; X-MoE inserts one sparse block after a layer and keeps all layers dense.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.errors import ConfigError

_DIGITS = re.compile("[0-9]{1,9}")
GRAMMAR = "none, all, even, odd, second_half, every:N, every:N:OFFSET, insert_after:N, or a list such as [1,3]"


@dataclass(frozen=True)
class Placement:
    """Layers whose feed-forward is sparse, and layers after which a sparse block is inserted."""

    replaced: tuple[int, ...] = ()
    inserted_after: tuple[int, ...] = ()


def place(spec: str | Sequence[int], num_layers: int, key: str = "model.sparse_layers") -> Placement:
    """Parses a placement for a stack of ``num_layers`` layers.

    Raises:
        ConfigError: ``spec`` does not follow the grammar, or names a layer that the stack does not have.
    """
    if not isinstance(spec, str):
        return Placement(replaced=_within(tuple(sorted(set(spec))), num_layers, key))
    named = {
        "none": range(0),
        "all": range(num_layers),
        "even": range(0, num_layers, 2),
        "odd": range(1, num_layers, 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if spec in named:
        return Placement(replaced=tuple(named[spec]))
    word, *numbers = spec.split(":")
    if (
        word not in ("every", "insert_after")
        or not numbers
        or not all(map(_DIGITS.fullmatch, numbers))
        or (word == "every" and len(numbers) > 2)
    ):
        raise ConfigError(f"'{key}' cannot be {spec!r}", remedy=f"write one of: {GRAMMAR}")
    values = [int(n) for n in numbers]
    if word == "insert_after":
        return Placement(inserted_after=_within(tuple(n - 1 for n in values), num_layers, key))
    step, offset = values[0], values[1] if len(values) > 1 else values[0] - 1
    if step < 1:
        raise ConfigError(f"'{key}' needs a step of 1 or more, not {spec!r}", remedy=f"write one of: {GRAMMAR}")
    return Placement(replaced=tuple(range(offset, num_layers, step)))


def _within(layers: tuple[int, ...], num_layers: int, key: str) -> tuple[int, ...]:
    outside = [n for n in layers if not 0 <= n < num_layers]
    if outside:
        raise ConfigError(
            f"'{key}' names layers {outside} of a stack of {num_layers}", remedy=f"choose from 0 to {num_layers - 1}"
        )
    return layers
