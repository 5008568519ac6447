"""Clients that send hardly anything, or far too much, beside others who only want a score."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import numpy as np
import pytest

from tests.conftest import RedisServer, ServiceProcess
from tests.faults import visitors
from tests.faults.conftest import Note, Serve, Span
from tests.faults.traffic import Traffic, exchange, request, rss_bytes
from tests.faults.verdict import undisturbed

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

RATE: Final = 100
SLOW_CLIENTS: Final = 500
MOST_GROWTH: Final = 20_000_000
MOST_P99: Final = 1.5
# Rounds with and without slow clients in turn; what the machine does besides is then in both.
ROUNDS: Final = 3
HUGE: Final = 1 << 30


def ask(number: int) -> bytes:
    return request("/v1/score", {"visitor_id": visitors.name(number % 1000)})


async def p99_ms(service: ServiceProcess, seconds: float) -> float:
    """The 99th percentile of other visitors, all of whom are answered."""
    async with Traffic(service, RATE, ask) as traffic:
        await asyncio.sleep(seconds)
    answers = traffic.answers()
    assert {answer.status for answer in answers} == {200}
    return float(np.percentile([answer.latency_ms for answer in undisturbed(answers)], 99))


@asynccontextmanager
async def slow_clients(port: int) -> AsyncIterator[None]:
    """Half of them send a head and half a body, a byte a second each, and begin again when they are hung up on."""

    async def trickle(number: int) -> None:
        path = "/v1/score" if number % 4 < 2 else "/v1/events"
        data = request(path, {"visitor_id": "slow", "padding": "x" * 1000})
        start = 0 if number % 2 else data.index(b"\r\n\r\n") + 4
        await asyncio.sleep(number / SLOW_CLIENTS)
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(data[:start])
                    for byte in data[start:]:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(1)
                finally:
                    writer.transport.abort()

    tasks = [asyncio.create_task(trickle(number)) for number in range(SLOW_CLIENTS)]
    await asyncio.sleep(1.5)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.usefixtures("full")
async def test_five_hundred_slow_clients_slow_nobody_else(
    serve: Serve, filled_redis: RedisServer, span: Span, note: Note
) -> None:
    service = serve(filled_redis.url, request_timeout_s=5)
    seconds, without, beside = span(2, 10), [], []
    before = rss_bytes(service.process.pid)
    for _ in range(ROUNDS):
        without.append(await p99_ms(service, seconds))
        async with slow_clients(service.port):
            beside.append(await p99_ms(service, seconds))
    growth = rss_bytes(service.process.pid) - before
    ratio = float(np.median(beside) / np.median(without))
    note(
        f"{SLOW_CLIENTS} slow clients",
        p99_without_ms=round(float(np.median(without)), 2),
        p99_beside_ms=round(float(np.median(beside)), 2),
        ratio=round(ratio, 2),
        memory_growth_MB=round(growth / 1e6, 1),
    )
    assert ratio <= MOST_P99
    assert growth < MOST_GROWTH


async def send(port: int, head: bytes, parts: Callable[[], AsyncIterator[bytes]]) -> tuple[int, int]:
    """Status of the answer, 0 where the connection was closed instead, and the bytes that were sent until then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = 0
    with suppress(ConnectionError):
        writer.write(head)
        async for part in parts():
            writer.write(part)
            await writer.drain()
            sent += len(part)
    answer = b""
    with suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(65536), 10)
    writer.transport.abort()
    return int(answer[9:12] or 0), sent


CHUNK: Final = b"10000\r\n" + b"x" * 65536 + b"\r\n"


async def a_huge_body() -> AsyncIterator[bytes]:
    for _ in range(HUGE // 65536):
        yield CHUNK


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/batch", "/v1/events"])
async def test_a_body_of_a_gigabyte_is_cut_short(serve: Serve, filled_redis: RedisServer, path: str) -> None:
    service = serve(filled_redis.url)
    before = rss_bytes(service.process.pid)
    head = f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, sent = await send(service.port, head.encode(), a_huge_body)
    assert status in (0, 413)
    assert sent < 50_000_000
    assert rss_bytes(service.process.pid) - before < MOST_GROWTH


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/batch", "/v1/events"])
async def test_deep_json_and_long_numbers_are_refused(serve: Serve, filled_redis: RedisServer, path: str) -> None:
    service = serve(filled_redis.url, body_bytes=2_000_000)
    before = rss_bytes(service.process.pid)
    digits = b"1" * 1_000_000
    for body in (
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"visitor_id":"a","features":{"price":' + digits + b"}}",
        b'{"visitor_id":"a","context":{"price":' + digits + b"}}",
        b'{"visitors":[{"visitor_id":"a","features":{"price":' + digits + b"}}]}",
        b'{"userId":"a","event":"Product Viewed","properties":{"price":' + digits + b"}}",
        b'{"batch":[{"userId":"a","event":"Product Viewed","timestamp":' + digits + b"}]}",
    ):

        async def whole(body: bytes = body) -> AsyncIterator[bytes]:
            yield body

        head = f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
        status, _ = await send(service.port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode(), whole)
        assert 400 <= status < 500, (body[:40], status)
    assert rss_bytes(service.process.pid) - before < MOST_GROWTH
    answer = request("/v1/score", {"visitor_id": "a"})
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    assert (await exchange(reader, writer, answer))[0] == 200
    writer.close()
