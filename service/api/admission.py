"""Admission: how many requests are handled at once. One more is told so at once, instead of being late with all others.

Scores of one visitor that take the express lane stand in the scorer's queue instead, which has a bound of its own.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.errors import Overloaded, body_of, respond

# Who watches the service must see it when it is full.
_ALWAYS: Final = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})


class Admission:
    """ASGI middleware that lets `most` requests in at once."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self._most, self._in_flight = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self.app(scope, receive, send)
            return
        if self._in_flight >= self._most:
            metrics.shed("in_flight").add(1)
            error = Overloaded(f"{self._most} requests are being answered already; try again in a second")
            response = respond(Request(scope), body_of(error, scope["path"]), error.headers)
            await response(scope, receive, send)
            return
        self._in_flight += 1
        metrics.IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_flight -= 1
            metrics.IN_FLIGHT.dec()
