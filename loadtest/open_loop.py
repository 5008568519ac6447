"""Requests at times that the answers cannot move: what a server does under an arrival rate, not under politeness.

A generator that waits for an answer before it sends the next request slows down with the server and never sees what
it did to those who would have come meanwhile. Here each request has its moment, latency counts from that moment, and a
request that finds every connection busy waits at the client's cost. The generator's own lag is measured, and a result
of one that could not keep up says so (`Result.starved`).

    python -m loadtest.open_loop http://127.0.0.1:8000/v1/score --rate 5000 --seconds 30
"""

from __future__ import annotations

import array
import asyncio
import gc
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import typer
import uvloop

# What became of a request that got no status.
TIMEOUT, CLOSED, MALFORMED = -1, -2, -3
NAMES: Final = {TIMEOUT: "timeout", CLOSED: "closed", MALFORMED: "malformed"}
LAG_LIMIT_MS: Final = 2.0
# uvloop's timers have whole milliseconds; nearer moments are waited for in a busy loop.
_NAP_S: Final = 0.002
_SWEEP_S: Final = 0.05
# A server takes up new connections when it finds the time: 1,024 of them under load, up to a second and a half.
_WARM_UP_RATE: Final = 1000.0
_REST_S: Final = 0.1
_LARGEST_HEAD: Final = 65_536
_LENGTH: Final = b"\r\ncontent-length:"

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """What became of n requests.

    `scheduled_s` float64[n] are their moments since the start, `latency_ms` float64[n] the time from the moment to the
    last byte of the answer (or to giving up), `lag_ms` float64[n] the generator's own part of it, `outcome` int64[n]
    the status, or TIMEOUT, CLOSED (the server closed the connection), MALFORMED (no HTTP/1.1 with a content-length).
    """

    scheduled_s: Floats = field(repr=False)
    latency_ms: Floats = field(repr=False)
    lag_ms: Floats = field(repr=False)
    outcome: Integers = field(repr=False)
    seconds: float  # from the first moment to the last answer
    queued: int  # requests that found every connection busy
    cpu: float  # processor seconds the generator used a second

    @property
    def counts(self) -> dict[str, int]:
        """Requests by status, or by what became of them instead."""
        found, numbers = np.unique(self.outcome, return_counts=True)
        names = [NAMES.get(code, str(code)) for code in found.tolist()]
        return dict(zip(names, numbers.tolist(), strict=True))

    def percentile_ms(self, percent: float, status: int | None = 200) -> float:
        """Milliseconds within which that share of the answers with a status came; NaN without any. None: of all."""
        latency = self.latency_ms if status is None else self.latency_ms[self.outcome == status]
        return float(np.percentile(latency, percent)) if len(latency) else float("nan")

    def rate(self, status: int = 200) -> float:
        """Answers with a status, a second."""
        return float((self.outcome == status).sum() / self.seconds)

    @property
    def starved(self) -> bool:
        """Whether the generator fell behind its own schedule so often that the latencies are partly its own."""
        return float(np.percentile(self.lag_ms, 99)) > LAG_LIMIT_MS

    def as_dict(self) -> dict[str, object]:
        """The numbers that people ask for."""
        statuses = [code for code in np.unique(self.outcome).tolist() if code > 0]
        return {
            "requests": len(self.outcome),
            "seconds": round(self.seconds, 3),
            "counts": self.counts,
            "rate": {str(status): round(self.rate(status), 1) for status in statuses},
            "latency_ms": {
                str(status): {
                    f"p{percent:g}": round(self.percentile_ms(percent, status), 3)
                    for percent in (50, 90, 99, 99.9, 100)
                }
                for status in statuses
            },
            "lag_ms": {
                f"p{percent:g}": round(float(np.percentile(self.lag_ms, percent)), 3) for percent in (50, 99, 100)
            },
            "queued": self.queued,
            "cpu": round(self.cpu, 3),
            "starved": self.starved,
        }


def moments(rate: float, seconds: float, seed: int | None = None) -> Floats:
    """Seconds since the start of `rate * seconds` requests: evenly, or by a Poisson process with a seed."""
    count = max(round(rate * seconds), 1)
    if seed is None:
        return np.arange(count) / rate
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def post(url: str, body: bytes) -> bytes:
    """The bytes of a request with a JSON body."""
    parts = urlsplit(url)
    head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    return b"%sContent-Length: %d\r\n\r\n%s" % (head.encode(), len(body), body)


