"""uvicorn's HTTP connection, except that a client has only so long to ask for something.

Without it whoever opens connections and sends a byte now and then holds them for good, until none is left.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

_BUSY = object()


def patient_connection(timeout_s: float) -> type[H11Protocol]:
    """The protocol of a connection that is closed if no whole head of a request arrives for `timeout_s`
    (after an answer, up to twice as long)."""

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(timeout_s, self._look, None)

        def _look(self, seen: object) -> None:
            """seen: the request that was answered at the last look, if no other had begun."""
            if self.transport.is_closing():
                return
            idle = self.cycle is None or self.cycle.response_complete
            if idle and seen is self.cycle:
                self.transport.close()
            else:
                self.loop.call_later(timeout_s, self._look, self.cycle if idle else _BUSY)

    return Connection
