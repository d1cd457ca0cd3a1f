"""Placement of sparse layers by the papers' conventions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.placement import Placement, place
from moe_train.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "layers", "expected"),
    [
        ("even", 6, (0, 2, 4)),  # THOR's official code
        ("odd", 6, (1, 3, 5)),  # SMoE, NLLB: layers 2, 4, 6 counted from one
        ("every:4", 12, (3, 7, 11)),  # NLLB-200: moe_freq 4
        ("every:4:0", 12, (0, 4, 8)),
        ("second_half", 12, (6, 7, 8, 9, 10, 11)),  # Soft MoE
        ("all", 2, (0, 1)),
        ("none", 2, ()),
        ((3, 1), 4, (1, 3)),
    ],
)
def test_replaced_layers(spec: str | tuple[int, ...], layers: int, expected: tuple[int, ...]) -> None:
    assert place(spec, layers) == Placement(replaced=expected)


def test_x_moe_inserts_after_the_sixth_layer() -> None:
    assert place("insert_after:6", 12) == Placement(inserted_after=(5,))


@pytest.mark.parametrize("spec", ["evne", "every", "every:x", "every:0", "insert_after:13", (7,)])
def test_what_cannot_be_is_refused(spec: str | tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.sparse_layers"):
        place(spec, 6)


@given(st.integers(1, 24), st.integers(1, 8))
def test_every_nth_layer_is_evenly_spread(layers: int, step: int) -> None:
    chosen = place(f"every:{step}", layers).replaced
    assert len(chosen) == layers // step
    assert all(b - a == step for a, b in itertools.pairwise(chosen))
