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

from service.core import events
from service.core.errors import PropensityError
from service.errors import StoreError
from service.history import History
from service.persons import Persons
from service.store import Store
from service.visitors import Visitors
from tests.conftest import RedisServer
from tests.service.histories import NOW_MS, some

pytestmark = pytest.mark.anyio

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


def trait(name: str, text: str, ts_ms: int = NOW_MS) -> bytes:
    return events.pack(ts_ms, events.TRAIT_TEXT, events.hash32(name), events.hash32(text), float("nan"))


async def test_what_was_appended_is_read(store: Store) -> None:
    await Visitors(store).append({"a": History(some(2), trait("x", "1")), "b": History(some(1))}, NOW_MS)
    await Visitors(store).append({"a": History(some(1, seed=1))}, NOW_MS)
    assert await store.read(["b", "nobody", "a"]) == [
        History(some(1)),
        History(),
        History(some(2) + some(1, seed=1), trait("x", "1")),
    ]


async def test_reading_nobody_asks_nothing(store: Store) -> None:
    assert await store.read([]) == []


async def test_odd_ids_do_not_reach_each_other(store: Store) -> None:
    for place, visitor_id in enumerate(ODD_IDS):
        await Visitors(store).append({visitor_id: History(some(1, seed=place))}, NOW_MS)
    assert await store.read(ODD_IDS) == [History(some(1, seed=place)) for place in range(len(ODD_IDS))]
    keys = [key for visitor_id in ODD_IDS for key in store.keys(visitor_id)]
    assert len(set(keys)) == 2 * len(ODD_IDS)
    assert all(key.count("{") == key.count("}") == 1 and key.isascii() for key in keys)


async def test_namespaces_do_not_reach_each_other(store: Store, store_url: str, namespace: str) -> None:
    other = Store.open(store_url, namespace=f"{namespace}-other", retention_ms=90 * DAY_MS)
    await Visitors(store).append({"a": History(some(1))}, NOW_MS)
    assert await other.read(["a"]) == [History()]
    await other.close()


async def test_a_key_of_another_type_reads_as_nothing_and_holds_nothing(store: Store, direct: redis.Redis) -> None:
    direct.hset(store.keys("spoilt")[0], "field", "value")
    added = History(some(1), trait("x", "1"))
    lost = await Visitors(store).append({"spoilt": added, "sound": added}, NOW_MS)
    assert lost == {"spoilt": History(added.events)}
    assert await store.read(["spoilt", "sound"]) == [History(b"", added.traits), added]


async def test_an_answer_that_nobody_waited_for_is_given_to_nobody(store: Store) -> None:
    kept = {f"v{place}": History(some(1 + place % 50, seed=place)) for place in range(100)}
    await Visitors(store).append(kept, NOW_MS)
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
    for asking in (
        store.read(["a"]),
        Visitors(store).append({"a": History(some(1))}, NOW_MS),
        Persons(store).erase("a"),
        store.ping(),
    ):
        with pytest.raises(StoreError):
            await asking
    assert time.monotonic() - started < 2
    await store.close()


async def test_a_server_that_hangs_is_a_store_error_in_time_and_serves_again(own_redis_server: RedisServer) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS, timeout_ms=100)
    await Visitors(store).append({"a": History(some(1))}, NOW_MS)
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
        await Visitors(store).append({"a": History(some(1))}, NOW_MS)
    assert await store.read(["a"]) == [History()]
    await store.close()


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port", "localhost:6379"])
async def test_a_url_that_cannot_be_read_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(PropensityError, match="redis://HOST:6379/0"):
        Store.open(url, namespace="p", retention_ms=DAY_MS)
