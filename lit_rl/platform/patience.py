"""HTTP for connections that may be slow on purpose: the head of a request must arrive within a time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 75.0
"""Time from the first byte of a request, or from the opening of a connection, until the end of its headers."""

CONNECTION = "connection"
"""Key of a scope's state, under which the requests of one connection, and the WebSocket that it becomes, find the same dictionary."""


class PatientProtocol(H11Protocol):
    """Closes connections that send nothing or half a head, which uvicorn keeps for ever. `Guard` limits the time of bodies."""

    head_seconds = HEAD_SECONDS
    _late: asyncio.TimerHandle | None = None
    _upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request, with a note that all requests of the connection share."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, CONNECTION: {}}
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take in bytes; more of the same head get no more time."""
        super().data_received(data)
        if self._upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_waiting()
        else:
            self._wait()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Leave the connection to the WebSocket, which has pings."""
        self._upgraded = True
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
