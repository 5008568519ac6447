"""A feature cache that holds what nobody wrote there: rubbish, other types, nothing any more, or no more room."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import httpx2
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.events import RECORD_BYTES, from_bytes, valid
from tests.conftest import RedisServer, ServiceProcess
from tests.faults import visitors
from tests.faults.conftest import Note, Serve, Span
from tests.faults.scrape import scraped
from tests.faults.traffic import Traffic, request
from tests.faults.verdict import assert_all_answered_in_time, assert_sound

pytestmark = pytest.mark.redis

# Values of rubbish that are tried, so many at a time.
BLOBS: Final = 10_000
AT_ONCE: Final = 50
BROKEN: Final = "propensity_broken_records_total"


class Value(NamedTuple):
    """What lies under a visitor's key of events: its bytes, the prices of its sound records from the oldest on."""

    blob: bytes
    prices: list[float]

    @property
    def broken(self) -> int:
        """How many of its whole records are no records."""
        return len(self.blob) // RECORD_BYTES - len(self.prices)


def _is_sound(record: bytes) -> bool:
    return bool(valid(from_bytes(record))[0])


def _broken(chance: random.Random, kind: str, now_ms: int) -> bytes:
    """24 bytes that are no record: random ones, zeros, or a record of which some bits or bytes are wrong."""
    while True:
        made = bytearray(visitors.record(now_ms, chance.randrange(1000), chance.randrange(1000)))
        if kind == "bits":
            for _ in range(chance.randrange(1, 4)):
                made[chance.randrange(RECORD_BYTES)] ^= 1 << chance.randrange(8)
        elif kind == "shifted":
            made = made[chance.randrange(1, 8) :] + chance.randbytes(7)
        elif kind == "zeros":
            made = bytearray(RECORD_BYTES)
        else:
            made = bytearray(chance.randbytes(RECORD_BYTES))
        # The check of a record has 16 bits: one in 65,536 fits by chance, and nobody could tell it from a sound one.
        if not _is_sound(bytes(made[:RECORD_BYTES])):
            return bytes(made[:RECORD_BYTES])


PIECES: Final = ("sound", "sound", "random", "bits", "shifted", "zeros")


