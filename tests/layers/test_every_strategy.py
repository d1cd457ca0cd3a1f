"""Every strategy as a layer with the real pool: it learns, padding is inert, every parameter gets a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_train.layers import MoELayer
from moe_train.routing import registered_strategies, routing_config

DIM = 12
KEYS: dict[str, dict[str, Any]] = {
    "sam": {"num_groups": 2},
    "top_k_shared": {"name": "top_k", "shared_expert": True},
    "top_k_balanced": {"name": "top_k", "scores": "sigmoid", "balancing_bias_rate": 0.001},
    "xmoe_sublayers": {"name": "xmoe", "expert_sublayers": 3},
    "thor_ensemble": {"name": "thor", "inference": "ensemble"},
    "smoe_official": {"name": "smoe", "norm": "official", "second_expert": "sampling", "normalise": "after_drop"},
}
CASES = [*registered_strategies(), *(name for name in KEYS if name not in registered_strategies())]
every = pytest.mark.parametrize("case", CASES)


def make(case: str, **changes: Any) -> MoELayer:
    return MoELayer(DIM, 16, {"name": case, "num_experts": 4, **KEYS.get(case, {}), **changes}).double()


def inputs(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(layer: MoELayer, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y, record = layer(x, padding)
    return (y if layer.owns_residual else x + y), (torch.zeros(()) if record is None else record.total_loss)


@every
def test_a_few_steps_reduce_the_loss(case: str) -> None:
    layer, x = make(case), inputs(4, 6)
    target = torch.tanh(x.flip(-1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for update in range(30):
        layer.settings.update = update
        y, auxiliary = run(layer, x)
        loss = nn.functional.mse_loss(y, target) + auxiliary
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@every
def test_padding_is_inert(case: str) -> None:
    layer, x = make(case).eval(), inputs(3, 6)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    y = run(layer, x, padding)[0]
    garbage = run(layer, x.masked_fill(padding.unsqueeze(2), 1e20), padding)[0]
    assert torch.equal(y[~padding], garbage[~padding])
    shorter = run(layer, x[:, :4], padding[:, :4])[0]
    torch.testing.assert_close(y[1:, :4][~padding[1:, :4]], shorter[1:][~padding[1:, :4]], rtol=1e-12, atol=1e-12)


@every
def test_recomputation_gives_the_same_gradients(case: str) -> None:
    found = []
    for recompute in (False, True):
        layer, x = make(case), inputs(2, 5).requires_grad_()
        y, auxiliary = checkpoint(run, layer, x, use_reentrant=False) if recompute else run(layer, x)
        (y.square().sum() + auxiliary).backward()
        found.append([x.grad, *[p.grad for p in layer.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every
def test_gradients_against_finite_differences(case: str) -> None:
    """Router, pool and what composes them, every parameter, with the auxiliary losses of training."""
    layer, x = make(case), inputs(2, 3).requires_grad_()
    padding = torch.tensor([[False, False, False], [False, False, True]])

    def function(x: Tensor, *_: Tensor) -> Tensor:
        y, auxiliary = run(layer, x, padding)
        return torch.cat((y[~padding].reshape(-1), auxiliary.reshape(1).to(y.dtype)))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), eps=1e-7, atol=1e-5, fast_mode=True)


@every
def test_an_empty_batch_reaches_every_expert(case: str) -> None:
    layer, x = make(case), inputs(0, 3)
    y, auxiliary = run(layer, x)
    assert y.shape == x.shape
    (y.sum() + auxiliary).backward()
    experts = [p for p in layer.parameters() if getattr(p, "expert", False)]
    assert all(p.grad is not None and not p.grad.any() for p in experts)


@pytest.mark.parametrize("case", [c for c in CASES if c != "dense"])
def test_frozen_blocks_do_not_learn_but_still_teach_what_is_below(case: str) -> None:
    layer, x = make(case, frozen=True), inputs(2, 5).requires_grad_()
    assert not any(p.requires_grad for p in layer.parameters())
    y, auxiliary = run(layer, x)
    (y.sum() + auxiliary).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("case", [c for c in CASES if c != "dense"])
def test_frozen_blocks_keep_every_bit_through_an_optimizers_steps(case: str) -> None:
    """Also with weight decay, moments and the balancing bias, while the layers below are trained (X-MoE §3.3)."""
    below, layer, x = nn.Linear(DIM, DIM).double(), make(case, frozen=True), inputs(2, 5)
    optimizer = torch.optim.AdamW([*below.parameters(), *layer.parameters()], lr=0.1, weight_decay=0.1)
    before, weight = {n: v.clone() for n, v in layer.state_dict().items()}, below.weight.detach().clone()
    for update in range(3):
        layer.settings.update = update
        y, record = layer(below(x))
        (y.square().sum() + record.total_loss).backward()
        optimizer.step()
        layer.block.router.after_update(record.statistics)
    assert all(torch.equal(before[n], v) for n, v in layer.state_dict().items())
    assert not torch.equal(below.weight, weight)


def test_a_shared_expert_is_passed_by_every_token() -> None:
    shared, x = make("top_k_shared"), inputs(2, 5)
    alone = make("top_k")
    alone.load_state_dict({n: v for n, v in shared.state_dict().items() if ".shared." not in n})
    difference = shared(x)[0] - alone(x)[0]
    torch.testing.assert_close(difference, shared.block.shared(x)[0])
    assert sum(p.numel() for p in shared.block.shared.parameters()) == 2 * DIM * 16 + DIM + 16


@every
def test_what_draws_at_inference_says_so(case: str) -> None:
    """Outputs of a trained layer depend on the seed of draws where its config says that it draws, and nowhere else."""
    layer, x = make(case).eval(), inputs(2, 5)
    found = []
    for seed in (1, 2, 3):
        layer.settings.seed = seed
        found.append(run(layer, x)[0])
    same = all(torch.equal(found[0], other) for other in found[1:])
    assert same is not routing_config({"name": case, "num_experts": 4, **KEYS.get(case, {})}).draws_at_inference
