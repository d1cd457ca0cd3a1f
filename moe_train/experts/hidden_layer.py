"""What lies between the two products of an expert: the activation and its dropout, forward and backward."""

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

    def draw(self, rows: Tensor, hidden: int) -> Tensor | None:
        """[N, h]: 0 where dropout drops, the compensating scale elsewhere; None without dropout."""
        if not self.dropout:
            return None
        keep = 1 - self.dropout
        return rows.new_empty(rows.shape[0], hidden).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """scale · act(x w + b), and what backward needs: ReLU's output tells all, GELU needs its input."""
        before = linear(x, w, b, relu=self.activation == "relu")
        return self.dropped(before if self.activation == "relu" else F.gelu(before), scale), before

    def activate(self, before: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of a product that is there already, which ReLU overwrites."""
        hidden = before.relu_() if self.activation == "relu" else F.gelu(before)
        return self.dropped(hidden, scale), before

    @staticmethod
    def dropped(hidden: Tensor, scale: Tensor | None) -> Tensor:
        """hidden · scale, in its place."""
        return hidden if scale is None else hidden.mul_(scale)

    def recall(self, kept: Tensor, scale: Tensor | None) -> Tensor:
        """The hidden rows again."""
        if self.activation == "relu":
            return kept
        return self.dropped(F.gelu(kept), scale)

    def backward(self, grad: Tensor, kept: Tensor, scale: Tensor | None) -> Tensor:
        """The gradient before the activation; may overwrite ``grad``, the gradient of the hidden rows."""
        if scale is not None:
            grad = grad.mul_(scale)
        if self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=grad)
            return grad
        return torch.ops.aten.gelu_backward(grad, kept)  # type: ignore[no-any-return]
