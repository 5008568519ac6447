"""Owns the promise of the open-loop generator: latency from the scheduled moment, and every request accounted for."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import uvloop
from typer.testing import CliRunner

from loadtest import open_loop
from loadtest.open_loop import Result, drive, moments, post

pytestmark = pytest.mark.alone

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(status: int = 200, body: bytes = b"ok", *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def read_body(reader: asyncio.StreamReader) -> bytes | None:
    """The next request's body; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return None


def replying(reply: Callable[[bytes], bytes | None]) -> Serve:
    """A server that answers each body with what `reply` says; None closes the connection without an answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (body := await read_body(reader)) is not None:
            said = reply(body)
            if said is None:
                break
            writer.write(said)
            if b"close" in said:
                break
        writer.close()

    return serve


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
    port = server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/path"
    server.close()


def run(serve: Serve, rate: float, seconds: float, bodies: int = 1, **options: float | int) -> Result:
    async def scenario() -> Result:
        async with listening(serve) as url:
            requests = [post(url, b"%d" % number) for number in range(bodies)]
            return await drive(url, requests, rate, seconds, **options)  # type: ignore[arg-type]

    return uvloop.run(scenario())


def test_evenly_spaced_moments_have_the_rate() -> None:
    assert moments(4, 1).tolist() == [0, 0.25, 0.5, 0.75]


def test_poisson_moments_have_the_rate_and_exponential_gaps() -> None:
    found = moments(1000, 20, seed=1)
    gaps = np.diff(found)
    assert len(found) == 20_000
    assert found[-1] == pytest.approx(20, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert np.array_equal(found, moments(1000, 20, seed=1))


def test_every_request_is_sent_and_answered_at_its_rate() -> None:
    seen: list[bytes] = []

    def note(body: bytes) -> bytes:
        seen.append(body)
        return answer()

    result = run(replying(note), 200, 1, bodies=50, connections=8)
    assert result.counts == {"200": 200}
    assert sorted(seen[8:]) == sorted([b"%d" % number for number in range(50)] * 4)
    assert result.rate() == pytest.approx(200, rel=0.3)
    assert 0 < result.percentile_ms(50) < 100


def test_every_connection_sends_a_request_that_does_not_count_before_the_others() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(seen)
        seen.append(0)
        while await read_body(reader) is not None:
            seen[number] += 1
            await asyncio.sleep(0 if seen[number] > 1 else 0.05)
            writer.write(answer())
        writer.close()

    result = run(serve, 50, 0.2, connections=20)
    assert result.counts == {"200": 10}
    assert result.percentile_ms(50) < 45
    assert len(seen) == 20
    assert min(seen) >= 1
    assert sum(seen) == 30


def test_latency_counts_from_the_moment_when_a_request_was_due() -> None:
    stalls = iter([0, 0.4])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_body(reader) is not None:
            await asyncio.sleep(next(stalls, 0))
            writer.write(answer())
        writer.close()

    result = run(serve, 100, 0.6, connections=1)
    # A generator that waits would have sent one slow request; here those due meanwhile waited as well.
    late = result.latency_ms[:35]
    assert late[0] > 390
    assert (np.diff(late) < 0).all()
    assert result.queued > 30
    assert result.latency_ms[-1] < 300
    assert np.median(result.lag_ms) < 2


def test_statuses_are_counted_and_timed_apart() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (body := await read_body(reader)) is not None:
            await asyncio.sleep(0.05 if body == b"0" else 0)
            writer.write(answer(200 if body == b"0" else 429))
        writer.close()

    result = run(serve, 100, 0.5, bodies=2)
    assert result.counts == {"200": 25, "429": 25}
    assert result.percentile_ms(0, 200) > 45
    assert result.percentile_ms(50, 429) < 45
    assert math.isnan(result.percentile_ms(50, 503))
    assert result.rate(429) == pytest.approx(result.rate(200))


def test_an_answer_in_single_bytes_is_put_together() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_body(reader) is not None:
            for byte in answer():
                writer.write(bytes([byte]))
                await asyncio.sleep(0.001)
        writer.close()

    assert run(serve, 20, 0.3).counts == {"200": 6}


def test_what_is_never_answered_times_out_and_the_connection_is_replaced() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (body := await read_body(reader)) is not None:
            if body != b"0":
                writer.write(answer())
        writer.close()

    result = run(serve, 40, 0.5, bodies=4, connections=1, timeout_s=0.2)
    assert set(result.counts) == {"200", "timeout"}
    assert sum(result.counts.values()) == 20
    gone = result.latency_ms[result.outcome == open_loop.TIMEOUT]
    assert gone.min() >= 200
    assert gone.max() < 1000


def test_a_connection_that_the_server_drops_costs_its_request_and_is_replaced() -> None:
    result = run(replying(lambda body: None if body == b"0" else answer()), 100, 0.5, bodies=5, connections=2)
    assert result.counts == {"200": 40, "closed": 10}


def test_a_server_that_announces_the_end_of_a_connection_costs_no_request() -> None:
    result = run(replying(lambda _: answer(200, b"ok", b"Connection: close")), 100, 0.5, connections=2)
    assert result.counts == {"200": 50}


@pytest.mark.parametrize(
    "rubbish",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
        answer() + answer(),
    ],
)
def test_what_cannot_be_read_is_no_answer(rubbish: bytes) -> None:
    assert run(replying(lambda _: rubbish), 50, 0.1).counts == {"malformed": 5}


def test_a_generator_that_cannot_keep_up_says_so() -> None:
    def slow(_: bytes) -> bytes:
        time.sleep(0.02)  # in the generator's own loop, as a busy core would
        return answer()

    result = run(replying(slow), 200, 0.3, connections=4)
    assert result.starved
    assert result.as_dict()["starved"] is True


def test_a_server_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="refused|connect"):
        uvloop.run(drive("http://127.0.0.1:1/", [b""], 10, 1))


@pytest.mark.parametrize("url", ["https://127.0.0.1/", "127.0.0.1:80", "ftp://x/"])
def test_a_url_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:PORT/PATH"):
        uvloop.run(drive(url, [b""], 10, 1))


def test_the_command_prints_what_it_found_and_fails_for_other_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop, "LAG_LIMIT_MS", 10_000)

    async def scenario(status: int, *options: str) -> tuple[int, dict[str, object]]:
        async with listening(replying(lambda _: answer(status))) as url:
            command = [url, "--rate", "50", "--seconds", "0.2", "--json", *options]
            ran = await asyncio.to_thread(CliRunner().invoke, open_loop.app, command)
            return ran.exit_code, json.loads(ran.stdout)

    code, found = asyncio.run(scenario(200))
    assert (code, found["counts"]) == (0, {"200": 10})
    assert asyncio.run(scenario(429))[0] == 1
    assert asyncio.run(scenario(429, "--allow", "429"))[0] == 0
