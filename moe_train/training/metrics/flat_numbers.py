"""The numbers of a log line under flat names, as TensorBoard, W&B and MLflow take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flat_numbers(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """``prefix/name`` of every number, lists by their position."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}/{name}")
        elif isinstance(value, (list, tuple)):
            yield from flat_numbers({str(i): item for i, item in enumerate(value)}, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "update":
            yield f"{prefix}/{name}", float(value)
