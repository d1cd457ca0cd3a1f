"""The norm of the whole gradient, clipping by it, and who spoilt it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]


def total_norm(grads: Sequence[Tensor], elsewhere: Tensor | None = None) -> Tensor:
    """The 2-norm over all gradients, 0-dim.

    Args:
        grads: this rank's gradients, each counted once in the world by the caller's choice of them.
        elsewhere: 0-dim, the summed squares of what other ranks hold (experts), where there is any.
    """
    norm = torch.nn.utils.get_total_norm(list(grads)) if grads else torch.zeros(())
    return norm if elsewhere is None else (norm.square() + elsewhere).sqrt()


def clip(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scales all gradients by ``max_norm / norm`` where the norm is above it; ``max_norm`` 0 leaves them."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
