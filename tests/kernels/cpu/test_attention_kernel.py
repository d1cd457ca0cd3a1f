"""The C kernel of attention against the definition in fp64, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu import attention_kernel, thread_pool

pytestmark = pytest.mark.skipif(
    not attention_kernel.is_supported(*torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16)),
    reason="needs a CPU with AMX, Linux, and a C compiler",
)
Three = tuple[Tensor, Tensor, Tensor]


def definition(inputs: Three, mask: Tensor | None, causal: bool, heads: int) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in inputs)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask[:, None, None]
    if causal:
        hidden |= torch.ones_like(hidden[0, 0]).triu(1)
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (p @ v).transpose(1, 2).flatten(2)


def packed(b: int, s: int, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Three, Tensor]:
    """Views of query [b, s, d] and of key and value [b, k, 2d], as the projections lay them out, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    query, both, grad = (torch.randn(b, n, w, generator=generator).to(dtype) for n, w in ((s, d), (k, 2 * d), (s, d)))
    return (query, *both.chunk(2, -1)), grad  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70), st.integers(1, 3)),
    dim=st.sampled_from([1, 8, 17, 48, 80]),
    masked=st.booleans(),
    causal=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, error: float, sizes: tuple[int, int, int, int], dim: int, masked: bool, causal: bool
) -> None:
    b, s, k, heads = sizes
    inputs, grad = packed(b, s, k, heads * dim, dtype)
    mask = torch.rand(b, k, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    wide = tuple(x.double().requires_grad_() for x in inputs)
    want = definition(wide, mask, causal, heads)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(want, wide, grad.double())
    out, log_sums = attention_kernel.attend(*inputs, mask, causal, heads)
    into = tuple(torch.full_like(x, torch.nan) for x in inputs)
    attention_kernel.gradients(into, grad, out, log_sums, inputs, mask, causal, heads)  # type: ignore[arg-type]
    scale = torch.stack([x.norm() for x in wanted]).amax()
    assert (out - want).norm() <= error * (want.norm() + 1e-3)
    for got, right in zip(into, wanted, strict=True):
        assert (got - right).norm() <= error * scale + 1e-6


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    inputs, grad = packed(3, 20, 30, 32, torch.bfloat16)
    found: list[tuple[Tensor, ...]] = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out, log_sums = attention_kernel.attend(*inputs, None, False, 2)
        into = tuple(map(torch.empty_like, inputs))
        attention_kernel.gradients(into, grad, out, log_sums, inputs, None, False, 2)  # type: ignore[arg-type]
        found.append((out, *into))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_large_scores_and_nan() -> None:
    inputs, _ = packed(1, 4, 6, 16, torch.float32)
    out, _ = attention_kernel.attend(300 * inputs[0], *inputs[1:], None, False, 1)
    torch.testing.assert_close(out, definition((300 * inputs[0], *inputs[1:]), None, False, 1), rtol=1e-4, atol=1e-5)
    inputs[0][0, 2] = torch.nan
    out, _ = attention_kernel.attend(*inputs, None, False, 1)
    assert out.isnan().all(-1).tolist() == [[False, False, True, False]]


def test_what_does_not_fit_is_refused() -> None:
    (q, k, v), _ = packed(2, 3, 4, 8, torch.float32)
    for bad, mask, heads in ((v[:1], None, 2), (v, torch.ones(2, 3, dtype=torch.bool), 2), (v, None, 3)):
        with pytest.raises(ValueError):
            attention_kernel.attend(q, k, bad, mask, False, heads)
    assert not attention_kernel.is_supported(q, torch.zeros(2, 513, 8))
    assert not attention_kernel.is_supported(q.double(), k.double())
