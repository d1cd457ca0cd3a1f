"""Vendor and instruction flags of the processor, from /proc/cpuinfo."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path


def processor_vendor() -> str:
    """Vendor of the processor; empty if unknown."""
    return _first_processor().get("vendor_id", "")


def processor_flags() -> frozenset[str]:
    """Linux's names of the processor's instruction sets; empty if unknown."""
    return frozenset(_first_processor().get("flags", "").split())


@functools.cache
def _first_processor() -> Mapping[str, str]:
    """The entry of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
