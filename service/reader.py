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
from service.servers import without_arguments

Values = list[Any]
_VALUES = frozenset({bytes, type(None)})


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
        self._suspects: list[_Connection] = []

    def mget(self, keys: Sequence[str]) -> asyncio.Future[Values]:
        """The value of each key, None where there is none."""
        if self._connection is None or self._connection.is_lost:
            self._connection = _Connection(self._endpoint, self._connect_timeout_s)
        return self._connection.ask(_packed("MGET", *keys), len(keys))

    def give_up(self, read: asyncio.Future[Values]) -> bool:
        """Cancel a read that takes too long; True if that speaks against the connection that was in use.

        A peer that is gone may never say so, so other questions go over a new connection from now on. What the old
        one owes to others may still come; it is closed when nobody waits for it any more.
        """
        read.cancel()
        suspect = self._connection if self._connection is not None and self._connection.owes(read) else None
        if suspect is not None:
            self._suspects.append(suspect)
            self._connection = None
        for connection in self._suspects:
            if not connection.is_awaited:
                connection.close()
        self._suspects = [connection for connection in self._suspects if not connection.is_lost]
        return suspect is not None

    def close(self) -> None:
        """Close every connection, and cancel what they owe."""
        for connection in (*self._suspects, *filter(None, [self._connection])):
            connection.close()


class _Connection(asyncio.Protocol):
    """From the first question on; what is asked before it stands is sent when it does."""

    def __init__(self, endpoint: Callable[[], Awaitable[Endpoint]], timeout_s: float) -> None:
        self.is_lost = False
        self._answers: deque[tuple[asyncio.Future[Values], int]] = deque()  # and how many values each has
        self._parser = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._greeting: list[bytes] = []
        self._greetings = 0  # answers to it that are still to come
        self._early: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._opening = self._loop.create_task(self._open(endpoint, timeout_s))

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for an answer."""
        return any(not answer.done() for answer, _ in self._answers)

    def owes(self, read: asyncio.Future[Values]) -> bool:
        """Whether the answer to `read` has not come."""
        return any(answer is read for answer, _ in self._answers)

    def ask(self, command: bytes, count: int) -> asyncio.Future[Values]:
        answer: asyncio.Future[Values] = self._loop.create_future()
        self._answers.append((answer, count))
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

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.is_lost:
            transport.close()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._greetings = len(self._greeting)
        self._transport.write(b"".join([*self._greeting, *self._early]))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not False:
                self._take(reply)
        except hiredis.ProtocolError as error:
            self._refuse(error)

    def _take(self, reply: Any) -> None:
        refusal = without_arguments(str(reply)) if isinstance(reply, hiredis.HiredisError) else None
        if self._greetings:
            self._greetings -= 1
            if refusal is not None:
                self.fail(StoreError(f"the feature cache does not let us in ({refusal}); check its URL"))
        elif not self._answers:
            self._refuse(None)
        else:
            answer, count = self._answers.popleft()
            if refusal is None and not (
                isinstance(reply, list) and len(reply) == count and _VALUES.issuperset(map(type, reply))
            ):
                self._answers.appendleft((answer, count))
                self._refuse(None)
            elif answer.done():
                return
            elif refusal is not None:
                answer.set_exception(StoreError(f"the feature cache refuses to read ({refusal}); try again later"))
            else:
                answer.set_result(reply)

    def _refuse(self, cause: Exception | None) -> None:
        """Whatever answers there, its order cannot be relied on any more."""
        failure = StoreError("the feature cache answers something else than was asked; check its URL")
        failure.__cause__ = cause
        self.fail(failure)

    def connection_lost(self, error: Exception | None) -> None:
        failure = StoreError("the feature cache closed the connection; try again later")
        failure.__cause__ = error
        self.fail(failure)

    def fail(self, failure: StoreError) -> None:
        """Close; the first who waits is told why, the others are cancelled, so that this counts as one failure."""
        for answer, _ in self._answers:
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
            self._answers.popleft()[0].cancel()
