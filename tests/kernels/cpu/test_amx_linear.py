"""The C kernel of bf16 products against fp64, in every arrangement of its operands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu import amx_linear, thread_pool

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not amx_linear.is_supported(torch.zeros(1, dtype=BF16)), reason="no matrix units (AMX) here, or no C compiler"
)


def stored(rows: int, columns: int, turned: bool, seed: int) -> Tensor:
    """[rows, columns], stored as its transpose where ``turned``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    made = torch.randn(shape, generator=generator).to(BF16)
    return made.t() if turned else made


@given(
    n=st.integers(0, 70),
    k=st.sampled_from([0, 1, 31, 32, 65, 1024, 1025, 2100]),
    m=st.integers(1, 70),
    turned=st.tuples(st.booleans(), st.booleans()),
    relu=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
)
def test_the_product_is_that_of_fp64(
    n: int, k: int, m: int, turned: tuple[bool, bool], relu: bool, biased: bool, masked: bool
) -> None:
    a, b = stored(n, k, turned[0], 1), stored(k, m, turned[1], 2)
    bias = stored(1, m, False, 3)[0] if biased else None
    kept = stored(n, m, False, 4).relu() if masked else None
    plain = a.double() @ b.double()
    want = plain if bias is None else plain + bias.double()
    want = want.relu() if relu else want
    want = want if kept is None else want * kept.ne(0)
    scale = max(k, 1) ** 0.5
    got = amx_linear.product(a, b, bias, relu, kept)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5 * scale)
    total = torch.ones(n, m)
    assert amx_linear.product(a, b, out=total) is total
    torch.testing.assert_close(total.double(), plain + 1, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(amx_linear.column_sums(a).double(), a.double().sum(0), rtol=2**-8, atol=1e-5 * max(n, 1))


def test_memory_next_to_the_result_is_not_written() -> None:
    for n, m in ((1, 1), (33, 31), (17, 65)):
        room = torch.full((n * m + 128,), 7.0, dtype=BF16)
        amx_linear.product(stored(n, 40, False, 1), stored(40, m, True, 2), out=room[64 : 64 + n * m].view(n, m))
        assert torch.equal(room[:64], torch.full((64,), 7.0, dtype=BF16)) and bool((room[64 + n * m :] == 7).all())


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    a, b, found = stored(133, 1100, True, 1), stored(1100, 50, False, 2), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(amx_linear.product(a, b))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_does_not_fit_is_refused() -> None:
    a = stored(3, 4, False, 1)
    for b in (stored(5, 2, False, 2), stored(4, 2, False, 2).float()):
        with pytest.raises(ValueError):
            amx_linear.product(a, b)
    with pytest.raises(ValueError):
        amx_linear.product(a, a.t(), relu=True, out=torch.zeros(3, 3))
