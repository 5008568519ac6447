"""Clients of the running service that behave as clients should, and note what becomes of each of their requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

EVENT = {"event": "Product Viewed", "properties": {"price": 1}}


class Answer(NamedTuple):
    """What came back, and whether the server closes the connection after it."""

    status: int
    is_last: bool
    body: bytes


def post(path: str, document: dict[str, Any]) -> bytes:
    """A request with a body of JSON, as bytes."""
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    """A request without a body, as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def read(reader: asyncio.StreamReader) -> Answer:
    """The next answer. Raises IncompleteReadError or ConnectionError if there is none, or not all of it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return Answer(int(head[9:12]), b"connection: close" in head, await reader.readexactly(length))


async def ask(port: int, request: bytes) -> Answer:
    """The answer to one request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await read(reader)
    finally:
        writer.close()


@dataclass
class Callers:
    """Clients that keep their connections, take another when they are told to, and stop when there is none to be had.

    Every second one sends events, the others ask for scores; a visitor has the number of its client.
    """

    port: int
    number: int = 6
    pause_s: float = 0.002
    statuses: Counter[int] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    lost: list[tuple[float, str]] = field(default_factory=list)
    refused_at: list[float] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    connections: int = 0

    async def call(self) -> None:
        """Send requests until connections are refused."""
        await asyncio.gather(*(self._call(str(number), number % 2 == 0) for number in range(self.number)))

    async def _call(self, visitor: str, sends_events: bool) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionRefusedError:
                self.refused_at.append(time.monotonic())
                return
            self.connections += 1
            try:
                await self._keep_calling(reader, writer, visitor, sends_events)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self.lost.append((time.monotonic(), repr(error)))
            finally:
                writer.close()

    async def _keep_calling(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, visitor: str, sends_events: bool
    ) -> None:
        is_last = False
        while not is_last:
            if sends_events:
                message = f"{visitor}-{self.acknowledged[visitor]}"
                writer.write(post("/v1/events", {**EVENT, "userId": visitor, "messageId": message}))
            else:
                writer.write(post("/v1/score", {"visitor_id": visitor}))
            status, is_last, _ = await read(reader)
            self.statuses[status] += 1
            self.answered_at.append(time.monotonic())
            self.acknowledged[visitor] += sends_events and status == 200
            await asyncio.sleep(self.pause_s)