@st.composite
def values(draw: st.DrawFn, now_ms: int) -> Value:
    """Sound records between broken ones, and a torn end; or nothing but random bytes."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        whole, torn = divmod(draw(st.integers(0, 2000)), RECORD_BYTES)
        return Value(b"".join(_broken(chance, "random", now_ms) for _ in range(whole)) + chance.randbytes(torn), [])
    kinds = draw(st.lists(st.sampled_from(PIECES), max_size=12))
    blob, prices = b"", []
    for age, kind in zip(reversed(range(len(kinds))), kinds, strict=True):
        if kind == "sound":
            prices.append(float(chance.randrange(1000)))
            blob += visitors.record(now_ms, prices[-1], age)
        else:
            blob += _broken(chance, kind, now_ms)
    return Value(blob + chance.randbytes(draw(st.integers(0, RECORD_BYTES - 1))), prices)


@pytest.fixture
def service(serve: Serve, own_redis_server: RedisServer) -> ServiceProcess:
    """It waits longer for the feature cache, since here nothing is late but the machine."""
    return serve(own_redis_server.url, deadline_ms=1000)


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=10) as opened:
        yield opened


@pytest.fixture
def cache(own_redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_redis_server.url) as opened:
        yield opened


@pytest.mark.usefixtures("full")
def test_rubbish_is_counted_record_by_record_and_never_scored(
    service: ServiceProcess, client: httpx2.Client, cache: redis.Redis, note: Note
) -> None:
    now_ms, tried, counted = visitors.now_ms(), 0, 0

    @settings(
        max_examples=BLOBS // AT_ONCE,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        held=st.lists(values(now_ms), min_size=AT_ONCE, max_size=AT_ONCE),
        traits=st.lists(st.integers(0, 400), min_size=AT_ONCE, max_size=AT_ONCE),
        seed=st.integers(0, 2**32),
    )
    def hold(held: list[Value], traits: list[int], seed: int) -> None:
        nonlocal tried, counted
        chance = random.Random(seed)
        pipeline = cache.pipeline(transaction=False)
        broken = 0
        for number, (value, size) in enumerate(zip(held, traits, strict=True)):
            whole, torn = divmod(size, RECORD_BYTES)
            rubbish = b"".join(_broken(chance, "random", now_ms) for _ in range(whole)) + chance.randbytes(torn)
            pipeline.set(visitors.key(number), value.blob)
            pipeline.set(visitors.key(number, "t"), rubbish)
            broken += value.broken + whole
        pipeline.execute()
        before = scraped(service, BROKEN)
        answer = client.post(
            "/v1/score/batch", json={"visitors": [{"visitor_id": visitors.name(number)} for number in range(AT_ONCE)]}
        )
        assert answer.status_code == 200
        for number, (value, score) in enumerate(zip(held, answer.json()["results"], strict=True)):
            assert_scored(score, number, value)
        assert scraped(service, BROKEN) - before == broken
        one = chance.randrange(AT_ONCE)
        single = client.post("/v1/score", json={"visitor_id": visitors.name(one)})
        assert single.status_code == 200
        assert_scored(single.json(), one, held[one])
        tried, counted = tried + len(held), counted + broken

    hold()
    assert tried >= BLOBS
    note("rubbish under the keys", values=tried, broken_records=counted, scored=0)


def assert_scored(score: dict[str, Any], number: int, value: Value) -> None:
    """The score is that of a visitor with the sound records alone."""
    count = len(value.prices)
    price = value.prices[-1] if count else None
    assert (score["visitor_id"], score["events"], score["degraded"]) == (visitors.name(number), count, [])
    assert score["propensity"] == pytest.approx(visitors.propensity(price, count), abs=2e-6)


OTHER_TYPES: Final = (
    ("RPUSH", "a"),
    ("HSET", "a", "b"),
    ("SADD", "a"),
    ("ZADD", "1", "a"),
    ("XADD", "*", "a", "b"),
    ("SETBIT", "7", "1"),
    ("PFADD", "a"),
    ("SET", ""),
)


def test_values_of_other_types_are_no_history_and_no_error(client: httpx2.Client, cache: redis.Redis) -> None:
    cases = [(events, traits) for events in OTHER_TYPES for traits in OTHER_TYPES]
    for number, kinds in enumerate(cases):
        for kind, (command, *words) in zip("et", kinds, strict=True):
            cache.execute_command(command, visitors.key(number, kind), *words)  # type: ignore[no-untyped-call]
    ids = [visitors.name(number) for number in range(len(cases))]
    batch = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": one} for one in ids]})
    answers = [client.post("/v1/score", json={"visitor_id": one}) for one in ids]
    assert {answer.status_code for answer in (batch, *answers)} == {200}
    for score in (*batch.json()["results"], *(answer.json() for answer in answers)):
        assert (score["events"], score["degraded"]) == (0, [])
        assert score["propensity"] == pytest.approx(visitors.propensity(None, 0), abs=2e-6)
    for one in ids:
        event = {"event": "Product Viewed", "userId": one, "properties": {"price": 5}}
        assert client.post("/v1/events", json=event).status_code in (200, 422)
        assert client.get(f"/v1/visitors/{one}").status_code == 200
        assert client.delete(f"/v1/visitors/{one}").status_code == 204
        assert client.post("/v1/events", json=event).status_code == 200
        assert client.post("/v1/score", json={"visitor_id": one}).json()["events"] == 1


@pytest.mark.anyio
async def test_a_cache_that_is_flushed_or_full_answers_all_the_same(
    serve: Serve, filled_redis: RedisServer, span: Span, note: Note
) -> None:
    service = serve(filled_redis.url)
    cache = redis.Redis.from_url(filled_redis.url)
    async with Traffic(
        service, 200, lambda number: request("/v1/score", {"visitor_id": visitors.name(number % 1000)})
    ) as traffic:
        await asyncio.sleep(span(0.5, 2))
        await asyncio.to_thread(cache.config_set, "maxmemory", 1)
        await asyncio.sleep(span(1.5, 5))
        flushed = traffic.now_s
        await asyncio.to_thread(cache.flushall)
        gone = traffic.now_s
        await asyncio.sleep(span(1, 5))
    cache.close()
    answers = traffic.answers()
    longest_ms = assert_all_answered_in_time(answers)
    assert_sound(answers)
    known = traffic.answers(0, flushed)
    assert all(visitors.is_answer_for(answer.number % 1000, answer.content) for answer in known)
    assert {answer.content["events"] for answer in traffic.answers(gone)} == {0}
    note("Redis full, then flushed", requests=len(answers), degraded=0, longest_ms=round(longest_ms, 1))
