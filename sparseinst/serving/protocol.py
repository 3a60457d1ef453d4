"""Speak HTTP with clients, and close connections without a request."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class HeadTimeoutProtocol(H11Protocol):
    """Close a connection that sends no complete request head within the keep-alive seconds.

    Replaces uvicorn's timer, which runs after an answer only, until the next byte: silent and half-sent connections
    would occupy ``limit_concurrency`` forever.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head(self.cycle)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        # A request that has arrived meanwhile starts a new cycle in here.
        last = self.cycle
        super().on_response_complete()
        self._expect_head(last)

    def _expect_head(self, last: RequestResponseCycle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._close_without_head, last)

    def _close_without_head(self, last: RequestResponseCycle | None) -> None:
        # A complete head starts a new cycle.
        if self.cycle is last:
            self.timeout_keep_alive_handler()
