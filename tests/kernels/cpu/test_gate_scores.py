"""The kernel of gates for bf16 rows against plain formulas, forward and backward, in any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_train.kernels.cpu import gate_scores, thread_pool
from moe_train.routing.gate import LinearGate

SUPPORTED = gate_scores.is_supported(torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1))
needs_kernel = pytest.mark.skipif(not SUPPORTED, reason="no matrix units (AMX) here, or no C compiler")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_kernel
@given(st.integers(0, 9), st.integers(1, 100), st.integers(1, 19), st.booleans(), st.integers(0, 99))
def test_scores_and_gradients(rows: int, dim: int, experts: int, biased: bool, seed: int) -> None:
    """Any number of rows, none included, of any width."""
    x = draw(seed, rows, dim).to(torch.bfloat16).requires_grad_()
    weight, bias = draw(seed + 1, experts, dim).requires_grad_(), draw(seed + 2, experts).requires_grad_()
    inputs, grad = (x, weight, bias) if biased else (x, weight), draw(seed + 3, rows, experts)
    found = gate_scores.scores(x, weight, bias if biased else None)
    wanted = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    by, exact = torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad.double())
    torch.testing.assert_close(by[0], exact[0], rtol=2**-7, atol=1e-5)
    for one, other in zip(by[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@needs_kernel
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(0, 3000, 64).to(torch.bfloat16).requires_grad_(), draw(1, 8, 64).requires_grad_()

    def results() -> tuple[Tensor, ...]:
        y = gate_scores.scores(x, weight, None)
        return y, *torch.autograd.grad(y, (x, weight), draw(2, 3000, 8))

    alone = results()
    monkeypatch.setattr(thread_pool, "_threads", lambda _: 2)
    for one, other in zip(alone, results(), strict=True):
        assert torch.equal(one, other)


@needs_kernel
def test_shapes_and_types_are_checked() -> None:
    x, weight = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(4, 8)
    for wrong in ((x.float(), weight, None), (x, torch.zeros(4, 7), None), (x, weight, torch.zeros(3))):
        with pytest.raises(ValueError, match="not torch"):
            gate_scores.scores(*wrong)


def test_a_gate_computes_the_same_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 tokens get fp32 scores either way; more experts than the kernel takes use products."""
    for experts in (8, gate_scores._MAX_EXPERTS + 1):
        x, layer = draw(0, 40, 32).to(torch.bfloat16), LinearGate(32, experts)
        with_kernel = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(gate_scores, "library_for", lambda *_: None)
            without = layer(x)
        assert with_kernel.dtype == without.dtype == torch.float32
        torch.testing.assert_close(with_kernel, without, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not SUPPORTED, reason="no matrix units (AMX) here, or no C compiler")
@given(st.integers(0, 40), st.integers(1, 16), st.floats(0.1, 60), st.integers(0, 99))
def test_softmax_and_its_gradient(rows: int, experts: int, spread: float, seed: int) -> None:
    scores = (spread * draw(seed, rows, experts)).requires_grad_()
    grad = draw(seed + 1, rows, experts)
    found, wanted = gate_scores.softmax(scores), torch.softmax(scores.double(), -1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    (by,), (exact,) = torch.autograd.grad(found, scores, grad), torch.autograd.grad(wanted, scores, grad.double())
    torch.testing.assert_close(by, exact, rtol=1e-4, atol=1e-6)
    assert torch.equal(gate_scores.softmax(scores.view(1, rows, experts))[0], found)


def test_softmax_of_other_types_and_many_experts_is_torchs() -> None:
    for scores in (draw(1, 5, 17), draw(2, 5, 4).double()):
        assert torch.equal(gate_scores.softmax(scores), torch.softmax(scores, -1))
    broken = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 0.0, 1.0]])
    assert gate_scores.softmax(broken).isnan().any(1).all(), "a diverged router shows"
