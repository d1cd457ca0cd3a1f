"""Label-smoothed cross-entropy as fairseq defines it, without its copies of the [N, V] scores.

    loss = (1 − ε − ε/(V−1)) · nll + ε/(V−1) · Σ_v −log p_v,        nll = −log p_target

The weights of all classes sum to one: the gradient by a logit is p − q, with q = ε/(V−1), and 1 − ε at the target.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.products import affine, affine_into


def label_smoothed_nll(logits: Tensor, target: Tensor, eps: float, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Sums over the rows whose target is not ``ignore``.

    Args:
        logits: [N, V], any floating type; log p is computed in fp32 (fp64 for fp64).
        target: [N] int64.
        eps: label smoothing ε.
        ignore: targets of this index count for nothing (padding).

    Returns:
        loss and nll, 0-dim fp32, in nats. Only the loss has a gradient.
    """
    loss, nll = _LabelSmoothedNll.apply(logits, target, eps, ignore)  # type: ignore[no-untyped-call]
    return loss, nll


def fused_label_smoothed_nll(
    features: Tensor, weight: Tensor, target: Tensor, eps: float, ignore: int = -100, chunk_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`label_smoothed_nll` of ``features @ weight.T``, the product included.

    The scores exist for a few rows at a time, small enough for the processor's cache, and the gradients by features and
    weight are computed while they do. Use it where nothing else needs the logits; on tens of thousands of tokens it
    also saves gigabytes.

    Args:
        features: [N, d].
        weight: [V, d], the output embedding.
        target, eps, ignore: as above.
        chunk_rows: rows at a time; 0 chooses some 4 MiB of scores on a CPU, and 256 MiB on a GPU.

    Returns:
        loss and nll, 0-dim fp32, in nats. Only the loss has a gradient.
    """
    if torch.is_autocast_enabled(features.device.type):
        kind = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(kind), weight.to(kind)
    room = (4 if features.device.type == "cpu" else 256) << 20
    rows = chunk_rows or max(room // (4 * weight.shape[0]), 16)
    loss, nll = _FusedLabelSmoothedNll.apply(features, weight, target, eps, ignore, rows)  # type: ignore[no-untyped-call]
    return loss, nll


def _accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sums(log_p: Tensor, target: Tensor, eps: float, ignore: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, which rows count [N] and their targets with the ignored ones made valid [N]."""
    real = target.ne(ignore)
    safe = target.masked_fill(~real, 0)
    eps_each = eps / max(log_p.shape[1] - 1, 1)
    nll = -(log_p.gather(1, safe.unsqueeze(1)).squeeze(1) * real).sum()
    loss = (1.0 - eps - eps_each) * nll
    if eps:
        loss = loss - eps_each * (log_p.sum(1) * real).sum()
    return loss, nll, real, safe


def _gradient_(log_p: Tensor, safe: Tensor, real: Tensor, eps: float) -> Tensor:
    """Turns log p [N, V] into the loss's gradient by the logits, in place."""
    eps_each = eps / max(log_p.shape[1] - 1, 1)
    gradient = log_p.exp_()
    if eps:
        gradient.sub_(eps_each)
    at_target = gradient.new_full((safe.shape[0], 1), -(1.0 - eps - eps_each))
    gradient.scatter_add_(1, safe.unsqueeze(1), at_target)
    if not bool(real.all()):
        gradient.mul_(real.unsqueeze(1))
    return gradient


class _LabelSmoothedNll(torch.autograd.Function):
    """Keeps log p, and makes the gradient of it in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, eps: float, ignore: int) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, dim=1, dtype=_accumulation_type(logits.dtype))
        loss, nll, real, safe = _sums(log_p, target, eps, ignore)
        # Not save_for_backward: it would forbid the change in place; nobody else sees this tensor.
        ctx.log_p = log_p
        ctx.save_for_backward(real, safe)
        ctx.eps, ctx.dtype = eps, logits.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.log_p is None:
            raise RuntimeError("label_smoothed_nll can be differentiated once only: its buffer has been used up")
        real, safe = ctx.saved_tensors
        gradient, ctx.log_p = _gradient_(ctx.log_p, safe, real, ctx.eps), None
        return gradient.mul_(grad_loss).to(ctx.dtype), None, None, None


class _FusedLabelSmoothedNll(torch.autograd.Function):
    """Goes through the rows in chunks and computes both gradients on the way."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, eps: float, ignore: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        kind = _accumulation_type(features.dtype)
        loss = torch.zeros((), dtype=kind, device=features.device)
        nll = torch.zeros_like(loss)
        grad_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=kind) if ctx.needs_input_grad[1] else None
        for start in range(0, features.shape[0], rows):
            x, chunk_target = features[start : start + rows], target[start : start + rows]
            log_p = F.log_softmax(affine(x, weight.t(), None), dim=1, dtype=kind)
            chunk_loss, chunk_nll, real, safe = _sums(log_p, chunk_target, eps, ignore)
            loss += chunk_loss
            nll += chunk_nll
            if grad_features is None and grad_weight is None:
                continue
            gradient = _gradient_(log_p, safe, real, eps).to(features.dtype)
            if grad_features is not None:
                affine_into(grad_features[start : start + rows], gradient, weight)
            if grad_weight is not None:
                _add_product_(grad_weight, gradient, x)
        ctx.grad_features, ctx.grad_weight, ctx.weight_type = grad_features, grad_weight, weight.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        by_features = None if ctx.grad_features is None else ctx.grad_features * grad_loss.to(ctx.grad_features.dtype)
        by_weight = None if ctx.grad_weight is None else (ctx.grad_weight * grad_loss).to(ctx.weight_type)
        return by_features, by_weight, None, None, None, None


def _add_product_(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total [V, d] += gradient.T @ x."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), x)
    else:
        total.add_(gradient.t() @ x)
