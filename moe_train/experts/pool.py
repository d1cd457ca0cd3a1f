"""The expert pool: computes an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t), on one rank or many.

:meth:`ExpertPool.start` sends tokens to the ranks that hold their experts (:mod:`moe_train.parallel.dispatch`).
:meth:`ExpertPool.finish` sorts the received rows by expert (permute), runs the local experts
(:mod:`moe_train.experts.mlp`), sums each row's weighted outputs (unpermute), and returns them (combine).
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
    """A call of the pool whose tokens were sent and not yet computed.

    Attributes:
        dtype: type of the tokens and of the layer's output.
        mix_dtype: type of each row's sum over experts; None: at least fp32.
    """

    dispatch: Dispatch
    dtype: torch.dtype
    mix_dtype: torch.dtype | None


class ExpertPool(nn.Module):
    """E experts over all ranks; this rank's local experts are stacked.

    Each parameter has the attributes ``expert = True`` and ``expert_ids``, the global ids of its rows.

    Args:
        spec: shape of one expert.
        num_experts: E, over all ranks.
        layout: which rank holds which experts; None: all are local.
        max_experts_per_token: upper bound, needed by fixed-size dispatch only; None: E.

    Raises:
        ConfigError: E is not divisible over the layout.
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
        self.layout = layout or ExpertLayout.local()
        self.expert_ids = self.layout.experts(num_experts)
        self.pairs_per_row = min(max_experts_per_token or num_experts, len(self.expert_ids))
        self.sublayers = nn.ModuleList(StackedFeedForward(spec, len(self.expert_ids)) for _ in range(spec.sublayers))
        for parameter in self.parameters():
            parameter.expert_ids = self.expert_ids  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all local experts; expert e gets the same weights under any layout."""
        initialise(self._stacks, self.expert_ids)

    @cached_property
    def levels(self) -> tuple[DispatchLevel, ...]:
        """The dispatch levels; empty if all experts are local."""
        return self.layout.dispatch_levels(self.num_experts)

    @property
    def fixed_size(self) -> bool:
        """Whether dispatch has fixed sizes: in training, with ``layout.fixed_rows``.

        Then an assignment may contain pairs with a negative expert id, which are skipped.
        """
        return self.training and bool(self.levels) and self.layout.options.fixed_rows > 0

    @property
    def overlaps(self) -> bool:
        """Whether the caller should do independent work between :meth:`start` and :meth:`finish`."""
        return bool(self.levels) and self.layout.options.overlap

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Weighted sum of the experts' outputs. A collective where experts are divided over ranks.

        Args:
            x: [T, d], this rank's tokens (T may be 0).
            assignment: pairs over all E experts; tokens without a pair get 0.

        Returns:
            y [T, d] in x's type, accumulated in fp32 (fp64 for fp64). With T = 0 or no pairs every parameter still gets
            a (zero) gradient.
        """
        return self.finish(self.start(x, assignment))

    def start(self, x: Tensor, a: Assignment) -> PendingExperts:
        """Starts sending x [T, d] to its experts; waits for the split sizes only, and computes nothing."""
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
        """Runs the local experts on the received rows and returns the outputs to their tokens: y [T, d]."""
        mixed = self._mix(pending.dispatch.wait(), pending.mix_dtype)
        return pending.dispatch.combine(mixed).to(pending.dtype)

    def _mix(self, received: Received, dtype: torch.dtype | None) -> Tensor:
        """[R, d]: Σ over each row's pairs of weight · f_expert(row), in ``dtype`` (None: at least fp32)."""
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
        """Text for ``print(model)``."""
        return f"num_experts={self.num_experts}, held={self.expert_ids}, {self.spec}"
