"""The pool of experts: carries out an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t), near or far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_train.experts.grouped import can_group, prefers_grouped
from moe_train.experts.native import serves
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.experts.plan import RowPlan, plan_rows
from moe_train.experts.products import padding_worth_a_batch, row_alignment
from moe_train.experts.spec import ExpertSpec
from moe_train.experts.stack import run_experts
from moe_train.parallel.exchange import Beside, exchange
from moe_train.parallel.fixed import exchange_fixed
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.rows import count_ids, gather_rows, mix_rows
from moe_train.parallel.sizes import Level
from moe_train.routing.types import Assignment


class ExpertPool(nn.Module):
    """E experts, of which this rank holds its share, stacked.

    Each parameter carries ``parameter.expert = True`` and ``parameter.expert_ids``, the global ids of its rows.

    Args:
        spec: what one expert is.
        num_experts: E, over all ranks.
        layout: which rank owns which experts; None keeps them all here.
        most: experts that a token has at most; None: all of them. Only exchanges of fixed size need it.

    Raises:
        ConfigError: the layout cannot divide E experts.
    """

    def __init__(
        self, spec: ExpertSpec, num_experts: int, layout: ExpertLayout | None = None, most: int | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts
        self.layout = layout or ExpertLayout.alone()
        self.expert_ids = self.layout.experts(num_experts)
        self.most = min(most or num_experts, len(self.expert_ids))
        self.sublayers = nn.ModuleList(StackedFeedForward(spec, len(self.expert_ids)) for _ in range(spec.sublayers))
        for parameter in self.parameters():
            parameter.expert_ids = self.expert_ids  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all local experts anew; the same draws under any layout."""
        initialise(self._stacks, self.expert_ids)

    @property
    def fixed_size(self) -> bool:
        """Whether exchanges have sizes that no token changes: in training, where the layout says so.

        Then experts of an assignment may be negative: pairs that are not to be carried out.
        """
        return self.training and self.layout.exchanges and self.layout.options.fixed_rows > 0

    def forward(self, x: Tensor, assignment: Assignment, beside: Beside | None = None) -> Tensor:
        """Mixes the experts' outputs. Where experts are divided over ranks, all of these must call it together.

        Args:
            x: [T, d], this rank's tokens (T may be 0).
            assignment: pairs over all E experts; tokens without a pair get 0.
            beside: what is to be added, [T, d]; computed while rows travel, where ``layout.overlap`` says so.

        Returns:
            y [T, d] in x's type; sums in fp32 (fp64 for fp64). With T = 0 or no pairs every parameter still gets a
            (zero) gradient.
        """
        inputs, exchanges = x.to(_compute_type(x)), self.layout.exchanges
        overlap = exchanges and self.layout.options.overlap
        if exchanges:
            y = self._exchange(inputs, assignment, beside if overlap else None).to(x.dtype)
        else:
            y = self._mix(inputs, assignment.token, assignment.expert, assignment.weight, dtype=x.dtype)
        return y if beside is None or overlap else y + beside()

    def _exchange(self, x: Tensor, a: Assignment, beside: Beside | None) -> Tensor:
        layout, held = self.layout, len(self.expert_ids)
        options = layout.options
        if layout.plan.exchanges_by_node:
            levels = Level(layout.node_peers, held * layout.plan.ranks_per_node), Level(layout.local_peers, held)
            return exchange(x, a.token, a.expert, a.weight, levels, self._mix, options.chunks, beside)
        level = Level(layout.expert_peers, held)
        if not self.fixed_size:
            return exchange(x, a.token, a.expert, a.weight, (level,), self._mix, options.chunks, beside)
        sizes = options.fixed_rows, self.most, options.chunks
        return exchange_fixed(x, a.token, a.expert, a.weight, level, self._mix_fixed, *sizes, beside)

    def _mix(
        self,
        x: Tensor,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        counts: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The experts held here: x [R, d], pairs with local expert numbers → [R, d], in at least fp32 or ``dtype``.

        ``counts``: pairs of each expert, where the host knows them already.
        """
        held, mean = len(self.expert_ids), token.shape[0] / len(self.expert_ids)
        if prefers_grouped(x):
            counts = None
        elif counts is None:
            counts = self.layout.counters.read(count_ids(expert, held))
        align, padding = row_alignment(x, mean), padding_worth_a_batch(x, mean)
        if serves(x, self.spec.activation):
            align, padding = 1, 0.0
        return self._run(x, weight, plan_rows(token, expert, x.shape[0], held, align, counts, padding), dtype)

    def _mix_fixed(
        self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, _: Sequence[int] | None = None
    ) -> Tensor:
        """The same for pairs with padding, whose expert is one past the last: by grouped products, without a read.

        fp64 has none: there the pairs are looked at.
        """
        held = len(self.expert_ids)
        if not can_group(x):
            real = (expert < held).nonzero().squeeze(1)
            return self._mix(x, token[real], expert[real], weight[real])
        return self._run(x, weight, plan_rows(token, expert, x.shape[0], held, row_alignment(x, token.shape[0] / held)))

    def _run(self, x: Tensor, weight: Tensor, plan: RowPlan, dtype: torch.dtype | None = None) -> Tensor:
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
