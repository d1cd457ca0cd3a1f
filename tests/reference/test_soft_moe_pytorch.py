"""Our Soft MoE layer against soft-moe-pytorch: outputs and gradients, with padding."""

from __future__ import annotations

import math

import pytest
import torch

from tests.reference.routings import DIM, EXPERTS, difference, draws, gradients, layer

soft_moe_pytorch = pytest.importorskip(
    "soft_moe_pytorch", reason="needs soft-moe-pytorch (pip install soft-moe-pytorch)"
)


def test_outputs_and_gradients() -> None:
    """The reference mixes normalised tokens and scales both sides by learned vectors; with tokens of norm 1 and scales
    that make up for √d on each side, the functions are equal."""
    slots, hidden = 2, 4 * DIM
    theirs = soft_moe_pytorch.SoftMoE(DIM, num_experts=EXPERTS, num_slots=slots).double()
    ours = layer("soft_moe", hidden, num_experts=EXPERTS, slots_per_expert=slots, normalisation="none")
    router, (stack,) = ours.block.router, ours.block.pool.sublayers
    raw = draws(EXPERTS, slots, DIM, seed=9)
    with torch.no_grad():
        theirs.slot_embeds.copy_(raw)
        for norm in (theirs.norm, theirs.slot_norm):
            norm.gamma.fill_(1 / math.sqrt(DIM))
        router.phi.copy_(torch.nn.functional.normalize(raw, dim=-1).flatten(0, 1))
        router.scale.fill_(1.0)
        for e, expert in enumerate(theirs.experts.experts):
            expert[0].weight.copy_(stack.fc1_weight[e].T)
            expert[0].bias.copy_(stack.fc1_bias[e])
            expert[3].weight.copy_(stack.fc2_weight[e].T)
            expert[3].bias.copy_(stack.fc2_bias[e])
    x = torch.nn.functional.normalize(draws(3, 9, DIM, seed=4), dim=-1).requires_grad_()
    real = torch.arange(9) < torch.tensor([9, 6, 1]).unsqueeze(1)
    expected = theirs(x, mask=real) * real.unsqueeze(2)
    found, _ = ours(x, ~real)
    assert difference(found, expected) < 1e-12
    leaves = [expert[0].weight for expert in theirs.experts.experts]
    (mine,) = gradients(found, stack.fc1_weight)
    for e, gradient in enumerate(gradients(expected, *leaves)):
        assert difference(mine[e].T, gradient) < 1e-12
