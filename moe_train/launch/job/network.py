"""Network interfaces of this host."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable
from itertools import chain

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_DOCUMENTATION_ADDRESS = "192.0.2.1"  # not in use anywhere (RFC 5737): its route is the default route


def interface_between_hosts(host: str, others: Iterable[str] = ()) -> str | None:
    """The interface that reaches the job's first host, or on that host the others; None where it is not known.

    On Debian a host's own name often resolves to 127.0.1.1, whose interface is the loopback, which reaches no other
    host. Then it is the interface towards another host, else that of the default route, else the only one.

    Args:
        others: addresses of other hosts, read only where they are needed.
    """
    for address in chain([host], others, [_DOCUMENTATION_ADDRESS]):
        if (name := interface_towards(address)) and name != "lo":
            return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = [name for _, name in socket.if_nameindex() if name != "lo" and _address(probe, name)]
    return found[0] if len(found) == 1 else None


def interface_towards(host: str) -> str | None:
    """The interface whose address this host uses to reach ``host``, such as ``eth0``; None where it is not known.

    Nothing is sent: connecting a datagram socket only looks up the route (IPv4).
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