async def drive(
    url: str,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    *,
    connections: int = 128,
    timeout_s: float = 5.0,
    poisson_seed: int | None = None,
) -> Result:
    """Send the requests in turn at `rate` a second over keep-alive connections, one at a time on each.

    Before that each connection sends one request that does not count. Raises OSError if the server cannot be reached
    at the start. A connection that the server closes is opened again.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"{url}: write http://HOST:PORT/PATH")
    scheduled = moments(rate, seconds, poisson_seed)
    warm_up = moments(_WARM_UP_RATE, connections / _WARM_UP_RATE)
    sender = _Sender(parts.hostname, parts.port or 80, requests, warm_up, scheduled, timeout_s)
    return await sender.run()


class _Sender:
    """The schedule, the idle connections, and what is known of each request by its number."""

    def __init__(
        self,
        host: str,
        port: int,
        requests: Sequence[bytes],
        warm_up: Floats,
        scheduled: Floats,
        timeout_s: float,
    ) -> None:
        self.host, self.port, self.requests, self.timeout_s = host, port, requests, timeout_s
        self.first = len(warm_up)  # number of the first request that counts
        self.begin_s = float(warm_up[-1]) + _REST_S
        self.scheduled: list[float] = [*warm_up.tolist(), *(scheduled + self.begin_s).tolist()]
        self.latency = array.array("d", bytes(8 * len(self.scheduled)))
        self.lag = array.array("d", bytes(8 * len(self.scheduled)))
        self.outcome = array.array("q", bytes(8 * len(self.scheduled)))
        self.idle: deque[_Connection] = deque()
        self.waiting: deque[int] = deque()
        self.open: set[_Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.sent, self.answered, self.queued, self.started = 0, 0, 0, 0.0
        self.is_over = False

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = loop.create_future()
        await asyncio.gather(*(self._connect() for _ in range(self.first)))
        cpu_s, self.started = time.process_time(), time.perf_counter()
        loop.call_soon(self._send_due)
        loop.call_later(_SWEEP_S, self._sweep)
        await self.finished
        taken_s, cpu_s = time.perf_counter() - self.started, time.process_time() - cpu_s
        self.is_over = True
        for connection in self.open:
            connection.transport.abort()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        return Result(
            scheduled_s=np.array(self.scheduled[self.first :]) - self.begin_s,
            latency_ms=np.frombuffer(self.latency)[self.first :] * 1000,
            lag_ms=np.frombuffer(self.lag)[self.first :] * 1000,
            outcome=np.frombuffer(self.outcome, np.int64)[self.first :],
            seconds=taken_s - self.begin_s,
            queued=self.queued,
            cpu=cpu_s / taken_s,
        )

    def _send_due(self) -> None:
        """Send what is due, then sleep until shortly before the next moment."""
        scheduled, started, lag = self.scheduled, self.started, self.lag
        number, count = self.sent, len(scheduled)
        until = 0.0
        while number < count:
            now = time.perf_counter() - started
            until = scheduled[number] - now
            if until > 0:
                break
            lag[number] = -until
            if self.idle:
                self.idle.popleft().send(number)
            else:
                self.waiting.append(number)
                self.queued += number >= self.first
            number += 1
        self.sent = number
        if number == count:
            return
        loop = asyncio.get_running_loop()
        if until > _NAP_S:
            loop.call_later(until - _NAP_S, self._send_due)
        else:
            loop.call_soon(self._send_due)

    def settle(self, number: int, outcome: int) -> None:
        """Note what became of a request."""
        self.latency[number] = time.perf_counter() - self.started - self.scheduled[number]
        self.outcome[number] = outcome
        self.answered += 1
        if self.answered == len(self.scheduled) and not self.finished.done():
            self.finished.set_result(None)

    def release(self, connection: _Connection) -> None:
        """Take a connection back, and send on it what waits."""
        if self.waiting:
            connection.send(self.waiting.popleft())
        else:
            self.idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """Replace a connection that ended."""
        if self.is_over or connection not in self.open:
            return
        self.open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        task = asyncio.get_running_loop().create_task(self._reconnect())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(lambda: _Connection(self), self.host, self.port)
        connection.transport = transport
        self.open.add(connection)
        self.release(connection)

    async def _reconnect(self) -> None:
        while not self.is_over:
            try:
                await self._connect()
                return
            except OSError:  # the server is gone for now; its requests time out
                await asyncio.sleep(0.05)

    def _sweep(self) -> None:
        """Give up what waits for too long, with its connection."""
        if self.is_over:
            return
        oldest = time.perf_counter() - self.started - self.timeout_s
        for connection in [one for one in self.open if one.number >= 0 and self.scheduled[one.number] < oldest]:
            connection.fail(TIMEOUT)
        while self.waiting and self.scheduled[self.waiting[0]] < oldest:
            self.settle(self.waiting.popleft(), TIMEOUT)
        asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    transport: asyncio.Transport

    def __init__(self, sender: _Sender) -> None:
        self._sender, self._received = sender, b""
        self.number = -1  # of the request that it waits for

    def send(self, number: int) -> None:
        self.number = number
        requests = self._sender.requests
        self.transport.write(requests[(number - self._sender.first) % len(requests)])

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        size = _answer_size(data)
        if self.number < 0 or size < 0 or 0 < size < len(data):
            self.fail(MALFORMED)
        elif size == 0 or size > len(data):
            self._received = data
        else:
            number, self.number, self._received = self.number, -1, b""
            self._sender.settle(number, int(data[9:12]))
            if b"connection: close" in data[: data.find(b"\r\n\r\n")].lower():
                self.fail(CLOSED)
            else:
                self._sender.release(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(CLOSED)

    def fail(self, outcome: int) -> None:
        """Give up the request and the connection."""
        number, self.number = self.number, -1
        if number >= 0:
            self._sender.settle(number, outcome)
        self.transport.abort()
        self._sender.lost(self)


def _answer_size(data: bytes) -> int:
    """Bytes of the answer that `data` begins with: 0 if its head is not complete, -1 if it cannot be read."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0 if len(data) < _LARGEST_HEAD else -1
    name = data.find(_LENGTH, 0, end)
    if name < 0:
        name = data.lower().find(_LENGTH, 0, end)
    value = data[name + len(_LENGTH) : data.find(b"\r", name + len(_LENGTH))].strip()
    if name < 0 or not data.startswith(b"HTTP/1.1 ") or not (value.isdigit() and data[9:12].isdigit()):
        return -1
    return end + 4 + int(value)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    url: Annotated[str, typer.Argument(help="Where to POST to, as http://127.0.0.1:8000/v1/score.")],
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1)] = 1000,
    seconds: Annotated[float, typer.Option(help="For how long.", min=0.1)] = 10,
    connections: Annotated[
        int, typer.Option(help="Keep-alive connections, each with a request at a time.", min=1)
    ] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.", min=0.01)] = 5,
    poisson: Annotated[int | None, typer.Option(help="Random arrivals with this seed; evenly without it.")] = None,
    visitors: Annotated[int, typer.Option(help="Score visitor-0, visitor-1 ... of so many.", min=1)] = 10_000,
    bodies: Annotated[Path | None, typer.Option(help="Instead: a file with a JSON body a line.", exists=True)] = None,
    allow: Annotated[list[int] | None, typer.Option(help="A status besides 200 that is no error; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send requests at a fixed rate. Exits with 1 after other answers than 200, with 2 if it was too slow itself."""
    lines = (
        bodies.read_bytes().splitlines() if bodies else [b'{"visitor_id":"visitor-%d"}' % n for n in range(visitors)]
    )
    requests = [post(url, line) for line in lines if line]
    gc.freeze()
    result = uvloop.run(
        drive(url, requests, rate, seconds, connections=connections, timeout_s=timeout, poisson_seed=poisson)
    )
    print(json.dumps(result.as_dict(), indent=None if as_json else 2))
    expected = {"200", *map(str, allow or ())}
    if result.starved:
        print("refused: the generator could not keep to its own schedule; lower --rate or free a core", file=sys.stderr)
        raise typer.Exit(2)
    raise typer.Exit(0 if set(result.counts) <= expected else 1)


if __name__ == "__main__":
    app()
