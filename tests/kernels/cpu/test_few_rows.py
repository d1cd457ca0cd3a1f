"""The kernel for few fp32 rows per expert against plain formulas, and where experts use it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train import MoELayer
from moe_train.kernels.cpu import few_rows, thread_pool

pytestmark = pytest.mark.skipif(
    not few_rows.is_supported(torch.zeros(1, 1), [1]), reason="no matrix units (AMX) here, or no C compiler"
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.integers(0, 17), min_size=1, max_size=4),
    st.integers(1, 21),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_products(counts: list[int], k: int, m: int, biased: bool, relu: bool, seed: int) -> None:
    """Any number of rows of an expert, none included, and any widths."""
    experts = len(counts)
    rows, weight, bias = draw(seed, sum(counts), k), draw(seed + 1, experts, k, m), draw(seed + 2, experts, m)
    found = few_rows.linear(rows, weight, bias if biased else None, counts, relu)
    expert = torch.arange(experts).repeat_interleave(torch.tensor(counts))
    wanted = torch.einsum("nk,nkm->nm", rows.double(), weight.double()[expert]) + biased * bias.double()[expert]
    torch.testing.assert_close(found.double(), wanted.relu() if relu else wanted, rtol=1e-5, atol=1e-4)


def test_nan_and_infinity_pass_through() -> None:
    row, one = torch.tensor([[float("nan")], [float("inf")], [-float("inf")]]), torch.ones(1, 1, 1)
    wanted = torch.tensor([[float("nan")], [float("inf")], [0.0]])
    torch.testing.assert_close(few_rows.linear(row, one, None, [3], relu=True), wanted, equal_nan=True)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = draw(0, 20, 64), draw(1, 4, 64, 96)
    alone = few_rows.linear(rows, weight, None, [5, 5, 0, 10])
    monkeypatch.setattr(thread_pool, "_threads", lambda _: 2)
    assert torch.equal(alone, few_rows.linear(rows, weight, None, [5, 5, 0, 10]))


def test_shapes_and_types_are_checked() -> None:
    rows, weight = torch.zeros(3, 8), torch.zeros(2, 8, 4)
    for x, w, counts in ((rows, weight, [3, 1]), (rows.double(), weight, [1, 2]), (rows, weight[:1], [1, 2])):
        with pytest.raises(ValueError, match="not float32"):
            few_rows.linear(x, w, None, counts)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_experts_use_it_without_gradients_only(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    product = few_rows.linear
    monkeypatch.setattr(few_rows, "linear", lambda *given: calls.append(len(given[0])) or product(*given))
    layer = MoELayer(16, 32, {"name": "top_k", "num_experts": 4}, activation=activation).eval()
    x = draw(0, 1, 9, 16)
    with_gradients = layer(x)[0]
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], with_gradients)
        assert calls == [18, 18]
        layer(draw(1, 1, 200, 16))
    assert len(calls) == 2, "BLAS computes many rows"
