"""Tr(Σ_W Σ_B⁺) on inputs whose answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.analysis.probe.collapse import representation_collapse


def test_one_dimension_by_hand() -> None:
    # Classes {-1, 1} around 0 and {9, 11} around 10: Σ_W = 1, Σ_B = 25.
    states = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
    assert representation_collapse(states, torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 25)


def test_directions_without_class_means_do_not_count() -> None:
    # The spread along the second axis is invisible to Σ_B⁺: same answer as above.
    states = torch.tensor([[-1.0, 5.0], [1.0, -5.0], [9.0, -5.0], [11.0, 5.0]])
    assert representation_collapse(states, torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 25)


def test_collapsed_classes_give_zero() -> None:
    means = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(5)
    assert representation_collapse(means[labels], labels) == pytest.approx(0, abs=1e-12)


def test_agrees_with_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    states, labels = torch.randn(60, 6, generator=generator).double(), torch.arange(60) % 3
    mean = states.mean(0)
    within, between = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    for label in range(3):
        part = states[labels == label]
        centred = part - part.mean(0)
        within += centred.T @ centred / 60
        between += len(part) / 60 * torch.outer(part.mean(0) - mean, part.mean(0) - mean)
    expected = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-9))
    assert representation_collapse(states, labels) == pytest.approx(float(expected), rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0.01, 100.0))
def test_rotation_and_scale_change_nothing(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    states, labels = torch.randn(40, 5, generator=generator).double(), torch.arange(40) % 4
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator).double())
    expected = representation_collapse(states, labels)
    assert representation_collapse(states @ rotation * scale, labels) == pytest.approx(expected, rel=1e-6)


def test_one_class_means_nothing() -> None:
    with pytest.raises(ValueError, match="two classes"):
        representation_collapse(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))
