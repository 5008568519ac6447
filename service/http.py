"""HTTP connections: uvicorn's, with an express lane for plain scores and an end to clients that never finish.

Why not an ASGI application: see docs/adr/0008-express-lane.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial
from time import perf_counter
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.api.express import PATH, Asked, ExpressLane
from service.errors import Overloaded
from service.lifecycle import CLOSE
from service.scorer import Outcome, Waiting
from service.scoring import Score, Timing
from service.tracing import Marks

MOST_HEAD_BYTES: Final = 64 * 1024
# Longer than the 60 s of common load balancers, which else send a request into a connection that is being closed.
KEEP_ALIVE_S: Final = 75
_LINGER_S: Final = 1.0
# What is read on and thrown away of a request that was refused, so that its client gets to read why.
_MOST_REFUSED_BYTES: Final = 24 * 1024 * 1024


class Protocol(HttpToolsProtocol):
    """One connection.

    While it is between two requests, what it receives is shown to the express lane first. There is one request at a
    time: what arrives before the answer to the last one was sent waits.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._lane: ExpressLane = self.app_state["lane"]
        self._asked: Waiting | None = None
        self._data = b""  # what the request in the lane has come as
        self._early = b""
        self._head_bytes = 0  # of a head that has not ended
        self._refused_bytes = 0
        self._is_last = False
        self.waiting_since: float | None = None  # by perf_counter: when the client began to owe us bytes
        self._unread = 0  # bytes that the client had not taken when that was last looked at, and since when
        self._unread_since = perf_counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = perf_counter()
        self._lane.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lane.connections.discard(self)
        if self._asked is not None:
            self._asked.is_gone = True
        super().connection_lost(exc)

    def is_overdue(self, now: float, request_timeout_s: float) -> bool:
        """Whether the client sends, or takes nothing of an answer, for longer than it may."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._unread_since = now
        self._unread = unread
        allowed_s = KEEP_ALIVE_S if self._is_at_boundary and not self._data else request_timeout_s
        is_late = self.waiting_since is not None and now - self.waiting_since > allowed_s
        return is_late or now - self._unread_since > request_timeout_s

    @property
    def _is_at_boundary(self) -> bool:
        cycle = self._current
        return not self._head_bytes and (cycle is None or (cycle.response_complete and not cycle.more_body))

    @property
    def _is_refused(self) -> bool:
        """Whether the last request was answered before all of it had come."""
        cycle = self._current
        return cycle is not None and cycle.response_complete and cycle.more_body

    @property
    def _is_owed(self) -> bool:
        """Whether the last request has come whole and waits for its answer."""
        cycle = self._current
        return not self._head_bytes and cycle is not None and not (cycle.response_complete or cycle.more_body)

    @property
    def _current(self) -> RequestResponseCycle | None:
        """The last request that took the usual way, None before the first."""
        return self.cycle

    def data_received(self, data: bytes) -> None:
        if self._asked is not None:
            self._early += data
            self.flow.pause_reading()
        elif self._is_at_boundary:
            self._consider(data)
        else:
            self._take(data)

    def _consider(self, data: bytes) -> None:
        """Show the lane what has come of a request."""
        if not self._data:
            self.waiting_since = perf_counter()
            self._unset_keepalive_if_required()
        self._data += data
        asked = not self.flow.write_paused and self._lane.read(self._data)
        if asked is False:
            self._take_usual_way()
        elif asked is not True:
            self._ask(asked)

    def _ask(self, asked: Asked) -> None:
        try:
            deliver = self._answer if asked.marks is None else partial(self._answer, marks=asked.marks)
            self._asked = self._lane.scorer.submit(asked.request, deliver, asked.timeout_ms)
            self.waiting_since = None
        except Overloaded as error:
            self._data = b""
            self._write(429, self._lane.refusal(error, asked.marks))
            if self._lane.tracing is not None:
                self._lane.tracing.add_refusal(PATH, 429, asked.marks)

    def _take_usual_way(self) -> None:
        data, self._data = self._data, b""
        self._take(data)

    def _take(self, data: bytes) -> None:
        """Let uvicorn have the bytes."""
        self.waiting_since = self.waiting_since or perf_counter()
        self._head_bytes += len(data) if self._head_bytes else 0
        super().data_received(data)
        self._refused_bytes += len(data) if self._is_refused else 0
        if self._refused_bytes > _MOST_REFUSED_BYTES:
            self.flow.pause_reading()
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse_head()
        elif self._is_owed:
            self.waiting_since = None

    def _refuse_head(self) -> None:
        if self._current is None or self._current.response_complete:
            self._write(431, b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
        else:  # the answers to what came before it go first
            self.flow.pause_reading()
            super().shutdown()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._refused_bytes = 0
        self._head_bytes = 1  # and not what came before it in the same read

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False

    def on_response_complete(self) -> None:
        self.waiting_since = None if self._is_owed else perf_counter()
        super().on_response_complete()
        if self._is_refused and not self.transport.is_closing():
            # Closed at once, the answer could be lost with what the client is still sending.
            self.loop.call_later(_LINGER_S, self._close_refused, self._current)

    def _close_refused(self, refused: RequestResponseCycle | None) -> None:
        if refused is not None and refused.more_body:
            self.transport.close()

    def _answer(self, outcome: Outcome, timing: Timing, marks: Marks | None = None) -> None:
        asked, self._asked = self._asked, None
        assert asked is not None
        if isinstance(outcome, Score):
            self._data = b""
            seconds = perf_counter() - asked.arrived
            self._write(200, self._lane.answer(outcome, timing, seconds, marks))
            self.server_state.total_requests += 1
            if self._lane.tracing is not None:
                self._lane.tracing.add_score(PATH, seconds, outcome, timing, marks)
        else:  # the route knows what to say
            self._take_usual_way()
        if self._early and not self.transport.is_closing():
            data, self._early = self._early, b""
            self.flow.resume_reading()
            self.data_received(data)

    def _write(self, status: int, rest: bytes) -> None:
        self.waiting_since = perf_counter()
        headers = self.server_state.default_headers  # another list each second, and when a signal comes
        self.transport.write(b"".join([STATUS_LINE[status], self._lane.usual_headers(headers), rest]))
        if self._is_last or CLOSE in headers:
            self.transport.close()

    def shutdown(self) -> None:
        """Close once the answer that is owed has been sent."""
        self._is_last = True
        if self._asked is None and not self._data:
            super().shutdown()


async def close_stalled(connections: Collection[Protocol], request_timeout_s: float) -> None:
    """Once a second, for ever, close connections whose clients take too long to send a request, or to read on."""
    while True:
        await asyncio.sleep(1)
        now = perf_counter()
        for connection in list(connections):
            if connection.is_overdue(now, request_timeout_s):
                connection.transport.abort()  # closing would wait until all has been sent
