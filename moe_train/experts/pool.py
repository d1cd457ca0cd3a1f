"""The pool of experts: carries out an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t), on one rank or many.

A token's way: :meth:`ExpertPool.start` sends it to the ranks that hold its experts
(:mod:`moe_train.parallel.dispatch`); :meth:`ExpertPool.finish` puts what arrived into expert order (permute), runs the
experts held here (:mod:`moe_train.experts.mlp`), adds up each row's outputs (unpermute), and sends them back (combine).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moe_train.experts.mlp import choose_backend, run_experts
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.experts.row_plan import plan_rows
from moe_train.experts.spec import ExpertSpec
from moe_train.parallel.dispatch import Dispatch, LocalDispatch, Received, start_dispatch
from moe_train.parallel.fixed_dispatch import start_fixed_dispatch
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.permute import count_ids, permute_rows, unpermute_rows
from moe_train.parallel.split_sizes import DispatchLevel
from moe_train.routing.types import Assignment


@dataclass(frozen=True)
class PendingExperts:
    """Tokens that were sent to their experts and are not computed yet.

    Attributes:
        dtype: of the tokens, and of the layer's output.
        mix_dtype: what each row's sum over experts is rounded to; None: it stays in at least fp32.
    """

    dispatch: Dispatch
    dtype: torch.dtype
    mix_dtype: torch.dtype | None


class ExpertPool(nn.Module):
    """E experts, of which this rank holds its share, stacked.

    Each parameter carries ``parameter.expert = True`` and ``parameter.expert_ids``, the global ids of its rows.

    Args:
        spec: what one expert is.
        num_experts: E, over all ranks.
        layout: which rank owns which experts; None keeps them all here.
        max_experts_per_token: None: all of them. Only dispatch of fixed size needs it.

    Raises:
        ConfigError: the layout cannot divide E experts.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        num_experts: int,
        layout: ExpertLayout | None = None,
        max_experts_per_token: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts
        self.layout = layout or ExpertLayout.alone()
        self.expert_ids = self.layout.experts(num_experts)
        self.pairs_per_row = min(max_experts_per_token or num_experts, len(self.expert_ids))
        self.sublayers = nn.ModuleList(StackedFeedForward(spec, len(self.expert_ids)) for _ in range(spec.sublayers))
        for parameter in self.parameters():
            parameter.expert_ids = self.expert_ids  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all local experts anew; the same draws under any layout."""
        initialise(self._stacks, self.expert_ids)

    @cached_property
    def levels(self) -> tuple[DispatchLevel, ...]:
        """The levels that a token passes to its experts; none where all are held here."""
        return self.layout.dispatch_levels(self.num_experts)

    @property
    def fixed_size(self) -> bool:
        """Whether dispatch has sizes that no token changes: in training, where the layout says so.

        Then experts of an assignment may be negative: pairs that are not to be carried out.
        """
        return self.training and bool(self.levels) and self.layout.options.fixed_rows > 0

    @property
    def overlaps(self) -> bool:
        """Whether other work should be done between :meth:`start` and :meth:`finish`."""
        return bool(self.levels) and self.layout.options.overlap

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Mixes the experts' outputs. Where experts are divided over ranks, all of these must call it together.

        Args:
            x: [T, d], this rank's tokens (T may be 0).
            assignment: pairs over all E experts; tokens without a pair get 0.

        Returns:
            y [T, d] in x's type; sums in fp32 (fp64 for fp64). With T = 0 or no pairs every parameter still gets a
            (zero) gradient.
        """
        return self.finish(self.start(x, assignment))

    def start(self, x: Tensor, a: Assignment) -> PendingExperts:
        """Sends x [T, d] to its experts; nothing is computed and nothing waited for but the sizes."""
        autocast = torch.is_autocast_enabled(x.device.type)
        inputs = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        if not self.levels:
            return PendingExperts(LocalDispatch(Received(inputs, a.token, a.expert, a.weight)), x.dtype, x.dtype)
        dispatch: Dispatch
        if self.fixed_size:
            rows, (level,) = self.layout.options.fixed_rows, self.levels
            dispatch = start_fixed_dispatch(inputs, a.token, a.expert, a.weight, level, rows, self.pairs_per_row)
        else:
            dispatch = start_dispatch(inputs, a.token, a.expert, a.weight, self.levels)
        return PendingExperts(dispatch, x.dtype, None)

    def finish(self, pending: PendingExperts) -> Tensor:
        """Runs the experts held here on what arrived, and brings the outputs back: y [T, d]."""
        mixed = self._mix(pending.dispatch.wait(), pending.mix_dtype)
        return pending.dispatch.combine(mixed).to(pending.dtype)

    def _mix(self, received: Received, dtype: torch.dtype | None) -> Tensor:
        """[R, d]: for each row Σ over its pairs of weight · f_expert(row), in at least fp32 or ``dtype``."""
        rows, row, expert, weight = received.rows, received.row, received.expert, received.weight
        held, counts = len(self.expert_ids), received.counts
        backend = choose_backend(rows, self.spec.activation, row.shape[0] / held, received.padded)
        if backend.name == "grouped":
            counts = None
        else:
            if received.padded:
                real = (expert < held).nonzero().squeeze(1)
                row, expert, weight = row[real], expert[real], weight[real]
            if counts is None:
                counts = self.layout.counters.read(count_ids(expert, held))
        plan = plan_rows(row, expert, rows.shape[0], held, backend.align, counts, backend.max_padding)
        out = run_experts(permute_rows(rows, plan.index), plan, self._stacks, self.training, backend)
        return unpermute_rows(out, weight, plan.index, dtype)

    @property
    def _stacks(self) -> list[StackedFeedForward]:
        return [stack for stack in self.sublayers if isinstance(stack, StackedFeedForward)]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_experts={self.num_experts}, held={self.expert_ids}, {self.spec}"
