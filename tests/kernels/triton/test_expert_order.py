"""The order of pairs by expert against a stable sort."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.kernels.device_kernels import DeviceKernels
from tests.kernels.triton import DEVICE


@settings(max_examples=15)
@given(st.integers(0, 300), st.integers(1, 70), st.integers(0, 99))
@example(pairs=128 * 65, bins=3, seed=0)  # more blocks than the scan reads at a time
def test_the_order_is_that_of_a_stable_sort(pairs: int, bins: int, seed: int) -> None:
    """Most ids occur rarely or never."""
    generator = torch.Generator().manual_seed(seed)
    expert = (torch.rand(pairs, generator=generator) ** 3 * bins).long().to(DEVICE)
    found = DeviceKernels.sort_by_expert(expert, bins)
    ids, order = expert.sort(stable=True)
    assert torch.equal(found.sorted_expert, ids) and torch.equal(found.order, order)
    assert torch.equal(found.position[order], torch.arange(pairs, device=DEVICE))
    ends = torch.bincount(expert, minlength=bins).cumsum(0)
    assert found.ends.dtype == torch.int32 and torch.equal(found.ends.long(), ends)
