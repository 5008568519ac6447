"""The feature cache, against Redis and against Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator

import numpy as np
import pytest
import redis

from service import history
from service.core import events
from service.core.errors import PropensityError
from service.core.events import RECORD_BYTES
from service.errors import StoreError
from service.store import MOST_EVENTS, History, Quarantined, Store
from tests.conftest import RedisServer

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000
ODD_IDS = [
    "a",
    "A",
    "a{b}c",
    "}",
    "{",
    "{}",
    "a}",
    "p:e:{a}",
    "é",
    "e\u0301",
    "日本",
    "a b",
    "a\nb",
    "a\0b",
    "%7B",
    "a%b",
    "*",
    "x" * 256,
    "😀" * 256,
]


@pytest.fixture
def namespace() -> str:
    return f"store-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def store_url(every_store_url: str) -> str:
    return every_store_url


@pytest.fixture
async def store(store_url: str, namespace: str) -> AsyncIterator[Store]:
    opened = Store.open(store_url, namespace=namespace, retention_ms=90 * DAY_MS)
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
def every_key_expires(direct: redis.Redis, namespace: str) -> object:
    yield
    keys = [key for key in direct.scan_iter(f"{namespace}:*") if direct.type(key) != b"hash"]
    assert [key for key in keys if direct.pttl(key) < 89 * DAY_MS] == []


def some(count: int, first_ms: int = NOW_MS, seed: int = 0) -> bytes:
    """Events one millisecond apart, in order."""
    ids = np.random.default_rng(seed).integers(1, 2**32, count)
    return events.records(first_ms + np.arange(count), np.ones(count), ids, ids, np.ones(count)).tobytes()


def trait(name: str, text: str, ts_ms: int = NOW_MS) -> bytes:
    return events.pack(ts_ms, events.TRAIT_TEXT, events.hash32(name), events.hash32(text), float("nan"))


async def test_what_was_appended_is_read(store: Store) -> None:
    await store.append({"a": History(some(2), trait("x", "1")), "b": History(some(1))}, NOW_MS)
    await store.append({"a": History(some(1, seed=1))}, NOW_MS)
    assert await store.read(["b", "nobody", "a"]) == [
        History(some(1)),
        History(),
        History(some(2) + some(1, seed=1), trait("x", "1")),
    ]


async def test_reading_nobody_asks_nothing(store: Store) -> None:
    assert await store.read([]) == []


async def test_odd_ids_do_not_reach_each_other(store: Store) -> None:
    for place, visitor_id in enumerate(ODD_IDS):
        await store.append({visitor_id: History(some(1, seed=place))}, NOW_MS)
    assert await store.read(ODD_IDS) == [History(some(1, seed=place)) for place in range(len(ODD_IDS))]
    keys = [key for visitor_id in ODD_IDS for key in store.keys(visitor_id)]
    assert len(set(keys)) == 2 * len(ODD_IDS)
    assert all(key.count("{") == key.count("}") == 1 and key.isascii() for key in keys)


async def test_namespaces_do_not_reach_each_other(store: Store, store_url: str, namespace: str) -> None:
    other = Store.open(store_url, namespace=f"{namespace}-other", retention_ms=90 * DAY_MS)
    await store.append({"a": History(some(1))}, NOW_MS)
    assert await other.read(["a"]) == [History()]
    await other.close()


async def test_a_key_of_another_type_reads_as_nothing_and_holds_nothing(store: Store, direct: redis.Redis) -> None:
    direct.hset(store.keys("spoilt")[0], "field", "value")
    added = History(some(1), trait("x", "1"))
    lost = await store.append({"spoilt": added, "sound": added}, NOW_MS)
    assert lost == {"spoilt": History(added.events)}
    assert await store.read(["spoilt", "sound"]) == [History(b"", added.traits), added]


async def test_a_long_history_is_compacted_to_the_latest_events(store: Store, direct: redis.Redis) -> None:
    blob = some(2 * MOST_EVENTS + 1)
    await store.append({"a": History(blob[: -2 * RECORD_BYTES])}, NOW_MS)
    assert direct.strlen(store.keys("a")[0]) == (2 * MOST_EVENTS - 1) * RECORD_BYTES
    await store.append({"a": History(blob[-2 * RECORD_BYTES :])}, NOW_MS)
    assert direct.get(store.keys("a")[0]) == blob[-MOST_EVENTS * RECORD_BYTES :]


async def test_compaction_drops_doubles_and_broken_records(store: Store) -> None:
    sound, broken = some(10), b"\1" * RECORD_BYTES
    await store.append({"a": History(sound * MOST_EVENTS + broken)}, NOW_MS)
    assert await store.read(["a"]) == [History(sound)]


async def test_what_is_appended_while_a_history_is_compacted_stays(
    store: Store, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact = history.compact_events

    def compact_slowly(blob: bytes) -> bytes:
        direct.append(store.keys("a")[0], some(1, seed=9))
        return compact(blob)

    monkeypatch.setattr(history, "compact_events", compact_slowly)
    blob = some(2 * MOST_EVENTS + 1)
    await store.append({"a": History(blob)}, NOW_MS)
    assert direct.get(store.keys("a")[0]) == blob[-MOST_EVENTS * RECORD_BYTES :] + some(1, seed=9)


async def test_a_history_that_was_erased_while_it_is_compacted_stays_erased(
    store: Store, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact = history.compact_events

    def compact_late(blob: bytes) -> bytes:
        direct.delete(store.keys("a")[0])
        return compact(blob)

    monkeypatch.setattr(history, "compact_events", compact_late)
    await store.append({"a": History(some(2 * MOST_EVENTS + 1))}, NOW_MS)
    assert await store.read(["a"]) == [History()]


async def test_the_next_append_mends_a_torn_value(store: Store, direct: redis.Redis) -> None:
    direct.set(store.keys("a")[0], some(2) + b"torn")
    await store.append({"a": History(some(1, NOW_MS + 10, seed=1))}, NOW_MS)
    assert await store.read(["a"]) == [History(some(2) + some(1, NOW_MS + 10, seed=1))]


async def test_of_many_trait_records_the_latest_of_each_and_the_future_ones_stay(store: Store) -> None:
    rare = trait("loyalty", "gold", NOW_MS - DAY_MS)
    often = [trait("device", str(place % 2), NOW_MS - 100 + place) for place in range(100)]
    ahead = trait("device", "later", NOW_MS + 5)
    await store.append({"a": History(b"", rare + b"".join(often) + ahead)}, NOW_MS)
    assert await store.read(["a"]) == [History(b"", rare + often[-1] + ahead)]


async def test_adding_what_is_missing_twice_changes_nothing(store: Store) -> None:
    history = {"a": History(some(30), trait("x", "1")), "b": History(some(5, seed=1))}
    assert await store.append_missing(history, NOW_MS) == 36
    before = await store.read(["a", "b"])
    assert await store.append_missing(history, NOW_MS) == 0
    assert await store.read(["a", "b"]) == before == list(history.values())


async def test_only_what_is_missing_is_added(store: Store) -> None:
    await store.append({"a": History(some(30)[: 10 * RECORD_BYTES])}, NOW_MS)
    assert await store.append_missing({"a": History(some(30))}, NOW_MS) == 20
    assert await store.read(["a"]) == [History(some(30))]


async def test_what_compaction_would_drop_is_not_added_again(store: Store) -> None:
    long = {"a": History(some(3 * MOST_EVENTS))}
    await store.append_missing(long, NOW_MS)
    before = await store.read(["a"])
    assert len(before[0].events) == MOST_EVENTS * RECORD_BYTES
    assert await store.append_missing(long, NOW_MS) == 0
    assert await store.read(["a"]) == before


async def test_erasing_leaves_nothing_of_the_visitor_and_all_of_the_others(store: Store) -> None:
    refused = [
        Quarantined("type", "no such type", NOW_MS, ["a b"], '{"userId": "a b"}'),
        Quarantined("type", "no such type", NOW_MS, ["other", "a b"], '{"userId": "other", "anonymousId": "a b"}'),
        Quarantined("type", "no such type", NOW_MS, ["a"], '{"userId": "a"}'),
    ]
    await store.append({"a b": History(some(1), trait("x", "1")), "a": History(some(1))}, NOW_MS)
    await store.quarantine(refused, 100)
    assert await store.erase("a b")
    assert not await store.erase("a b")
    assert await store.read(["a b", "a"]) == [History(), History(some(1))]
    assert await store.quarantined() == [refused[2]._replace(visitor_ids=("a",))]


async def test_the_quarantine_keeps_about_the_latest_events(store: Store) -> None:
    for place in range(10):
        await store.quarantine([Quarantined("type", "m", place, [], str(n)) for n in range(100)], 200)
    kept = await store.quarantined(1000)
    assert 200 <= len(kept) <= 400
    assert kept[0].event == "99"


async def test_an_answer_that_nobody_waited_for_is_given_to_nobody(store: Store) -> None:
    kept = {f"v{place}": History(some(1 + place % 50, seed=place)) for place in range(100)}
    await store.append(kept, NOW_MS)
    random = np.random.default_rng(0)
    names = list(kept)
    answered = 0

    async def read_in_a_hurry(first: int, patience_s: float) -> None:
        nonlocal answered
        wanted = names[first : first + 5]
        try:
            async with asyncio.timeout(random.exponential(patience_s)):
                found = await store.read(wanted)
        except TimeoutError:
            return
        assert found == [kept[name] for name in wanted]
        answered += 1

    for turn in range(10):  # at first hardly anybody waits for an answer, at last most do, on whatever machine
        firsts = random.integers(0, 95, 100)
        await asyncio.gather(*(read_in_a_hurry(int(first), 0.001 * 2**turn) for first in firsts))
    assert 0 < answered < 1000
    assert await store.read(names) == list(kept.values())


async def test_a_server_that_is_not_there_is_a_store_error(own_redis_server: RedisServer) -> None:
    own_redis_server.kill()
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS)
    started = time.monotonic()
    for asking in (store.read(["a"]), store.append({"a": History(some(1))}, NOW_MS), store.erase("a"), store.ping()):
        with pytest.raises(StoreError):
            await asking
    assert time.monotonic() - started < 2
    await store.close()


async def test_a_server_that_hangs_is_a_store_error_in_time_and_serves_again(own_redis_server: RedisServer) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS, timeout_ms=100)
    await store.append({"a": History(some(1))}, NOW_MS)
    assert own_redis_server.process is not None
    os.kill(own_redis_server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreError):
        await store.read(["a"])
    assert time.monotonic() - started < 1
    os.kill(own_redis_server.process.pid, signal.SIGCONT)
    assert await store.read(["a"]) == [History(some(1))]
    await store.close()


async def test_a_server_that_is_full_is_a_store_error(own_redis_server: RedisServer) -> None:
    with redis.Redis.from_url(own_redis_server.url, protocol=2) as direct:
        direct.config_set("maxmemory", "1")
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS)
    with pytest.raises(StoreError):
        await store.append({"a": History(some(1))}, NOW_MS)
    assert await store.read(["a"]) == [History()]
    await store.close()


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port", "localhost:6379"])
async def test_a_url_that_cannot_be_read_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(PropensityError, match="redis://HOST:6379/0"):
        Store.open(url, namespace="p", retention_ms=DAY_MS)
