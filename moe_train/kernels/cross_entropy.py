"""Label-smoothed cross-entropy as in fairseq, without copies of the [N, V] scores.

    loss = (1 − ε − ε/(V−1)) · nll + ε/(V−1) · Σ_v −log p_v,        nll = −log p_target

The class weights q sum to one: q = 1 − ε at the target, ε/(V−1) elsewhere. The gradient of a logit is p − q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_train.kernels.cpu import amx_linear, smoothed_loss
from moe_train.kernels.cpu.huge_pages import empty
from moe_train.kernels.cpu.matmul import linear_into

_NONE = -100  # no row has this target


def label_smoothed_nll(logits: Tensor, target: Tensor, eps: float, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """Loss and nll, summed over the rows whose target is not ``ignore``.

    Args:
        logits: [N, V], any floating type; p is computed in fp32 (fp64 for fp64).
        target: [N] int64.
        eps: label smoothing ε.
        ignore: rows with this target are skipped (padding); None: no rows are.

    Returns:
        loss and nll, 0-dim fp32, in nats. Only the loss has a gradient.
    """
    loss, nll = _LabelSmoothedNll.apply(logits, target, eps, ignore)  # type: ignore[no-untyped-call]
    return loss, nll


def fused_label_smoothed_nll(
    features: Tensor, weight: Tensor, target: Tensor, eps: float, ignore: int | None = None, chunk_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`label_smoothed_nll` of ``features @ weight.T``, fused with the product.

    Logits exist for a few rows at a time, which fit in the processor's cache, and the gradients of features and weight
    are computed from them at once. Use it if nothing else needs the logits; with tens of thousands of tokens it also
    saves gigabytes.

    Args:
        features: [N, d].
        weight: [V, d], the output embedding; it may be fp32 with 16-bit features, and has its gradient in fp32 then.
        target, eps, ignore: as above.
        chunk_rows: rows at a time; 0: 64 M logits on a GPU, 8 MiB on a CPU, and at least 256 rows, since with
            fewer rows the weight's gradient is read and written too often.

    Returns:
        loss and nll, 0-dim fp32, in nats. Only the loss has a gradient.
    """
    if torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    chunk_logits = (8 << 20) // features.element_size() if features.device.type == "cpu" else 64 << 20
    rows = chunk_rows or max(chunk_logits // weight.shape[0], 256)
    loss, nll = _FusedLabelSmoothedNll.apply(features, weight, target, eps, ignore, rows)  # type: ignore[no-untyped-call]
    return loss, nll


def _accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Smoothed(NamedTuple):
    """The loss of N rows, and what its gradient needs.

    Attributes:
        loss, nll: 0-dim.
        p: [N, V] probabilities.
        real: [N] bool, False for ignored rows; None: there are none.
        target: [N] int64, 0 for ignored rows.
    """

    loss: Tensor
    nll: Tensor
    p: Tensor
    real: Tensor | None
    target: Tensor


def _smoothed(logits: Tensor, target: Tensor, eps: float, ignore: int | None, overwrite: bool) -> _Smoothed:
    """The loss of logits [N, V], which p overwrites if ``overwrite``.

    log p = logit − lse, and the log-sum-exp of a row is its largest logit minus the log of its largest p, so that one
    pass of exponentials is enough for the loss and the gradient.
    """
    kind, vocabulary = _accumulation_type(logits.dtype), logits.shape[1]
    real = None if ignore is None else target.ne(ignore)
    if real is not None:
        target = target.masked_fill(~real, 0)
    each = eps / max(vocabulary - 1, 1)
    at_target = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    total = logits.sum(1, dtype=kind) if eps else at_target
    largest = logits.amax(1)
    p = torch.softmax(logits, 1, out=logits) if overwrite else torch.softmax(logits, 1, dtype=kind)
    lse = largest - p.amax(1).log()
    nll = _row_sum(lse - at_target, real)
    loss = (1.0 - eps - each) * nll
    if eps:
        loss = loss + each * _row_sum(vocabulary * lse - total, real)
    return _Smoothed(loss, nll, p, real, target)


def _row_sum(rows: Tensor, real: Tensor | None) -> Tensor:
    return (rows if real is None else rows * real).sum()


def _loss_and_gradient(
    logits: Tensor, target: Tensor, eps: float, ignore: int | None, differentiated: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, nll, and the gradient of the logits [N, V] in their type if ``differentiated``. Overwrites the logits."""
    if smoothed_loss.is_supported(logits):
        nlls, smooth = smoothed_loss.smoothed_loss_(
            logits, target, eps, _NONE if ignore is None else ignore, differentiated
        )
        each, nll = eps / max(logits.shape[1] - 1, 1), nlls.sum()
        return (1.0 - eps - each) * nll + each * smooth.sum(), nll, logits if differentiated else None
    kind = _accumulation_type(logits.dtype)
    rows = _smoothed(logits, target, eps, ignore, overwrite=logits.dtype == kind)
    gradient = _gradient_(rows.p, rows.target, rows.real, eps).to(logits.dtype) if differentiated else None
    return rows.loss, rows.nll, gradient


def _gradient_(p: Tensor, target: Tensor, real: Tensor | None, eps: float) -> Tensor:
    """Turns p [N, V] into the gradient of the logits, in place."""
    each = eps / max(p.shape[1] - 1, 1)
    gradient = p.sub_(each) if eps else p
    at_target = gradient.new_full((target.shape[0], 1), -(1.0 - eps - each))
    gradient.scatter_add_(1, target.unsqueeze(1), at_target)
    if real is not None:
        gradient.mul_(real.unsqueeze(1))
    return gradient


class _LabelSmoothedNll(torch.autograd.Function):
    """Keeps p, and computes the gradient from it in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, eps: float, ignore: int | None) -> tuple[Tensor, Tensor]:
        rows = _smoothed(logits, target, eps, ignore, overwrite=False)
        # Not save_for_backward, which forbids in-place changes; no other code has this tensor.
        ctx.p = rows.p
        ctx.save_for_backward(rows.real, rows.target)
        ctx.eps, ctx.dtype = eps, logits.dtype
        ctx.mark_non_differentiable(rows.nll)
        return rows.loss, rows.nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.p is None:
            raise RuntimeError("label_smoothed_nll can be differentiated only once: backward overwrites its buffer")
        real, target = ctx.saved_tensors
        gradient, ctx.p = _gradient_(ctx.p, target, real, ctx.eps), None
        return gradient.mul_(grad_loss).to(ctx.dtype), None, None, None


class _FusedLabelSmoothedNll(torch.autograd.Function):
    """Computes the loss and both gradients in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, eps: float, ignore: int | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        kind, ctx.weight_type = _accumulation_type(features.dtype), weight.dtype
        weight = weight.to(features.dtype)
        loss = torch.zeros((), dtype=kind, device=features.device)
        nll = torch.zeros_like(loss)
        grad_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=kind) if ctx.needs_input_grad[1] else None
        differentiated, amx = any(ctx.needs_input_grad), amx_linear.is_supported(features)
        rows = min(rows, features.shape[0]) or 1
        logits = empty((rows, weight.shape[0]), features)
        for start in range(0, features.shape[0], rows):
            x, chunk_target = features[start : start + rows], target[start : start + rows]
            chunk = logits[: x.shape[0]]
            if amx:
                amx_linear.product(x, weight.t(), out=chunk)
            else:
                linear_into(chunk, x, weight.t())
            chunk_loss, chunk_nll, gradient = _loss_and_gradient(chunk, chunk_target, eps, ignore, differentiated)
            loss += chunk_loss
            nll += chunk_nll
            if gradient is None:
                continue
            if grad_features is not None and amx:
                amx_linear.product(gradient, weight, out=grad_features[start : start + rows])
            elif grad_features is not None:
                linear_into(grad_features[start : start + rows], gradient, weight)
            if grad_weight is not None and amx:
                amx_linear.product(gradient.t(), x, out=grad_weight)
            elif grad_weight is not None:
                _add_product_(grad_weight, gradient, x)
        ctx.grad_features, ctx.grad_weight = grad_features, grad_weight
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_features, grad_weight = ctx.grad_features, ctx.grad_weight
        grad_features = None if grad_features is None else grad_features * grad_loss
        grad_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_type)
        return grad_features, grad_weight, None, None, None, None


def _add_product_(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total [V, d] += gradient.T @ x."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), x)
    else:
        total.add_(gradient.t() @ x)
