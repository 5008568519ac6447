"""What was acknowledged is in the next score: of every process, over any connection, under load."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import RedisServer, StartService

pytestmark = pytest.mark.anyio

WRITERS, VISITORS_EACH, EVENTS_EACH = 10, 10, 100  # 10,000 pairs; 100 events are enough to compact a visitor's traits
DEVICES = ("mobile", "desktop", "tablet")


class Client:
    """A connection that is kept alive; asyncio's streams take a tenth of the time of an HTTP library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, stack: AsyncExitStack) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        stack.callback(writer.close)
        return cls(reader, writer)

    async def post(self, path: str, body: object) -> Any:
        """The body of the answer, which must be 200."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self._writer.write(head.encode() + b"\r\n\r\n" + content)
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        (length,) = (int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        answer = json.loads(await self._reader.readexactly(length))
        assert " 200 " in status, answer
        return answer


def event(visitor_id: str, number: int) -> dict[str, Any]:
    return {
        "type": "track",
        "event": "Product Viewed",
        "userId": visitor_id,
        "messageId": f"{visitor_id}-{number}",
        "timestamp": time.time_ns() // 1_000_000,
        "properties": {"price": number, "category": f"category-{number % 7}"},
        "context": {"device": DEVICES[number % 3]},
    }


async def write_and_read(clients: Sequence[Client], seed: int) -> list[str]:
    """Each event over a connection at random, then the score over another one; what was wrong."""
    rng, wrong = random.Random(seed), []
    for place in range(VISITORS_EACH):
        visitor_id = f"visitor-{seed}-{place}"
        for number in range(1, EVENTS_EACH + 1):
            taken = await rng.choice(clients).post("/v1/events", event(visitor_id, number))
            score = await rng.choice(clients).post("/v1/score", {"visitor_id": visitor_id})
            if (taken["accepted"], score["events"], score["degraded"]) != (1, number, []):
                wrong.append(f"{visitor_id} {number}: {taken}, {score}")
    return wrong


async def keep_busy(clients: Sequence[Client]) -> None:
    """Batches of events, and batches of scores, of other visitors until cancelled."""
    rng, number = random.Random(0), 0
    while True:
        number += 1
        some = [f"other-{rng.randrange(2000)}" for _ in range(100)]
        await rng.choice(clients).post("/v1/events", {"batch": [event(visitor_id, number) for visitor_id in some]})
        await rng.choice(clients).post("/v1/score/batch", {"visitors": [{"visitor_id": name} for name in some]})
        await asyncio.sleep(0.05)


async def test_what_was_acknowledged_is_in_the_next_score(
    start_service: StartService, redis_server: RedisServer, artifacts: Path
) -> None:
    services = [
        start_service(redis_url=redis_server.url, artifacts=artifacts, namespace="write-then-read") for _ in range(2)
    ]
    for service in services:
        service.wait_until_ready()
    async with AsyncExitStack() as stack:
        lines = [[await Client.open(service.port, stack) for service in services] for _ in range(WRITERS + 1)]
        busy = asyncio.create_task(keep_busy(lines.pop()))
        found = await asyncio.gather(*(write_and_read(clients, seed) for seed, clients in enumerate(lines)))
        assert [wrong for part in found for wrong in part] == []
        assert not busy.done(), busy.exception()
        busy.cancel()
