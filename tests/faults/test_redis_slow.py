"""A feature cache behind a network that delays, cuts, swallows and mangles, under visitors who ask all the time."""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import pytest

from tests.conftest import RedisServer
from tests.faults import visitors
from tests.faults.conftest import Note, Serve, Span
from tests.faults.proxy import Proxy, Way
from tests.faults.scrape import until_breaker_is
from tests.faults.test_redis_gone import RATE, RETURN_S, ask
from tests.faults.traffic import Traffic, exchange, request
from tests.faults.verdict import assert_all_answered_in_time, assert_degraded, assert_sound

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


class Fault(NamedTuple):
    """What the proxy does, and whether scores are made without the feature cache then; None: some are."""

    name: str
    is_degraded: bool | None
    way: Way = Way.PASS
    delay_s: float = 0.0
    pause_s: float = 0.0
    babble: bytes = b""


FAULTS = (
    Fault("5 ms later", False, delay_s=0.005),
    Fault("50 ms later", None, delay_s=0.05),
    Fault("500 ms later", True, delay_s=0.5),
    Fault("resets", True, Way.RESET),
    Fault("cut answers", True, Way.CUT),
    Fault("ended answers", True, Way.CLOSE),
    Fault("half-open", True, Way.SWALLOW),
    Fault("a byte at a time", False, Way.TRICKLE),
    Fault("a byte each 2 ms", True, Way.TRICKLE, pause_s=0.002),
    Fault("random bytes", True, Way.BABBLE),
    Fault("answers of another command", True, Way.BABBLE, babble=b"+OK\r\n"),
    Fault("values of another type", True, Way.BABBLE, babble=b"*2\r\n:1\r\n:2\r\n"),
    Fault("too few values", True, Way.BABBLE, babble=b"*1\r\n$-1\r\n"),
    Fault("a value without end", True, Way.BABBLE, babble=b"*2\r\n$536870911\r\nx"),
)


@pytest.mark.usefixtures("full")
@pytest.mark.timeout(600)
async def test_whatever_the_network_does_everybody_is_answered_in_time_with_their_own_data(
    serve: Serve, filled_redis: RedisServer, span: Span, note: Note
) -> None:
    proxy = Proxy(filled_redis.port)
    await proxy.listen()
    service = await asyncio.to_thread(serve, proxy.url)
    phases: list[tuple[Fault, float, float, float]] = []
    async with Traffic(service, RATE, ask) as traffic:
        await asyncio.sleep(0.5)
        for fault in FAULTS:
            _, _, proxy.way, proxy.delay_s, proxy.pause_s, proxy.babble = fault
            begun = traffic.now_s
            await asyncio.sleep(span(1, 10))
            proxy.way, proxy.delay_s = Way.PASS, 0.0
            ended = traffic.now_s
            await until_breaker_is(service, "closed")
            closed = traffic.now_s
            await asyncio.sleep(0.3)
            phases.append((fault, begun, ended, closed))
        begun = traffic.now_s
        await proxy.refuse()
        await asyncio.sleep(span(1, 10))
        ended = traffic.now_s
        await proxy.listen()
        await until_breaker_is(service, "closed")
        phases.append((Fault("refused connections", True), begun, ended, traffic.now_s))
        await asyncio.sleep(0.3)
    await proxy.refuse()
    assert_all_answered_in_time(traffic.answers())
    for answer in traffic.answers():
        assert visitors.is_answer_for(answer.number % 1000, answer.content), answer
    for number, (fault, begun, ended, closed) in enumerate(phases):
        during = traffic.answers(begun, ended)
        if fault.is_degraded:
            assert_degraded(traffic.answers(begun + 0.02, ended))  # what was on its way was on its way
        elif fault.is_degraded is not None:
            assert_sound(during)
        assert closed - ended < RETURN_S, fault.name
        # What was on its way when the next fault began may have met it.
        next_s = phases[number + 1][1] if number + 1 < len(phases) else closed + 0.3
        assert_sound(traffic.answers(closed + 0.1, next_s - 0.02))
        note(
            fault.name,
            requests=len(during),
            degraded=f"{sum(bool(answer.degraded) for answer in during) / len(during):.1%}",
            longest_ms=round(assert_all_answered_in_time(during), 1),
            normal_after_s=round(closed - ended, 2),
        )


@pytest.mark.alone
async def test_beside_aborted_requests_nobody_gets_the_data_of_another(
    serve: Serve, own_redis_server: RedisServer, span: Span, note: Note
) -> None:
    count = int(span(3000, 10_000))
    visitors.fill(own_redis_server.url, range(count), visitors.now_ms())
    proxy = Proxy(own_redis_server.port)
    await proxy.listen()
    service = await asyncio.to_thread(serve, proxy.url)
    chance = random.Random(11)
    numbers = iter(range(count))
    aborted = [chance.random() < 0.3 for _ in range(count)]
    degraded = 0

    async def ask_on() -> None:
        nonlocal degraded
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        for number in numbers:
            question = request("/v1/score", {"visitor_id": visitors.name(number)})
            if aborted[number]:
                await _abort(service.port, question, chance)
                continue
            status, raw = await exchange(reader, writer, question)
            if status == 429:  # a machine that is busy with others refuses some
                degraded += 1
                continue
            assert status == 200, raw
            content = visitors.content_of(raw)
            assert visitors.is_answer_for(number, content), content
            degraded += bool(content["degraded"])
        writer.close()

    async def vary() -> None:
        while True:
            proxy.delay_s = chance.choice([0, 0, 0.002, 0.01])
            await asyncio.sleep(0.003)

    varying = asyncio.create_task(vary())
    await asyncio.gather(*(ask_on() for _ in range(48)))
    varying.cancel()
    await proxy.refuse()
    assert sum(aborted) > 0.28 * count
    assert degraded < 0.05 * count
    note("aborted requests", requests=count, aborted=sum(aborted), with_data_of_another=0, degraded=degraded)


async def _abort(port: int, question: bytes, chance: random.Random) -> None:
    """Ask, and be gone before the answer: at once or a moment later, with a farewell or a reset."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(question)
    await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
    if chance.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()
