"""What to do about gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.errors import TrainingError
from moe_train.training.checkpoint.run_state import RunState


def note(state: RunState, applied: bool, blocking_ranks: Sequence[int], limit: int) -> None:
    """Counts a skipped update, and ends the run after ``limit`` of them in a row.

    Args:
        culprits: ranks whose own gradient was not finite, or that of the experts they hold.

    Raises:
        TrainingError: on every rank alike.
    """
    if applied:
        state.skipped_in_row = 0
        return
    state.skipped += 1
    state.skipped_in_row += 1
    if state.skipped_in_row < limit:
        return
    ranks = ", ".join(map(str, blocking_ranks)) or "none alone, only their sum"
    raise TrainingError(
        f"{limit} updates in a row had a gradient that is not finite; the last was update {state.update}, rank {ranks}",
        remedy="lower training.optimizer.lr or lengthen the warm-up, try training.precision=bf16 or fp32, "
        "and look for empty or broken sentences; the last checkpoint is from before",
    )
