"""The expert pool: computes the expert outputs for an Assignment, y_t = Σ over pairs (t, e, w) of w · f_e(x_t).

:meth:`ExpertPool.start` sends tokens to the ranks that hold their experts (:mod:`moe_train.parallel.dispatch`).
:meth:`ExpertPool.finish` sorts the received rows by expert (permute), runs the local experts
(:mod:`moe_train.experts.mlp`), sums each row's weighted outputs (unpermute), and sends the
sums back to the tokens' ranks (combine).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moe_train.experts.mlp import choose_backend, weighted_sums
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.experts.row_plan import plan_rows
from moe_train.experts.spec import ExpertSpec
from moe_train.kernels.device_kernels import TORCH, DeviceKernels
from moe_train.parallel.dispatch import Dispatch, LocalDispatch, Received, start_dispatch
from moe_train.parallel.fixed_dispatch import start_fixed_dispatch
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.permute import count_ids
from moe_train.parallel.split_sizes import DispatchLevel
from moe_train.routing.types import Assignment


@dataclass(frozen=True)
class PendingExperts:
    """A call of the pool whose tokens were sent and whose experts have not run yet.

    Attributes:
        dtype: type of the tokens and of the layer's output.
        sum_dtype: type of each row's weighted sum; None: at least fp32, since sums of several ranks are still added.
    """

    dispatch: Dispatch
    dtype: torch.dtype
    sum_dtype: torch.dtype | None


class ExpertPool(nn.Module):
    """E experts over all ranks; this rank's local experts are stacked.

    Each parameter has the attributes ``expert = True`` (set in :mod:`moe_train.experts.parameters`) and ``expert_ids``,
    the global ids of its rows. ``kernels`` are the Triton kernels in use.

    Args:
        spec: shape of one expert.
        num_experts: E, over all ranks.
        layout: which rank holds which experts; None: all are local.
        max_experts_per_token: upper bound, needed by fixed-size dispatch only; None: E.

    Raises:
        ConfigError: E cannot be divided evenly over the layout's ranks.
    """

    kernels: DeviceKernels = TORCH

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
        self._plan_rows = plan_rows
        self.reset_parameters()

    def compile_plan(self, backend: str) -> None:
        """Compiles the row plan of grouped products with ``torch.compile``."""
        self._plan_rows = torch.compile(plan_rows, dynamic=True, backend=backend)

    def reset_parameters(self) -> None:
        """Initialises all local experts; expert e gets the same weights under any layout."""
        initialise(self._stacks, self.expert_ids)

    @cached_property
    def levels(self) -> tuple[DispatchLevel, ...]:
        """The dispatch levels, one for each all-to-all stage; empty if all experts are local."""
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

    def start(self, x: Tensor, assignment: Assignment) -> PendingExperts:
        """Starts sending x [T, d] to its experts; waits for the split sizes only, and runs no expert yet."""
        autocast = torch.is_autocast_enabled(x.device.type)
        inputs = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        token, expert, weight, load = assignment.token, assignment.expert, assignment.weight, assignment.load
        if not self.levels:
            received = Received(inputs, token, expert, weight, load=load, per_token=assignment.per_token)
            return PendingExperts(LocalDispatch(received), x.dtype, x.dtype)
        dispatch: Dispatch
        if self.fixed_size:
            (level,) = self.levels
            rows_per_member = self.layout.options.fixed_rows
            dispatch = start_fixed_dispatch(inputs, token, expert, weight, level, rows_per_member, self.pairs_per_row)
        else:
            dispatch = start_dispatch(inputs, token, expert, weight, self.levels, load)
        # Sums of ranks are still added together: they stay in at least fp32 until then.
        return PendingExperts(dispatch, x.dtype, sum_dtype=None)

    def finish(self, pending: PendingExperts) -> Tensor:
        """Runs the local experts on the received rows and returns the outputs to their tokens: y [T, d]."""
        weighted_sums = self._weighted_sums(pending.dispatch.wait(), pending.sum_dtype)
        return pending.dispatch.combine(weighted_sums).to(pending.dtype)

    def _weighted_sums(self, received: Received, dtype: torch.dtype | None) -> Tensor:
        """[R, d]: Σ over each row's pairs of weight · f_expert(row), in ``dtype`` (None: at least fp32)."""
        rows, row_of_pair, expert, weight = received.rows, received.row, received.expert, received.weight
        num_local, counts, load = len(self.expert_ids), received.counts, received.load
        backend = choose_backend(rows, self.spec.activation, row_of_pair.shape[0] / num_local, received.padded)
        if backend.name == "grouped":
            counts = None  # a grouped product takes the counts from the device
        else:
            if received.padded:  # expert == num_local marks padding
                real = (expert < num_local).nonzero().squeeze(1)
                row_of_pair, expert, weight = row_of_pair[real], expert[real], weight[real]
            if counts is None:
                load = count_ids(expert, num_local) if load is None else load
                counts = self.layout.counters.read(load)
        # Counts on the host are other constants in every batch: no plan of them is compiled.
        plan = (self._plan_rows if counts is None else plan_rows)(
            row_of_pair,
            expert,
            rows.shape[0],
            num_local,
            backend.align,
            counts,
            backend.max_padding,
            load=load,
            per_token=received.per_token,
            kernels=self.kernels,
        )
        return weighted_sums(rows, weight, plan, self._stacks, self.training, backend, dtype)

    @property
    def _stacks(self) -> list[StackedFeedForward]:
        return [stack for stack in self.sublayers if isinstance(stack, StackedFeedForward)]

    def extra_repr(self) -> str:
        """Text for ``print(model)``."""
        return f"num_experts={self.num_experts}, held={self.expert_ids}, {self.spec}"
