"""The oneDNN product equals F.linear, and is not used where it is not faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_train.layers import linear as module
from moe_train.layers.linear import linear


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    if not module.prefers_onednn(torch.zeros(1)):
        pytest.skip("this build of torch has no oneDNN linear")
    monkeypatch.setattr(module, "_MIN_ONEDNN_FLOPS", 0.0)


@pytest.mark.usefixtures("always_fast")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (0, 5), (2, 0, 5)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool, relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(6, 5, generator=generator, requires_grad=True)
    b = torch.randn(6, generator=generator, requires_grad=True) if bias else None
    inputs = [x, weight] if b is None else [x, weight, b]
    y = linear(x, weight, b, relu)
    expected = F.linear(x, weight, b)
    expected = expected.relu() if relu else expected
    assert "Linear" in type(y.grad_fn).__name__ or "View" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected)
    along = torch.randn(y.shape, generator=generator)
    for got, right in zip(
        torch.autograd.grad(y, inputs, along), torch.autograd.grad(expected, inputs, along), strict=True
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.usefixtures("always_fast")
def test_only_what_is_asked_for_is_differentiated() -> None:
    x, weight = torch.randn(7, 5), torch.randn(6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x, weight).sum(), weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(6, 5))


@pytest.mark.usefixtures("always_fast")
def test_other_types_and_autocast_use_torch() -> None:
    x, weight = torch.randn(7, 5), torch.randn(6, 5)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
