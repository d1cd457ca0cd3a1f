"""moe_train: sparse-expert (mixture-of-experts) models for multilingual translation.

``from moe_train import MoELayer`` needs torch only; ``moe_train.load`` opens a trained model (docs/python.md); import
everything else from its package, such as ``moe_train.routing``. Importing ``moe_train`` imports nothing else, not even
torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.errors import UserError
    from moe_train.evaluation.inference.translation_model import TranslationModel, load
    from moe_train.layers import MoELayer

__version__ = "0.1.0"

# After each operator libgomp's idle threads spin for 3 to 5 ms, and occupy the cores that the experts' threads need (a
# fifth of a sparse layer's time on two cores). Read when torch is loaded; a user's setting is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_INFERENCE = "moe_train.evaluation.inference.translation_model"
_MODULES = {
    "MoELayer": "moe_train.layers",
    "TranslationModel": _INFERENCE,
    "UserError": "moe_train.errors",
    "load": _INFERENCE,
}

__all__ = ["MoELayer", "TranslationModel", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
