"""Refuse requests that name another host: a name that another site points to this machine (DNS rebinding)."""

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def accepted_hosts(address: str, host: str, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names that requests may have in their header Host; None: all.

    Args:
        address: where the service listens.
        host: --host, the name of this address.
        allowed: further names, of --allowed-host.
    """
    if not allowed and not ipaddress.ip_address(address).is_loopback:
        return None
    return (*LOOPBACK_HOSTS, f"[{host}]" if ":" in host else host, *allowed)


class HostCheck:
    """Answer 403 to requests for a host that is not accepted.

    Args:
        app: the application.
        hosts: accepted names, without a port.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()
            if host not in self._hosts:
                known = ", ".join(sorted(self._hosts))
                text = f"The request is for the host {host!r}; expected {known}, or a name of --allowed-host"
                app = JSONResponse({"error": text}, 403)
        await app(scope, receive, send)
