"""Two network hosts for a test, or the skip that says why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scripts.netlab.hosts import Hosts
from tests.required import skip_or_fail


@contextmanager
def two_hosts(subnet: str) -> Iterator[Hosts]:
    """Two hosts on a bridge; a failure in place of the skip where REQUIRE_NETWORK is set."""
    if reason := Hosts.why_not():
        skip_or_fail("network", f"no network hosts: {reason}")
    with Hosts(2, subnet=subnet) as made:
        yield made
