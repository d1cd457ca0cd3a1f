"""The one-pass Adam kernel against torch's Adam and AdamW, and the norm against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_train.kernels.cpu.adam import is_supported, total_norm
from moe_train.training.optim.one_pass_adam import one_pass_adam
from moe_train.training.optim.precision import ComputeWeights

needs_kernels = pytest.mark.skipif(not is_supported(torch.zeros(1)), reason="needs AMX and a C compiler")


class Model(nn.Module):
    """Two layers that compute in 16 bits, and a norm that does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3, bias=False)
        self.first.computes_in_16_bits = self.second.computes_in_16_bits = True  # type: ignore[assignment]
        self.norm = nn.LayerNorm(3)


@needs_kernels
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("width", [1, 7, 40, 3000])
@pytest.mark.parametrize("divisor", [None, 2.5])
def test_a_step_is_torchs(kind: type[torch.optim.Adam], width: int, divisor: float | None) -> None:
    """Parameters and moments to the last bits, copies exactly; a parameter without a gradient stays."""
    torch.manual_seed(0)
    ours, theirs = Model(width), Model(width)
    theirs.load_state_dict(ours.state_dict())
    keys = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = kind(ours.parameters(), **keys), kind(theirs.parameters(), fused=True, **keys)
    weights = ComputeWeights(ours, torch.bfloat16)
    one_pass = one_pass_adam(optimizer, weights)
    assert one_pass is not None
    for update in range(4):
        with weights.in_use():
            pass
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            leaf = weights.leaf(mine)
            if mine is ours.norm.bias and update == 2:
                other.grad = leaf.grad = None
                continue
            leaf.grad = torch.randn_like(leaf)
            other.grad = leaf.grad.float().clone()
        if divisor is not None:
            for other in theirs.parameters():
                if other.grad is not None:
                    other.grad /= divisor
        reference.step()
        one_pass.step(None if divisor is None else torch.tensor(divisor), torch.zeros(()))
        before = [parameter.clone() for parameter in ours.parameters()]
        one_pass.step(None, torch.ones(()))
        assert all(map(torch.equal, before, ours.parameters())), "an overflow skips the step"
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-7)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    optimizer.state[mine][name], reference.state[other][name], rtol=2e-6, atol=1e-7
                )
            assert optimizer.state[mine]["step"] == reference.state[other]["step"]
            if (leaf := weights.leaf(mine)) is not mine:
                assert torch.equal(leaf, mine.bfloat16()), "the copy is that of the new parameter"


@needs_kernels
@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 200_000), min_size=1, max_size=5),
    seed=st.integers(0, 100),
    threads=st.sampled_from([1, 2, 3]),
)
def test_the_norm_is_that_of_fp64_with_any_number_of_threads(sizes: list[int], seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    gradients: list[Tensor] = [torch.randn(n, dtype=[torch.float32, torch.bfloat16][n % 2]) for n in sizes]
    expected = torch.cat([gradient.double() for gradient in gradients]).norm()
    one = total_norm(gradients)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(total_norm(gradients), one)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=0)


@needs_kernels
def test_numbers_that_are_not_finite_reach_the_norm() -> None:
    for bad in (float("inf"), float("nan")):
        gradient = torch.zeros(70_000, dtype=torch.bfloat16)
        gradient[69_999] = bad
        assert not torch.isfinite(total_norm([torch.ones(3), gradient]))


def test_other_optimizers_and_types_have_none() -> None:
    model = Model(4)
    weights, none = ComputeWeights(model, torch.bfloat16), ComputeWeights(model, None)
    assert one_pass_adam(torch.optim.SGD(model.parameters(), lr=0.1), weights) is None
    assert one_pass_adam(torch.optim.Adam(model.parameters()), none) is None
    assert one_pass_adam(torch.optim.Adam(model.double().parameters()), ComputeWeights(model, torch.bfloat16)) is None
