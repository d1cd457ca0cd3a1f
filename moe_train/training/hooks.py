"""What the loop tells a model besides its batches. A model that has no such method is not told."""

from __future__ import annotations

from typing import Any

from torch import nn


def tell(module: nn.Module, method: str, *arguments: Any) -> None:
    """Calls ``set_num_updates``, ``set_ranks``, ``set_recompute`` or ``after_update`` where the model has it."""
    found: Any = getattr(module, method, None)
    if found is not None:
        found(*arguments)
