"""The kernel for experts in bf16: against fp64, against torch's products, and where it is taken."""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.experts import amx, mlp
from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import LoopedFeedForward
from moe_train.experts.row_plan import RowPlan, plan_rows
from moe_train.kernels.cpu import amx_mlp
from tests.experts.reference import pool_of, random_assignment

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not amx_mlp.is_supported(torch.zeros(1, dtype=BF16)), reason="no matrix units (AMX) here, or no C compiler"
)
EPS = torch.finfo(BF16).eps


def plan_of(counts: list[int]) -> RowPlan:
    rows = torch.arange(sum(counts))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return plan_rows(rows, expert, max(sum(counts), 1), len(counts), 1, counts)


def inputs(counts: list[int], d: int, h: int, biased: bool, seed: int = 0) -> list[Tensor | None]:
    """rows, w1, b1, w2, b2."""
    generator = torch.Generator().manual_seed(seed)
    experts = len(counts)
    shapes = (sum(counts), d), (experts, d, h), (experts, h), (experts, h, d), (experts, d)
    drawn = [torch.randn(*shape, generator=generator) for shape in shapes]
    scaled = (drawn[0], drawn[1] / d**0.5, drawn[2] / 2, drawn[3] / h**0.5, drawn[4] / 2)
    made = [tensor.to(BF16).requires_grad_() for tensor in scaled]
    return made if biased else [made[0], made[1], None, made[3], None]


def wide(numbers: list[Tensor | None], magnitudes: bool = False) -> list[Tensor | None]:
    """The same in fp64, or what they are without signs."""
    doubles = [None if t is None else t.detach().double() for t in numbers]
    return [None if t is None else (t.abs() if magnitudes else t).requires_grad_() for t in doubles]


def reference(numbers: list[Tensor | None], counts: list[int], grad: Tensor) -> list[Tensor]:
    """Output and gradients by plain formulas; of numbers without signs, ReLU leaves all of them."""
    x, w1, b1, w2, b2 = numbers
    outputs = []
    for e, part in enumerate(x.split(counts)):
        hidden = part @ w1[e] if b1 is None else part @ w1[e] + b1[e]
        y = hidden.relu() @ w2[e]
        outputs.append(y if b2 is None else y + b2[e])
    y = torch.cat(outputs)
    return [y, *torch.autograd.grad(y, [t for t in numbers if t is not None], grad)]


def on_the_edge(numbers: list[Tensor | None], counts: list[int]) -> bool:
    """Whether a hidden number is so near zero that its sign is a matter of rounding."""
    (x, w1, b1, *_), (size, w1_size, b1_size, *_) = wide(numbers), wide(numbers, True)
    for e, rows in enumerate(torch.arange(x.shape[0]).split(counts)):
        value, most = x[rows] @ w1[e], size[rows] @ w1_size[e]
        if b1 is not None:
            value, most = value + b1[e], most + b1_size[e]
        if (value.abs() <= 1e-6 * most).any():
            return True
    return False


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.integers(1, 100),
    st.integers(1, 100),
    st.booleans(),
    st.integers(0, 9),
)
def test_outputs_and_gradients(counts: list[int], d: int, h: int, biased: bool, seed: int) -> None:
    """Any sizes, multiples of nothing, experts without rows: within the roundings of hidden numbers and results."""
    numbers = inputs(counts, d, h, biased, seed)
    assume(not on_the_edge(numbers, counts))
    y = amx.amx_feed_forward(*numbers, plan_of(counts), HiddenLayer("relu"))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(BF16)
    found = [y, *torch.autograd.grad(y, [t for t in numbers if t is not None], grad)]
    wanted = reference(wide(numbers), counts, grad.double())
    most = reference(wide(numbers, True), counts, grad.double().abs())
    for one, other, magnitude in zip(found, wanted, most, strict=True):
        assert ((one - other).abs() <= 2 * EPS * magnitude).all()


@pytest.mark.parametrize(("d", "h", "counts"), [(64, 2048, [1100, 3]), (512, 96, [40, 600])])
def test_more_than_fits_into_caches(d: int, h: int, counts: list[int]) -> None:
    """Operands that are packed in several parts."""
    numbers = inputs(counts, d, h, True)
    y = amx.amx_feed_forward(*numbers, plan_of(counts), HiddenLayer("relu"))
    grad = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, numbers, grad))
    for one, other in zip(found, reference(wide(numbers), counts, grad.double()), strict=True):
        assert (one.double() - other).norm() <= 1.5 * EPS * other.norm()


def test_dropout_drops_what_torchs_products_drop() -> None:
    numbers, plan = inputs([40, 7], 32, 64, True), plan_of([40, 7])
    outcomes = []
    for feed_forward in (amx.amx_feed_forward, LoopedFeedForward.apply):
        torch.manual_seed(5)
        y = feed_forward(*numbers, plan, HiddenLayer("relu", 0.4))
        outcomes.append((y, *torch.autograd.grad(y, numbers, torch.ones_like(y))))
    for one, other in zip(*outcomes, strict=True):
        assert (one.double() - other.double()).norm() <= 2e-2 * other.double().norm()


@pytest.mark.parametrize("asked", [(0,), (1, 2, 3, 4), (2,)], ids=["rows", "parameters", "a bias"])
def test_only_what_is_asked_for(asked: tuple[int, ...]) -> None:
    numbers, plan = inputs([20, 5], 32, 32, True), plan_of([20, 5])
    everything = amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    wanted = torch.autograd.grad(everything, numbers, torch.ones_like(everything))
    some = [t.detach().requires_grad_(number in asked) for number, t in enumerate(numbers)]
    y = amx.amx_feed_forward(*some, plan, HiddenLayer("relu"))
    y.backward(torch.ones_like(y))
    for number, tensor in enumerate(some):
        assert (tensor.grad is not None) == (number in asked)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, wanted[number])


