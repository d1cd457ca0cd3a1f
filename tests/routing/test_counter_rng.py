"""Counted draws: uniform, independent across coordinates, equal wherever the coordinates are equal."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.routing.counter_rng import combine, counter_hash, counter_integer, counter_uniform, hash_numbers
from moe_train.routing.noise import gumbel
from tests.routing.helpers import batch_context

number = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(number, max_size=5))
def test_plain_python_and_tensors_hash_alike(parts: list[int]) -> None:
    state = torch.zeros(1, dtype=torch.int64)
    for part in parts:
        state = combine(state, part)
    assert hash_numbers(*parts) == state.item()


@pytest.mark.parametrize("width", [1, 5])
def test_uniforms_fill_the_unit_interval_evenly(width: int) -> None:
    draw = counter_uniform(batch_context([50] * 100), 3, width)
    assert draw.shape == (5000, width)
    assert draw.min() >= 0 and draw.max() < 1
    counts = torch.histc(draw, bins=10, min=0, max=1)
    expected = draw.numel() / 10
    assert ((counts - expected) ** 2 / expected).sum().item() < 27.9  # chi-square, 0.999 quantile, 9 degrees of freedom


@pytest.mark.parametrize("change", [{"seed": 2}, {"update": 1}, {"layer": 1}])
def test_each_coordinate_gives_draws_of_its_own(change: dict[str, int]) -> None:
    base, other = (counter_uniform(batch_context([500], **c), 1).squeeze(1) for c in ({}, change))
    assert not torch.equal(base, other)
    assert abs(torch.corrcoef(torch.stack((base, other)))[0, 1].item()) < 0.15
    streams = torch.stack([counter_uniform(batch_context([500]), s).squeeze(1) for s in (1, 2, 3)])
    assert torch.corrcoef(streams).fill_diagonal_(0).abs().max() < 0.15


@given(st.permutations(range(12)))
def test_draws_do_not_depend_on_the_position_in_the_batch(order: list[int]) -> None:
    context = batch_context([5, 7], passes=1)
    rows = torch.tensor(order)
    taken = {n: getattr(context, n)[rows] for n in ("sentence", "position", "sentence_uid", "pass_index")}
    moved = dataclasses.replace(context, **taken)
    for per in ("token", "sentence", "position", "batch"):
        assert torch.equal(counter_hash(context, 1, per=per)[rows], counter_hash(moved, 1, per=per))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), number, st.integers(0, 9))
def test_what_is_known_of_the_pass_changes_no_draw(lengths: list[int], seed: int, update: int) -> None:
    context = batch_context(lengths, seed=seed, update=update)
    known = dataclasses.replace(context, first_pass=True)
    for per in ("token", "sentence", "position", "batch"):
        assert torch.equal(counter_hash(context, 3, per=per), counter_hash(known, 3, per=per))


def test_who_shares_a_draw() -> None:
    context = batch_context([4, 4])
    shared = {p: len(counter_hash(context, 1, per=p).unique()) for p in ("token", "sentence", "position", "batch")}
    assert shared == {"token": 8, "sentence": 2, "position": 4, "batch": 1}
    with pytest.raises(ValueError, match="per 'word'"):
        counter_hash(context, 1, per="word")


def test_integers_stay_below_their_bound() -> None:
    draw = counter_integer(batch_context([1000]), 1, 7)
    assert set(draw.tolist()) == set(range(7))


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    noise = gumbel(batch_context([20_000]), 2)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.04)
