"""Records the best validation, and stops a run when there was no better one for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.config import ValidationConfig
from moe_train.training.checkpoint.run_state import RunState


def update_best(state: RunState, result: Mapping[str, Any], config: ValidationConfig) -> bool:
    """Records a validation in ``state``; whether it is the best so far. A value that is not finite never is."""
    value = float(result[config.metric])
    higher = config.metric != "loss"
    better = value == value and (state.best is None or (value > state.best if higher else value < state.best))
    if better and abs(value) != float("inf"):
        state.best, state.best_update, state.without_gain = value, state.update, 0
        return True
    state.without_gain += 1
    return False


def patience_spent(state: RunState, config: ValidationConfig) -> bool:
    """Whether ``patience`` validations in a row were no better (0: never)."""
    return bool(config.patience) and state.without_gain >= config.patience
