"""Speak HTTP with clients, and close connections without a request and those that do not read their answers."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class HeadTimeoutProtocol(H11Protocol):
    """Close a connection that sends no complete request head, or reads nothing of its answer, for a time.

    The time is that of keep-alive. Replaces uvicorn's timer, which runs after an answer only, until the next byte:
    silent and half-sent connections would occupy ``limit_concurrency`` forever. So would answers that nobody reads:
    closing waits until the client has everything.
    """

    _timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head(self.cycle)
        self._expect_reading(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._reading_timer.cancel()
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

    def _expect_reading(self, last: tuple[RequestResponseCycle | None, int] | None) -> None:
        """Abort the connection where as many bytes of an answer wait as the last time, and call this again later."""
        state = self.cycle, self.transport.get_write_buffer_size()
        if state[1] and state == last:
            self.transport.abort()
        else:
            self._reading_timer = self.loop.call_later(self.timeout_keep_alive, self._expect_reading, state)
