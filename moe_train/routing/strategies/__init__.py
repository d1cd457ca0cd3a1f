"""Routing strategies, one module each; importing a module registers its strategy."""

from __future__ import annotations

import importlib
import pkgutil


def import_all() -> None:
    """Imports every module of this package, so that a new file needs no entry anywhere."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
