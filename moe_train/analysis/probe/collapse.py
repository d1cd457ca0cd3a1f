"""Representation collapse of the inputs of a router (X-MoE, Chi et al., 2022, §4.5).

``RC = Tr(Σ_W Σ_B⁺)`` with the within-class covariance Σ_W and the pseudo-inverse of the between-class covariance Σ_B
(neural collapse's NC1, Papyan et al., 2020, without its factor 1/K). The paper does not define a class; here
it is the caller's label of the tokens: the expert to which they are routed, or their vocabulary id. Smaller is more
collapsed: 0 where all tokens of a class coincide.
"""

from __future__ import annotations

import torch
from torch import Tensor


def representation_collapse(states: Tensor, labels: Tensor, rtol: float = 1e-6) -> float:
    """``Tr(Σ_W Σ_B⁺)`` of states [T, d] under labels [T] int64.

    Invariant to rotations and to a global scale of the states. Computed in fp64.

    Args:
        rtol: singular values of Σ_B below ``rtol`` times the largest count as zero (its rank is at most K - 1).

    Raises:
        ValueError: fewer than two classes, for which Σ_B is zero and the measure is not defined.
    """
    states = states.to(torch.float64)
    names, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError("representation collapse compares at least two classes")
    total = states.shape[0]
    means = torch.zeros(len(names), states.shape[1], dtype=torch.float64).index_add_(0, members, states)
    means /= sizes.unsqueeze(1)
    within = states - means[members]
    between = (means - states.mean(0)) * (sizes / total).sqrt().unsqueeze(1)
    # Tr(Σ_W Σ_B⁺) = ‖within · V diag(1/s)‖² / T where Σ_B = V diag(s²) Vᵀ: no d x d matrix is inverted.
    _, singular, basis = torch.linalg.svd(between, full_matrices=False)
    kept = singular > singular.max() * rtol**0.5
    projected = within @ basis[kept].T / singular[kept]
    return float(projected.square().sum() / total)
