"""A feature cache that is killed, or hangs, under visitors who ask all the time."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.conftest import RedisServer
from tests.faults import visitors
from tests.faults.conftest import Note, Serve, Span
from tests.faults.scrape import reads, until_breaker_is
from tests.faults.traffic import Traffic, request, rss_bytes
from tests.faults.verdict import assert_all_answered_in_time, assert_degraded, assert_sound

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

RATE = 200
# From its return on, the feature cache must be in use again after that many seconds.
RETURN_S = 2.0
MOST_GROWTH = 20_000_000


def ask(number: int) -> bytes:
    return request("/v1/score", {"visitor_id": visitors.name(number % 1000)})


@pytest.mark.usefixtures("full")
async def test_a_killed_cache_costs_nobody_an_answer_and_is_used_again_when_it_is_back(
    serve: Serve, filled_redis: RedisServer, span: Span, note: Note
) -> None:
    service = serve(filled_redis.url)
    async with Traffic(service, RATE, ask) as traffic:
        await asyncio.sleep(span(1, 5))
        filled_redis.kill()
        gone = traffic.now_s
        await asyncio.sleep(span(2, 7))
        back = traffic.now_s
        await asyncio.to_thread(filled_redis.start)
        answered = traffic.now_s
        await asyncio.sleep(span(3, 8))
    answers = traffic.answers()
    longest_ms = assert_all_answered_in_time(answers)
    assert_sound(traffic.answers(0, gone - 0.1))
    assert all(visitors.is_answer_for(answer.number % 1000, answer.content) for answer in traffic.answers(0, back))
    assert_degraded(traffic.answers(gone, back))
    assert_sound(traffic.answers(answered + RETURN_S))
    degraded = [answer.at_s for answer in answers if answer.degraded]
    note(
        "kill -9 of Redis",
        requests=len(answers),
        longest_ms=round(longest_ms, 1),
        dead_s=round(back - gone, 1),
        normal_after_s=round(max(degraded) - answered, 2),
    )


@pytest.mark.usefixtures("full")
async def test_a_hanging_cache_is_left_alone_until_it_moves_again(
    serve: Serve, filled_redis: RedisServer, span: Span, note: Note
) -> None:
    service = serve(filled_redis.url)
    assert filled_redis.process is not None
    async with Traffic(service, RATE, ask) as traffic:
        await asyncio.sleep(span(2, 5))
        memory = rss_bytes(service.process.pid)
        os.kill(filled_redis.process.pid, signal.SIGSTOP)
        try:
            hung = traffic.now_s
            await until_breaker_is(service, "open")
            opened, before = traffic.now_s, await reads(service)
            await asyncio.sleep(span(3, 20) - (opened - hung))
            moved, touched = traffic.now_s, await reads(service) - before
        finally:
            os.kill(filled_redis.process.pid, signal.SIGCONT)
        growth = rss_bytes(service.process.pid) - memory
        await asyncio.sleep(3)
        growth = max(growth, rss_bytes(service.process.pid) - memory)
    answers = traffic.answers()
    longest_ms = assert_all_answered_in_time(answers)
    assert_sound(traffic.answers(0, hung - 0.1))
    assert_degraded(traffic.answers(hung, moved))
    assert_sound(traffic.answers(moved + RETURN_S))
    assert all(visitors.is_answer_for(answer.number % 1000, answer.content) for answer in answers)
    share = touched / len(traffic.answers(opened, moved))
    assert share < 0.01
    assert growth < MOST_GROWTH
    degraded = [answer.at_s for answer in answers if answer.degraded]
    note(
        "SIGSTOP of Redis",
        requests=len(answers),
        longest_ms=round(longest_ms, 1),
        hung_s=round(moved - hung, 1),
        breaker_open_after_s=round(opened - hung, 2),
        share_that_touched_it=f"{share:.2%}",
        memory_growth_MB=round(growth / 1e6, 1),
        normal_after_s=round(max(degraded) - moved, 2),
    )
