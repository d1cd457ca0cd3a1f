"""Our routers against DeepSpeed's gates: combine weights, drops, auxiliary loss."""

from __future__ import annotations

import pytest
import torch

from tests.reference.routings import EXPERTS, TOKENS, combine_matrix, difference, draws, gate, loss, routed

X = draws(TOKENS, 12, seed=3)
LOGITS = X @ gate().T


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_top_1(factor: float) -> None:
    from deepspeed.moe.sharded_moe import top1gating

    auxiliary, combined, _, _ = top1gating(LOGITS, factor, 1, use_rts=False)
    ours, expected = routed("switch", X, gate(), capacity_factor=factor), combined.sum(2)
    matrix = combine_matrix(ours, TOKENS, EXPERTS)
    # Which tokens an expert drops is not defined there (a top-k of equal numbers); how many is.
    assert torch.equal((matrix > 0).sum(0), (expected > 0).sum(0))
    both = (matrix > 0) & (expected > 0)
    assert difference(matrix[both], expected[both]) < 1e-12
    assert difference(loss(ours, "balance_loss"), auxiliary) < 1e-7


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_top_2(factor: float) -> None:
    """Without sampling of the second expert, whose noise is a different one."""
    from deepspeed.moe.sharded_moe import top2gating

    auxiliary, combined, _, _ = top2gating(LOGITS.float(), factor, 1, top2_2nd_expert_sampling=False)
    ours = routed("top_k", X, gate(), top_k=2, capacity_factor=factor)
    assert difference(combine_matrix(ours, TOKENS, EXPERTS), combined.sum(2)) < 1e-6, "the reference is in fp32"
    assert difference(loss(ours, "balance_loss"), auxiliary) < 1e-7


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_without_drops(k: int) -> None:
    from deepspeed.moe.sharded_moe import topkgating

    _, combined, _, _ = topkgating(LOGITS.clone(), k, 1.0, 1, drop_tokens=False)
    ours = routed("top_k", X, gate(), top_k=k, normalise="none" if k == 1 else "after_drop")
    expected = combined.sum(2)
    matrix = combine_matrix(ours, TOKENS, EXPERTS)
    if k == 1:
        expected, matrix = expected.sign(), matrix.sign()  # the reference divides one weight by itself
    assert torch.equal(matrix > 0, expected > 0)
    assert difference(matrix, expected) < 1e-6
