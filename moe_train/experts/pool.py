"""The pool of experts: carries out an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.experts.mixing import GatherRows, MixRows
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.experts.plan import plan_rows
from moe_train.experts.products import row_alignment
from moe_train.experts.spec import ExpertSpec
from moe_train.experts.stack import run_experts
from moe_train.routing.types import Assignment


class ExpertPool(nn.Module):
    """E experts, stacked. Each parameter carries ``parameter.expert = True``.

    Args:
        spec: what one expert is.
        num_experts: E, over all ranks.
        layout: which rank owns which experts; None keeps them all here.
    """

    def __init__(self, spec: ExpertSpec, num_experts: int, layout: None = None) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts
        self.sublayers = nn.ModuleList(StackedFeedForward(spec, num_experts) for _ in range(spec.sublayers))
        self.reset_parameters()

    @property
    def expert_ids(self) -> range:
        """Global ids of the experts that this rank holds."""
        return range(self.num_experts)

    def reset_parameters(self) -> None:
        """Draws all local experts anew; the same draws under any layout."""
        initialise(self._stacks, self.expert_ids)

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Mixes the experts' outputs.

        Args:
            x: [T, d].
            assignment: pairs over all E experts; tokens without a pair get 0.

        Returns:
            y [T, d] in x's type; sums in fp32 (fp64 for fp64). With T = 0 or no pairs every parameter still gets a
            (zero) gradient.
        """
        compute = _compute_type(x)
        y = self._mix(x.to(compute), assignment.token, assignment.expert, assignment.weight)
        return y.to(x.dtype)

    def _mix(self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        plan = plan_rows(token, expert, x.shape[0], len(self.expert_ids), row_alignment(x))
        rows = GatherRows.apply(x, plan)  # type: ignore[no-untyped-call]
        out = run_experts(rows, plan, self._stacks, self.training)
        return MixRows.apply(out, weight, plan)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def _stacks(self) -> list[StackedFeedForward]:
        return [stack for stack in self.sublayers if isinstance(stack, StackedFeedForward)]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_experts={self.num_experts}, {self.spec}"


def _compute_type(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
