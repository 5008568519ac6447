"""Reads of the hot path: one connection, on which every question is sent at once and answers come in order.

`redis.asyncio` costs more than the score itself for a small read. This speaks the one command that scoring needs, by
the C codec that redis-py uses too, and leaves everything else to redis-py.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, cast

import hiredis

from service.errors import StoreError

Values = list[Any]


def _packed(*words: str) -> bytes:
    return cast(bytes, hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub knows only one word


class Endpoint(NamedTuple):
    """Where a server listens, a TCP port or a Unix socket, and what it asks of a client first."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = None
    database: int = 0

    def greeting(self) -> list[bytes]:
        """Commands to send before any other."""
        commands: list[tuple[str, ...]] = []
        if self.password is not None:
            commands.append(("AUTH", *([self.username] if self.username else []), self.password))
        if self.database:
            commands.append(("SELECT", str(self.database)))
        return [_packed(*command) for command in commands]


class Reader:
    """MGET over one connection, opened when it is first needed and again after it was lost.

    `endpoint` finds the server anew for each connection. Every failure is a StoreError in the future of the read.
    """

    def __init__(self, endpoint: Callable[[], Awaitable[Endpoint]], connect_timeout_s: float) -> None:
        self._endpoint, self._connect_timeout_s = endpoint, connect_timeout_s
        self._connection: _Connection | None = None

    def mget(self, keys: Sequence[str]) -> asyncio.Future[Values]:
        """The value of each key, None where there is none."""
        if self._connection is None or self._connection.is_lost:
            self._connection = _Connection(self._endpoint, self._connect_timeout_s)
        return self._connection.ask(_packed("MGET", *keys))

    def drop(self) -> None:
        """Give the connection up, and cancel all that it still owes: a peer that is gone may never say so."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Connection(asyncio.Protocol):
    """From the first question on; what is asked before it stands is sent when it does."""

    def __init__(self, endpoint: Callable[[], Awaitable[Endpoint]], timeout_s: float) -> None:
        self.is_lost = False
        self._answers: deque[asyncio.Future[Values]] = deque()
        self._parser = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._greeting: list[bytes] = []
        self._early: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._opening = self._loop.create_task(self._open(endpoint, timeout_s))

    def ask(self, command: bytes) -> asyncio.Future[Values]:
        answer: asyncio.Future[Values] = self._loop.create_future()
        self._answers.append(answer)
        if self._transport is None:
            self._early.append(command)
        else:
            self._transport.write(command)
        return answer

    async def _open(self, endpoint: Callable[[], Awaitable[Endpoint]], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                where = await endpoint()
                self._greeting = where.greeting()
                if where.path is not None:
                    await self._loop.create_unix_connection(lambda: self, where.path)
                else:
                    hostname = where.host if where.tls else None
                    await self._loop.create_connection(
                        lambda: self, where.host, where.port, ssl=where.tls, server_hostname=hostname
                    )
        except (OSError, TimeoutError, StoreError) as error:
            failure = StoreError(f"the feature cache cannot be reached ({type(error).__name__}); try again later")
            failure.__cause__ = error
            self.fail(failure)

    def _greeted(self) -> asyncio.Future[Values]:
        answer: asyncio.Future[Values] = self._loop.create_future()
        answer.add_done_callback(self._on_greeted)
        return answer

    def _on_greeted(self, answer: asyncio.Future[Values]) -> None:
        if not answer.cancelled() and isinstance(error := answer.exception(), StoreError):
            self.fail(error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.is_lost:
            transport.close()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._answers.extendleft(self._greeted() for _ in self._greeting)
        self._transport.write(b"".join([*self._greeting, *self._early]))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not False:
                self._answer(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            failure = StoreError("the feature cache answers in another protocol; check its URL")
            failure.__cause__ = error
            self.fail(failure)

    def _answer(self, reply: Any) -> None:
        answer = self._answers.popleft()
        if answer.done():
            return
        if isinstance(reply, hiredis.HiredisError):
            failure = StoreError(f"the feature cache refuses to read ({reply}); try again later")
            answer.set_exception(failure)
        else:
            answer.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        failure = StoreError("the feature cache closed the connection; try again later")
        failure.__cause__ = error
        self.fail(failure)

    def fail(self, failure: StoreError) -> None:
        """Close; the first who waits is told why, the others are cancelled, so that this counts as one failure."""
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(failure)
                break
        self.close()

    def close(self) -> None:
        """Close, and cancel every answer that is still to come."""
        self.is_lost = True
        self._opening.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._answers:
            self._answers.popleft().cancel()
