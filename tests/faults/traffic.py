"""Visitors that ask for scores at moments of their own, and note what each of them got and when.

Latency counts from the moment a request was due. What the machine did to the clock is measured beside it: a request
that was under way while this process or the service was kept from the processor says so, since nobody can answer then.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self, cast

import httptools

from tests.conftest import ServiceProcess

# What counts as a stall, and how often it is looked for.
STALL_S: Final = 0.005
_BEAT_S: Final = 0.002
# How long the last answers are waited for.
_PATIENCE_S: Final = 3.0

NOTHING: Final = 0  # the status of a request whose connection ended without an answer


@dataclass(frozen=True)
class Answer:
    """What became of request `number`: due `at_s` after the start, answered `latency_ms` later."""

    number: int
    at_s: float
    latency_ms: float
    status: int
    raw: bytes
    is_stalled: bool

    @cached_property
    def content(self) -> dict[str, Any]:
        """The JSON of the body."""
        value: dict[str, Any] = json.loads(self.raw)
        return value

    @property
    def degraded(self) -> list[str]:
        """What the answer says was missing."""
        missing: list[str] = self.content["degraded"]
        return missing


@dataclass(slots=True)
class _Asked:
    number: int
    due: float
    status: int = NOTHING
    raw: bytes = b""
    answered: float = float("inf")


def request(path: str, body: object, more: str = "") -> bytes:
    """The bytes of a POST of JSON over a connection that is kept."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n{more}Content-Length: "
    return f"{head}{len(content)}\r\n\r\n".encode() + content


class Traffic:
    """`rate` requests a second for as long as the context lasts, `write(number)` being the bytes of each."""

    def __init__(self, service: ServiceProcess, rate: float, write: Callable[[int], bytes]) -> None:
        self.service, self.rate = service, rate
        self._write = write
        self._asked: list[_Asked] = []
        self._stalls: list[tuple[float, float]] = []
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.started = 0.0

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.started

    async def __aenter__(self) -> Self:
        for _ in range(8):
            self.release(await self._connect())
        self.started = perf_counter()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tasks[0].cancel()
        until = perf_counter() + _PATIENCE_S
        while perf_counter() < until and any(connection.asked for connection in self._open):
            await asyncio.sleep(0.01)
        self._tasks[1].cancel()
        await asyncio.wait(self._tasks)
        for connection in list(self._open):
            connection.transport.abort()
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    def answers(self, start_s: float = 0.0, end_s: float = float("inf")) -> list[Answer]:
        """What became of each request that was due in that time, in their order."""
        return [
            Answer(
                asked.number,
                asked.due - self.started,
                (asked.answered - asked.due) * 1000,
                asked.status,
                asked.raw,
                any(start < asked.answered and asked.due < end for start, end in self._stalls),
            )
            for asked in self._asked
            if start_s <= asked.due - self.started < end_s
        ]

    async def _send(self) -> None:
        number = 0
        while True:
            due = self.started + number / self.rate
            await asyncio.sleep(max(due - perf_counter(), 0.0))
            asked = _Asked(number, due)
            self._asked.append(asked)
            try:
                connection = self._idle.popleft() if self._idle else await self._connect()
                connection.send(asked, self._write(number))
            except OSError:
                asked.answered = perf_counter()
            number += 1

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.service.port)
        self._open.add(connection)
        return connection

    def release(self, connection: _Connection) -> None:
        """Take a connection that is free again."""
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """Forget a connection that ended."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def _watch(self) -> None:
        """Note when this process came late, or the service stood in line for a processor."""
        beat, waited = perf_counter(), waited_s(self.service.process.pid)
        while True:
            await asyncio.sleep(_BEAT_S)
            now, waits = perf_counter(), waited_s(self.service.process.pid)
            if now - beat > _BEAT_S + STALL_S or waits - waited > STALL_S:
                self._stalls.append((beat, now))
            beat, waited = now, waits


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to these bytes."""
    writer.write(data)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length)


def waited_s(pid: int) -> float:
    """Seconds that the first thread of a process was ready to run and did not get a processor; 0 where nobody says."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def rss_bytes(pid: int) -> int:
    """Memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Connection(asyncio.Protocol):
    """One connection to the service, with one request at a time."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self.asked: _Asked | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, asked: _Asked, data: bytes) -> None:
        self.asked = asked
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self.asked is not None:
            self.asked.raw += body

    def on_message_complete(self) -> None:
        asked, self.asked = self.asked, None
        assert asked is not None, "an answer to no question"
        asked.status, asked.answered = self._parser.get_status_code(), perf_counter()
        if not self.transport.is_closing():
            self._traffic.release(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.asked is not None:
            self.asked.answered, self.asked = perf_counter(), None
        self._traffic.lost(self)
