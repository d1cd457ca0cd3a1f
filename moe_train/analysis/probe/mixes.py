"""Statistics of Soft MoE's mixing weights (Puigcerver et al., 2024, §5 and appendix).

Dispatch weights D [.., m, s] sum to 1 over the m tokens of each slot, combine weights C [.., m, s] over the s slots of
each token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def needed_for_share(weights: Tensor, dim: int, share: float = 0.9) -> Tensor:
    """How many of the largest weights along ``dim`` make up ``share`` of their sum; int64, without that dimension.

    Along the tokens of D: the number of tokens that mainly contribute to a slot. Along the slots of C: the number of
    slots that mainly contribute to a token's output. 1 everywhere: the soft mix has become a hard choice.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], not {share}")
    ordered = weights.double().sort(dim=dim, descending=True).values
    reached = ordered.cumsum(dim) / ordered.sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # Rounding may leave the sum slightly below 1.
    return (reached < share - 1e-12).sum(dim) + 1


def token_contributions(dispatch: Tensor) -> Tensor:
    """[.., m] Σ over slots of D, times m / s: 1 for a token with the weight of the mean token, 0: dropped."""
    tokens, slots = dispatch.shape[-2:]
    return dispatch.double().sum(-1) * (tokens / slots)


def expert_importance(combine: Tensor, num_experts: int) -> Tensor:
    """[E] each expert's share of all combine weights C [.., m, s], whose slots are ordered by expert.

    Raises:
        ValueError: the number of slots is not a multiple of that of experts.
    """
    slots = combine.shape[-1]
    if slots % num_experts:
        raise ValueError(f"{num_experts} experts do not divide {slots} slots")
    per_slot = combine.double().reshape(-1, slots).sum(0)
    per_expert = per_slot.view(num_experts, -1).sum(1)
    return per_expert / per_expert.sum().clamp(min=torch.finfo(torch.float64).tiny)


def mix_statistics(
    dispatch: Tensor, combine: Tensor, num_experts: int, padding: Tensor | None = None
) -> dict[str, float]:
    """Means of these measures over the real tokens and the slots of D and C, [B, m, s] each.

    ``tokens_per_slot`` and ``slots_per_token`` (for 90 % of the weight), ``weak_tokens`` (the share of tokens
    with less than a quarter of the mean weight), ``expert_importance_max`` (times E: 1 where all are equal).

    Args:
        padding: [B, m], true for padding, where D and C are zero.
    """
    real = torch.ones(dispatch.shape[:2], dtype=torch.bool) if padding is None else ~padding
    importance = expert_importance(combine, num_experts)
    # A token's mean contribution is 1 among the real ones of its sentence, not among all m.
    counted = token_contributions(dispatch) * (real.sum(1, keepdim=True) / real.shape[1])
    return {
        "tokens_per_slot": float(needed_for_share(dispatch, -2)[real.any(1)].double().mean()),
        "slots_per_token": float(needed_for_share(combine, -1)[real].double().mean()),
        "weak_tokens": float((counted[real] < 0.25).double().mean()),
        "expert_importance_max": float(importance.max() * num_experts),
    }
