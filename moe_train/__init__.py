"""moe_train: sparse-expert (mixture-of-experts) models for multilingual translation.

``from moe_train import MoELayer`` needs torch alone; the rest is imported from its own room, such as
``moe_train.routing``. Importing the package imports nothing else, torch included.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.errors import UserError
    from moe_train.layers import MoELayer

__version__ = "0.1.0"

# After each operator libgomp's idle threads spin for some 3 to 5 ms in case another follows, and hold the cores
# that experts' own threads want (a fifth of a sparse layer's time on two cores). Read when torch is loaded; a user's
# own setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__all__ = ["MoELayer", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    homes = {"MoELayer": "moe_train.layers", "UserError": "moe_train.errors"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
