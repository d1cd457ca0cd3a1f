"""The pool of experts: carries out an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t), near or far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.experts.grouped import prefers_grouped
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.experts.plan import plan_rows
from moe_train.experts.products import padding_worth_a_batch, row_alignment
from moe_train.experts.spec import ExpertSpec
from moe_train.experts.stack import run_experts
from moe_train.parallel.exchange import exchange
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.rows import gather_rows, mix_rows
from moe_train.routing.types import Assignment


class ExpertPool(nn.Module):
    """E experts, of which this rank holds its share, stacked.

    Each parameter carries ``parameter.expert = True`` and ``parameter.expert_ids``, the global ids of its rows.

    Args:
        spec: what one expert is.
        num_experts: E, over all ranks.
        layout: which rank owns which experts; None keeps them all here.

    Raises:
        ConfigError: the layout cannot divide E experts.
    """

    def __init__(self, spec: ExpertSpec, num_experts: int, layout: ExpertLayout | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts
        self.layout = layout or ExpertLayout.alone()
        self.expert_ids = self.layout.experts(num_experts)
        self.sublayers = nn.ModuleList(StackedFeedForward(spec, len(self.expert_ids)) for _ in range(spec.sublayers))
        for parameter in self.parameters():
            parameter.expert_ids = self.expert_ids  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all local experts anew; the same draws under any layout."""
        initialise(self._stacks, self.expert_ids)

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Mixes the experts' outputs. Where experts are divided over ranks, all of these must call it together.

        Args:
            x: [T, d], this rank's tokens (T may be 0).
            assignment: pairs over all E experts; tokens without a pair get 0.

        Returns:
            y [T, d] in x's type; sums in fp32 (fp64 for fp64). With T = 0 or no pairs every parameter still gets a
            (zero) gradient.
        """
        inputs = x.to(_compute_type(x))
        token, expert, weight = assignment.token, assignment.expert, assignment.weight
        if not self.layout.exchanges:
            return self._mix(inputs, token, expert, weight, x.dtype)
        return self._exchange(inputs, token, expert, weight).to(x.dtype)

    def _exchange(self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        layout, held = self.layout, len(self.expert_ids)
        if not layout.plan.exchanges_by_node:
            return exchange(x, token, expert, weight, held, self._mix, layout.expert_peers)

        def on_node(x: Tensor, row: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
            return exchange(x, row, expert, weight, held, self._mix, layout.local_peers)

        on_each_node = held * layout.plan.ranks_per_node
        return exchange(x, token, expert, weight, on_each_node, on_node, layout.node_peers)

    def _mix(
        self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The experts held here: x [R, d], pairs with local expert numbers → [R, d], in at least fp32 or ``dtype``."""
        on_host = not prefers_grouped(x)
        held, mean = len(self.expert_ids), token.shape[0] / len(self.expert_ids)
        align, padding = row_alignment(x, mean), padding_worth_a_batch(x, mean)
        plan = plan_rows(token, expert, x.shape[0], held, align, on_host, padding)
        out = run_experts(gather_rows(x, plan.tokens), plan, self._stacks, self.training)
        return mix_rows(out, weight, plan.tokens, dtype)

    @property
    def _stacks(self) -> list[StackedFeedForward]:
        return [stack for stack in self.sublayers if isinstance(stack, StackedFeedForward)]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_experts={self.num_experts}, held={self.expert_ids}, {self.spec}"


def _compute_type(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
