"""Network interfaces of this host."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable
from itertools import chain

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_ELSEWHERE = "192.0.2.1"  # an address of nobody's (RFC 5737): the way there is the way out of this host


def interface_between_hosts(host: str, others: Iterable[str] = ()) -> str | None:
    """The interface that reaches the job's first host, and from that host, the others; None where that is not known.

    On Debian a host's own name often stands for 127.0.1.1: there its loopback would be found, which reaches nobody
    else. So the interface towards another host is taken, else that of the default route, else the only one there is.

    Args:
        others: addresses of other hosts, looked at only where they are needed.
    """
    ways = map(interface_towards, chain([host], others, [_ELSEWHERE]))
    return next((name for name in ways if name not in (None, "lo")), None) or _only_one()


def _only_one() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = [name for _, name in socket.if_nameindex() if name != "lo" and _address(probe, name)]
    return found[0] if len(found) == 1 else None


def interface_towards(host: str) -> str | None:
    """The interface whose address this host uses to reach ``host``, such as ``eth0``; None where that is not known.

    Nothing is sent: connecting a datagram socket only looks the route up (IPv4).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if _address(probe, name) == own), None)


def _address(probe: socket.socket, interface: str) -> str | None:
    try:
        found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(found[20:24])
