"""What the processor says of itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path


def processor_maker() -> str:
    """Who made the processor; empty where the system does not tell."""
    return _first_processor().get("vendor_id", "")


def processor_flags() -> frozenset[str]:
    """The units and instructions that it has, in Linux's names; empty where the system does not tell."""
    return frozenset(_first_processor().get("flags", "").split())


@functools.cache
def _first_processor() -> Mapping[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
