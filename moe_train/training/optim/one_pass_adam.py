"""Adam's step on CPUs with matrix units, from 16-bit gradients to 16-bit compute weights in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_train.kernels.cpu.adam import AdamPart, adam_step, is_supported
from moe_train.training.optim.precision import ComputeWeights


class OnePassAdam:
    """Does what ``optimizer.step()`` does to torch's Adam or AdamW and its state, and writes the compute weights.

    Args:
        weights: the compute weights of the optimizer's parameters.
    """

    def __init__(self, optimizer: torch.optim.Adam, weights: ComputeWeights) -> None:
        self._optimizer, self._weights = optimizer, weights
        self._decoupled = isinstance(optimizer, torch.optim.AdamW)

    @torch.no_grad()
    def step(self, divisor: Tensor | None, found_inf: Tensor) -> None:
        """One step with the gradients divided by ``divisor`` (0-dim; None: 1); none if ``found_inf`` is not 0."""
        if found_inf.numpy():
            return
        for group in self._optimizer.param_groups:
            parts = [
                self._part(parameter, gradient.contiguous(), group["lr"], group["betas"], group["weight_decay"])
                for parameter in group["params"]
                if (gradient := self._weights.gradient(parameter)) is not None
            ]
            if parts:
                adam_step(parts, group["betas"], group["eps"], 1.0 if divisor is None else float(divisor.numpy()))

    def _part(
        self, parameter: nn.Parameter, gradient: Tensor, lr: float, betas: tuple[float, float], decay: float
    ) -> AdamPart:
        state = self._optimizer.state[parameter]
        if not state:  # as torch's Adam begins
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"].numpy())
        copy = self._weights.leaf(parameter)
        return AdamPart(
            parameter=parameter.detach(),
            gradient=gradient,
            first_moment=state["exp_avg"],
            second_moment=state["exp_avg_sq"],
            copy=None if copy is parameter else copy.detach(),
            kept=1 - lr * decay if self._decoupled else 1.0,
            decay=0.0 if self._decoupled else decay,
            step=lr / (1 - betas[0] ** step),
            root=math.sqrt(1 - betas[1] ** step),
        )


def one_pass_adam(optimizer: torch.optim.Optimizer, weights: ComputeWeights) -> OnePassAdam | None:
    """The one-pass step of an optimizer; None where it has no kernel: another optimizer, device or processor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plain = all(p.dtype == torch.float32 and p.is_contiguous() and is_supported(p) for p in parameters)
    if not (isinstance(optimizer, torch.optim.Adam) and parameters and plain and weights.has_bf16_copies):
        return None
    return OnePassAdam(optimizer, weights)
