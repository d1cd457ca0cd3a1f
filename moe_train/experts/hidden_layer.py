"""Activation and dropout between the two products of an expert, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.spec import Activation
from moe_train.kernels.cpu.matmul import linear


@dataclass(frozen=True)
class HiddenLayer:
    """Activation and dropout of the hidden rows. ``dropout`` is 0 in evaluation."""

    activation: Activation
    dropout: float = 0.0

    def sample_dropout(self, rows: Tensor, hidden: int) -> Tensor | None:
        """Scale [N, h] of the hidden rows: 0 with probability p, else 1 / (1 - p); None without dropout."""
        if not self.dropout:
            return None
        keep = 1 - self.dropout
        return rows.new_empty(rows.shape[0], hidden).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """scale · act(x w + b), and the tensor kept for backward: ReLU's output, or GELU's input."""
        before = linear(x, w, b, relu=self.activation == "relu")
        return self.apply_dropout(before if self.activation == "relu" else F.gelu(before), scale), before

    def activate(self, before: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same as :meth:`forward`, for ``before`` = x w + b, which ReLU overwrites."""
        hidden = before.relu_() if self.activation == "relu" else F.gelu(before)
        return self.apply_dropout(hidden, scale), before

    @staticmethod
    def apply_dropout(hidden: Tensor, scale: Tensor | None) -> Tensor:
        """hidden · scale, in place."""
        return hidden if scale is None else hidden.mul_(scale)

    def recompute(self, kept: Tensor, scale: Tensor | None) -> Tensor:
        """The hidden rows, from the tensor kept for backward."""
        if self.activation == "relu":
            return kept
        return self.apply_dropout(F.gelu(kept), scale)

    def backward(self, grad: Tensor, kept: Tensor, scale: Tensor | None) -> Tensor:
        """Gradient of the activation's input; may overwrite ``grad``, the gradient of the hidden rows."""
        if scale is not None:
            grad = grad.mul_(scale)
        if self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=grad)
            return grad
        return torch.ops.aten.gelu_backward(grad, kept)  # type: ignore[no-any-return]
