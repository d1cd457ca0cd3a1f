"""Parts of a machine that some tests need: where they are missing the test is skipped, unless they must be there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def is_required(part: str) -> bool:
    """Whether a skip would be a failure: REQUIRE_SLURM, REQUIRE_NETWORK … are set in the continuous integration."""
    return bool(os.environ.get(f"REQUIRE_{part.upper()}"))


def skip_or_fail(part: str, reason: str) -> NoReturn:
    """A skip with the reason; a failure where the part is required."""
    if is_required(part):
        pytest.fail(f"{reason}; REQUIRE_{part.upper()} is set")
    pytest.skip(reason)
