"""Our dropout is torch's in distribution: how many go, what the others are scaled by, what follows from the seed."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.kernels.cpu import dropout as module
from moe_train.kernels.cpu.dropout import add_dropout, dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    torch.manual_seed(1)
    x = torch.ones(401, 499)
    y = dropout(x, p)
    n, zeros = x.numel(), int((y == 0).sum())
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p))
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)]), rtol=2e-4, atol=0)


def test_each_quarter_of_a_draw_is_fair() -> None:
    torch.manual_seed(2)
    y = dropout(torch.ones(4 * 100_000), 0.25).view(-1, 4)
    shares = (y == 0).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 100_000)
    # Neighbours that share a draw fall independently.
    both = ((y[:, 0] == 0) & (y[:, 1] == 0)).double().mean()
    assert abs(both - 0.0625) < 5 * math.sqrt(0.0625 / 100_000)


def test_gradient_goes_where_values_went() -> None:
    x = torch.randn(37, 11, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, y)


def test_seed_determines_the_mask() -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(torch.ones(1001), 0.2)

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), dropout(torch.ones(1001), 0.2))


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.4, False)])
def test_returns_the_input_without_dropout(p: float, training: bool) -> None:
    x = torch.ones(5)
    assert dropout(x, p, training) is x


def test_all_may_go_and_types_stay() -> None:
    assert dropout(torch.ones(6), 1.0).eq(0).all()
    assert dropout(torch.ones(0, 8), 0.5).shape == (0, 8)
    assert dropout(torch.ones(64, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 31), (2, 7, 33), (300, 1000)])
def test_the_c_kernel_drops_what_torch_drops(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 bit for bit, sum of the residual connection and gradients included; bf16 is rounded once."""
    x, y, along = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    x.requires_grad_(), y.requires_grad_()
    found = []
    for kernel in (True, False):
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(module, "library_for", lambda *_: None)
            torch.manual_seed(5)
            total, alone = add_dropout(x, y, 0.3), dropout(y, 0.2)
            gradients = torch.autograd.grad(total, (x, y), along, retain_graph=True)
            found.append((total, alone, *gradients, *torch.autograd.grad(alone, y, along)))
    error = 0.0 if dtype == torch.float32 else 2**-6
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=error, atol=error)
    assert torch.equal(add_dropout(x, y, 0.3, training=False), x + y)
