"""Packed rows: their number, their sequences, and torch's attention over them."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.kernels.varlen import find_varlen_attn, row_count, sequences, torch_varlen
from tests.kernels.by_sentence import attend_by_sentence


@given(st.integers(0, 10**6))
def test_rows_are_few_more_than_tokens(tokens: int) -> None:
    rows = row_count(tokens)
    assert tokens + 8 <= rows < tokens + 8 + max(128, (tokens + 8) / 32)
    assert rows % 128 == 0


def test_batches_of_a_training_have_few_row_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(14_400, 16_385, (50,), generator=generator).tolist()  # up to 12 % of 16,384 are padding
    assert len(set(tokens)) >= 45
    assert len({row_count(number) for number in tokens}) <= 9


def test_sequences_are_the_sentences_and_the_rows_after_them() -> None:
    found = sequences(torch.tensor([3, 0, 5]), 5, 8, attend_by_sentence)
    assert found.starts.tolist() == [0, 3, 3, 8, *range(23, 129, 15)] and found.starts.dtype == torch.int32
    assert (found.rows, found.longest) == (128, 15)
    nothing = sequences(torch.tensor([], dtype=torch.int64), 7, 0, attend_by_sentence)
    assert nothing.starts.tolist() == list(range(0, 129, 16))


def test_torch_has_the_function_here() -> None:
    assert find_varlen_attn() is not None


def test_a_torch_without_it_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module (before 2.10), or the causal form by another argument."""
    name = "torch.nn.attention.varlen"
    monkeypatch.setitem(sys.modules, name, None)
    assert find_varlen_attn() is None
    older = ModuleType(name)
    older.varlen_attn = lambda query, key, value, is_causal=False: query  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, older)
    assert find_varlen_attn() is None
    assert torch_varlen(torch.device("cpu"), 64) is None


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_function_computes_what_one_product_per_sentence_does(causal: bool) -> None:
    """Forward and gradients, with an empty sequence of queries and one of keys."""
    device = torch.device("cuda")
    found = torch_varlen(device, 64)
    if found is None:
        pytest.skip("this torch or this GPU has no attention over packed rows")
    lengths = [torch.tensor([7, 0, 130, 33]), torch.tensor([7, 0, 130, 33] if causal else [12, 5, 0, 140])]
    own, other = (sequences(n.to(device), int(n.max()), int(n.sum()), found.attend) for n in lengths)
    generator = torch.Generator(device).manual_seed(1)
    make = lambda rows: torch.randn(rows, 4, 64, device=device, generator=generator)  # noqa: E731
    tensors = [make(own.rows), make(other.rows), make(other.rows)]
    grad = make(own.rows)
    results = []
    for attend, dtype in ((found.attend, torch.bfloat16), (attend_by_sentence, torch.float32)):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in tensors]
        y = attend(
            *leaves, own.starts, other.starts, own.longest, other.longest, window_size=(-1, 0) if causal else (-1, -1)
        )
        y.backward(grad.to(dtype))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for packed, expected in zip(*results, strict=True):
        assert packed is not None and packed.isfinite().all()
        assert (packed.float() - expected).norm() <= 2e-2 * expected.norm()
