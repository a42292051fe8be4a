"""An HTTP request has to come in time: a client that connects and says nothing, or a byte a minute, is let go.

uvicorn itself waits for ever for a first request and for each body; whoever holds no credential must not be able to
use up its connections. A batch's body has a shorter time of its own, with an answer (`cloud.http`); between two
requests, uvicorn's keep-alive counts.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S: Final = 15.0  #: a head has less than 1 KB; TLS was agreed on before
REQUEST_TIMEOUT_S: Final = 45.0  #: from the head to the body's end: above `cloud.http.BODY_TIMEOUT_S`


class TimedRequests(HttpToolsProtocol):
    """httptools' protocol, with a time for each request's head and for its body."""

    head_timeout_s = HEAD_TIMEOUT_S
    request_timeout_s = REQUEST_TIMEOUT_S
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # uvicorn declares its own transport type
        super().connection_made(transport)
        self._expect(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        if self._late is None:  # the first request's time runs from the connection on
            self._expect(self.head_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._expect(self.request_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._came()
        super().on_message_complete()

    def _expect(self, within_s: float) -> None:
        self._came()
        self._late = self.loop.call_later(within_s, self._let_go)

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _let_go(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.abort()