def test_the_same_bits_at_inference_and_in_any_number_of_threads() -> None:
    counts = [300, 180, 250, 90]
    numbers, plan, before = inputs(counts, 256, 256, True), plan_of(counts), torch.get_num_threads()
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
        with torch.inference_mode():
            assert torch.equal(amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu")), y)
        outcomes.append((y, *torch.autograd.grad(y, numbers, torch.ones_like(y))))
    torch.set_num_threads(before)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_nan_reaches_the_output() -> None:
    numbers, plan = inputs([3, 3], 32, 32, True), plan_of([3, 3])
    with torch.no_grad():
        numbers[0][4, 7] = float("nan")
        y = amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    assert y[4].isnan().all() and y[[0, 1, 2, 3, 5]].isfinite().all()


def test_torchs_products_on_the_same_unit_are_not_disturbed() -> None:
    """oneDNN sets the unit up for itself, in the same threads."""
    a, b = torch.randn(64, 64).to(BF16), torch.randn(64, 64).to(BF16)
    numbers, plan, wanted = inputs([64], 32, 32, False), plan_of([64]), a @ b
    for _ in range(3):
        amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
        assert torch.equal(a @ b, wanted)


@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"sublayers": 2}, {"dim": 7, "hidden": 10}], ids=str)
def test_the_pool_uses_the_backend_with_the_same_result(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = pool_of(0, 4, BF16, **{"dim": 32, "hidden": 64, **kind})
    x = torch.randn(12, experts.spec.dim).to(BF16).requires_grad_()
    assignment = random_assignment(12, 4, 40, 1)
    taken = []
    for name in ("amx_feed_forward", "amx_weighted_sums"):
        monkeypatch.setattr(mlp, name, partial(counted, taken, getattr(amx, name)))
    outcomes = []
    for ours in (True, False):
        monkeypatch.setattr(amx_mlp, "is_supported", lambda rows, ours=ours: ours)
        y = experts(x, assignment)
        outcomes.append((y, *torch.autograd.grad(y, [x, *experts.parameters()], torch.ones_like(y))))
    assert len(taken) == experts.spec.sublayers
    for one, other in zip(*outcomes, strict=True):
        assert (one.double() - other.double()).norm() <= 2e-2 * other.double().norm()


def counted(taken: list[str], kernel: Callable[..., Tensor], *given: object) -> Tensor:
    taken.append("here")
    return kernel(*given)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_backward_hidden_rows_are_not_kept(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, plan, made = inputs([40, 7], 32, 64, True), plan_of([40, 7]), []
    fresh = amx_mlp.empty
    monkeypatch.setattr(amx_mlp, "empty", lambda *given: made.append(given) or fresh(*given))
    with mode():
        amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    assert made == []
    amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    assert len(made) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_and_under_autocast(reentrant: bool) -> None:
    experts, x = pool_of(0, 4, torch.float32, dim=32, hidden=64), torch.randn(12, 32, requires_grad=True)
    assignment, outcomes = random_assignment(12, 4, 40, 1), []

    def run(x: Tensor) -> Tensor:
        return experts(x, assignment)

    for forward in (run, partial(checkpoint, run, use_reentrant=reentrant)):
        x.grad = None
        experts.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        y.sum().backward()
        outcomes.append((y, x.grad, *(parameter.grad for parameter in experts.parameters())))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_independent_of_the_default_dtype(dtype: torch.dtype) -> None:
    numbers, plan = inputs([40, 7], 64, 256, True), plan_of([40, 7])
    y = amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    wanted = torch.autograd.grad(y, numbers, torch.ones_like(y), retain_graph=True)
    torch.set_default_dtype(dtype)
    try:
        found = torch.autograd.grad(y, numbers, torch.ones_like(y))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_strided_inputs() -> None:
    numbers, plan = inputs([9, 4], 32, 64, True), plan_of([9, 4])
    strided = [t.detach().transpose(-1, 0).contiguous().transpose(-1, 0) for t in numbers]
    assert not strided[1].is_contiguous()
    wanted = amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))
    assert torch.equal(amx.amx_feed_forward(*strided, plan, HiddenLayer("relu")), wanted)


@pytest.mark.parametrize(("place", "wrong"), [(0, (46, 32)), (1, (3, 32, 64)), (3, (2, 64, 31)), (4, (2, 64))])
def test_what_does_not_fit_is_refused(place: int, wrong: tuple[int, ...]) -> None:
    numbers, plan = inputs([40, 7], 32, 64, True), plan_of([40, 7])
    numbers[place] = torch.zeros(wrong, dtype=BF16)
    with pytest.raises(ValueError, match=re.escape(str(wrong))):
        amx.amx_feed_forward(*numbers, plan, HiddenLayer("relu"))


def test_threads_that_end_leave_no_memory() -> None:
    numbers, plan = inputs([1500], 64, 512, False), plan_of([1500])
    numbers = [None if t is None else t.detach() for t in numbers]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def once() -> None:
        thread = threading.Thread(target=amx.amx_feed_forward, args=(*numbers, plan, HiddenLayer("relu")))
        thread.start()
        thread.join()

    once()
    before = resident()
    for _ in range(20):
        once()
    assert resident() - before < 20 << 20  # each had 4 MiB


def test_amx_backend_needs_bf16_and_relu() -> None:
    rows = torch.zeros(1, dtype=BF16)
    assert mlp.choose_backend(rows, "relu", 1).name == "amx" and mlp.choose_backend(rows, "gelu", 1).name == "torch"
    assert mlp.choose_backend(rows.float(), "relu", 1).name == "torch" and not amx_mlp.is_supported(rows.float())
