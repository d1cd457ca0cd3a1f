"""The products of oneDNN and of the C kernel equal F.linear, and are not used where they are not faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_train.kernels.cpu import amx_linear
from moe_train.layers import linear as module
from moe_train.layers.linear import feed_forward, linear


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_bf16_with_gradients_goes_through_the_c_kernel(bias: bool, relu: bool) -> None:
    if not amx_linear.is_supported(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("no matrix units (AMX) here, or no C compiler")
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 7, 40), (48, 40), (48,), (40, 48), (40,)]
    inputs = [torch.randn(*shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, w1, b1, *_ = inputs
    y, expected = linear(x, w1, b1 if bias else None, relu), F.linear(wide[0], wide[1], wide[2] if bias else None)
    assert "Amx" in type(y.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]
    _check(y, expected.relu() if relu else expected, inputs[: 2 + bias], wide[: 2 + bias])
    hidden = F.linear(wide[0], wide[1], wide[2]).relu()
    _check(feed_forward(*inputs), F.linear(hidden, wide[3], wide[4]), inputs, wide)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(*inputs), feed_forward(*inputs))  # type: ignore[arg-type]


def _check(y: torch.Tensor, want: torch.Tensor, inputs: list[torch.Tensor], wide: list[torch.Tensor]) -> None:
    along = torch.randn(y.shape).bfloat16()
    got = [y, *torch.autograd.grad(y, inputs, along)]
    for one, right in zip(got, [want, *torch.autograd.grad(want, wide, along.double())], strict=True):
        assert one.dtype == torch.bfloat16 and (one - right).norm() < 0.01 * right.norm()
