"""What every request must have before anything reads it: a known Host, and a body that is not too long."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s:@/\[\]]+))(?::\d*)?")
HEADERS = [
    # Scripts, styles and connections of this server alone.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def host_name(header: str) -> str:
    """The name of a Host header without its port, in lower case; "" where it is none."""
    found = _HOST.fullmatch(header.strip().lower())
    return (found["address"] or found["name"].removesuffix(".")) if found else ""


class RequestGuard:
    """Refuses foreign Host headers, and ends bodies beyond a limit; adds headers that restrict the page.

    A page elsewhere whose name is made to resolve to this machine has its own name as Host.

    Args:
        hosts: names that are served, in addition to this machine's own.
        longest: bytes of a body.
        refuse: an app that answers a request with a foreign Host.
    """

    def __init__(self, app: App, hosts: Collection[str], longest: int, refuse: App) -> None:
        self._app, self._refuse, self._longest = app, refuse, longest
        self._hosts = {name.lower().strip("[]").removesuffix(".") for name in (*hosts, *THIS_MACHINE)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        known = len(hosts) == 1 and bool(name := host_name(hosts[0])) and name in self._hosts
        await (self._app if known else self._refuse)(scope, self._limited(receive), with_headers)

    def _limited(self, receive: Receive) -> Receive:
        left = self._longest

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request's body has more than {self._longest:,} bytes")
            return message

        return limited


def is_wildcard(host: str) -> bool:
    """Whether an address means all addresses of the machine, so that it is no name of a Host header."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
