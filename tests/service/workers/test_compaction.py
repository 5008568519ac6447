"""Visitors at rest take no more memory than they must, and lose nothing on the way."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest
import redis

from service import history
from service.core import events
from service.core.events import RECORD_BYTES
from service.errors import StoreError
from service.history import MOST_EVENTS, History
from service.leases import lease
from service.location import Address
from service.scoring import unix_ms
from service.store import Store
from service.visitors import Visitors
from service.workers import compaction
from service.workers.compaction import Compactor
from tests.conftest import RedisServer, StartService
from tests.service.histories import NOW_MS, some

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
RETENTION_MS = 90 * DAY_MS
# What differs between two answers about the same.
MOMENTARY = ("score_id", "scored_at", "last_event_age_s")


@pytest.fixture
def namespace() -> str:
    return f"compaction-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(every_store_url: str, namespace: str) -> AsyncIterator[Store]:
    opened = Store.open(every_store_url, namespace=namespace, retention_ms=RETENTION_MS)
    yield opened
    await opened.close()


@pytest.fixture
def compactor(store: Store) -> Compactor:
    return Compactor(store)


def trait(name: int, value: float, ts_ms: int = NOW_MS) -> bytes:
    return events.pack(ts_ms, events.TRAIT_NUMBER, name, 0, value)


async def grow(store: Store, visitor: str, blob: bytes, traits: bytes = b"") -> None:
    """Append events one by one, each with the same traits."""
    for start in range(0, len(blob), RECORD_BYTES):
        await Visitors(store).append({visitor: History(blob[start : start + RECORD_BYTES], traits)}, NOW_MS)


async def compact(compactor: Compactor, rest_ms: int = 0) -> int:
    """A whole pass; returns how many visitors were stored anew."""
    return sum([page.stored_anew async for page in compactor.pages(100, rest_ms, lambda: NOW_MS)])


async def test_a_visitor_takes_what_its_records_would_take_in_one_piece(
    store: Store, compactor: Compactor, direct: redis.Redis
) -> None:
    for count in (1, 2, 3, 5, 17, 30, 100, 300):
        visitor = f"visitor-{count}"
        await grow(store, visitor, some(count), trait(1, 2.0))
        key, traits_key = store.keys(visitor)
        assert await compactor.compact([key], NOW_MS) == 1
        assert direct.get(key) == trait(1, 2.0) + some(count)
        assert direct.exists(traits_key) == 0
        direct.set(f"{key}:fresh", trait(1, 2.0) + some(count))
        fresh, taken = direct.memory_usage(f"{key}:fresh"), direct.memory_usage(key)
        assert isinstance(taken, int)
        assert isinstance(fresh, int)
        assert taken <= fresh + 16  # the other key has a longer name, and no TTL
        direct.delete(f"{key}:fresh")
        assert await store.read([visitor]) == [History(some(count), trait(1, 2.0))]


async def test_what_is_in_one_piece_already_is_left_alone(store: Store, compactor: Compactor) -> None:
    for place in range(50):
        await Visitors(store).append({f"visitor-{place}": History(some(1 + 3 * place, seed=place))}, NOW_MS)
    await compact(compactor)
    assert await compact(compactor) == 0


async def test_who_was_here_lately_is_left_alone(store: Store, compactor: Compactor, direct: redis.Redis) -> None:
    await grow(store, "a", some(30), trait(1, 2.0))
    assert await compact(compactor, HOUR_MS) == 0
    for key in store.keys("a"):
        direct.pexpire(key, RETENTION_MS - HOUR_MS - 1000)
    assert await compact(compactor, HOUR_MS) == 1
    assert direct.strlen(store.keys("a")[0]) == 31 * RECORD_BYTES


async def test_a_visitor_is_kept_no_longer_for_being_compacted(
    store: Store, compactor: Compactor, direct: redis.Redis
) -> None:
    await grow(store, "a", some(30), trait(1, 2.0))
    for key in store.keys("a"):
        direct.pexpire(key, DAY_MS)
    assert await compact(compactor) == 1
    assert DAY_MS - 60_000 < int(direct.pttl(store.keys("a")[0])) <= DAY_MS


async def test_doubled_broken_and_surplus_records_go(store: Store, compactor: Compactor) -> None:
    await Visitors(store).append(
        {"a": History(some(10) * 3 + b"\1" * RECORD_BYTES, trait(1, 1.0) + trait(1, 2.0, NOW_MS + 1))}, 0
    )
    await Visitors(store).append({"b": History(some(MOST_EVENTS + 5))}, NOW_MS)
    await compact(compactor)
    assert await store.read(["a", "b"]) == [
        History(some(10), trait(1, 1.0) + trait(1, 2.0, NOW_MS + 1)),
        History(some(MOST_EVENTS + 5)[5 * RECORD_BYTES :]),
    ]


async def test_of_a_trait_that_came_often_the_latest_stays(
    store: Store, compactor: Compactor, direct: redis.Redis
) -> None:
    for number in range(20):
        await Visitors(store).append(
            {"a": History(some(1, seed=number), trait(1, number, NOW_MS - 100 + number))}, NOW_MS
        )
    await compact(compactor)
    assert direct.strlen(store.keys("a")[0]) == 21 * RECORD_BYTES
    await Visitors(store).append({"a": History(b"", trait(1, 99.0, NOW_MS - 1))}, NOW_MS)
    [known] = await store.read(["a"])
    assert history.compact_traits(known.traits, NOW_MS) == trait(1, 99.0, NOW_MS - 1)


async def test_traits_of_somebody_without_events_stay_where_they_are(
    store: Store, compactor: Compactor, direct: redis.Redis
) -> None:
    for number in range(30):
        await Visitors(store).append({"a": History(b"", trait(1, number, NOW_MS - 100 + number))}, NOW_MS)
    assert await compact(compactor) == 1
    assert await compact(compactor) == 0
    assert direct.get(store.keys("a")[1]) == trait(1, 29, NOW_MS - 71)
    assert await store.read(["a"]) == [History(b"", trait(1, 29, NOW_MS - 71))]


async def test_history_that_was_loaded_before_is_not_added_again(store: Store, compactor: Compactor) -> None:
    loaded = {"a": History(some(30), trait(1, 2.0)), "b": History(b"", trait(2, 2.0)), "c": History(some(3))}
    await Visitors(store).append_missing(loaded, NOW_MS)
    await compact(compactor)
    assert await Visitors(store).append_missing(loaded, NOW_MS) == 0


async def test_a_long_history_with_traits_in_it_is_still_trimmed(
    store: Store, compactor: Compactor, direct: redis.Redis
) -> None:
    await Visitors(store).append({"a": History(some(10), trait(1, 2.0))}, NOW_MS)
    await compact(compactor)
    await Visitors(store).append({"a": History(some(2 * MOST_EVENTS, NOW_MS + 10, seed=1))}, NOW_MS)
    kept = some(2 * MOST_EVENTS, NOW_MS + 10, seed=1)[-MOST_EVENTS * RECORD_BYTES :]
    assert direct.get(store.keys("a")[0]) == trait(1, 2.0) + kept
    assert await store.read(["a"]) == [History(kept, trait(1, 2.0))]


async def test_what_is_appended_meanwhile_stays(
    store: Store, compactor: Compactor, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = history.fold

    def fold_slowly(stored: bytes, traits: bytes, now_ms: int) -> tuple[bytes, bytes]:
        direct.append(store.keys("a")[0], some(1, NOW_MS + 50, seed=9))
        direct.append(store.keys("a")[1], trait(2, 7.0))
        return fold(stored, traits, now_ms)

    monkeypatch.setattr(history, "fold", fold_slowly)
    await grow(store, "a", some(30), trait(1, 2.0))
    assert await compactor.compact([store.keys("a")[0]], NOW_MS) == 1
    assert direct.get(store.keys("a")[1]) == trait(2, 7.0)
    assert await store.read(["a"]) == [
        History(some(30) + some(1, NOW_MS + 50, seed=9), trait(1, 2.0) + trait(2, 7.0)),
    ]


async def test_who_is_erased_meanwhile_stays_erased(
    store: Store, compactor: Compactor, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = history.fold

    def fold_late(stored: bytes, traits: bytes, now_ms: int) -> tuple[bytes, bytes]:
        for key in store.keys("a"):
            direct.delete(key)
        return fold(stored, traits, now_ms)

    monkeypatch.setattr(history, "fold", fold_late)
    await grow(store, "a", some(30), trait(1, 2.0))
    assert await compact(compactor) == 0
    assert [direct.exists(key) for key in store.keys("a")] == [0, 0]


async def test_nothing_acknowledged_is_lost_while_passes_run(store: Store, compactor: Compactor) -> None:
    visitors = [f"visitor-{place}" for place in range(20)]
    held: dict[str, list[bytes]] = {visitor: [] for visitor in visitors}
    stored_anew, writing = 0, True

    async def send(visitor: str, new: History) -> None:
        """Until it is acknowledged, as senders do: a busy machine opens a connection too late once in a while."""
        while True:
            with suppress(StoreError):
                await Visitors(store).append({visitor: new}, NOW_MS)
                return

    async def write(first: int) -> None:
        random, number = np.random.default_rng(first), 0
        while number < 120 or stored_anew <= 20:
            visitor = visitors[int(random.integers(20))]
            added = some(1, NOW_MS + 1000 * number + first, seed=number)
            await send(visitor, History(added, trait(1, number, NOW_MS - 1000 + number)))
            held[visitor].append(added)
            number += 1

    async def compact_on() -> None:
        nonlocal stored_anew
        while writing:
            with suppress(StoreError):
                stored_anew += await compact(compactor)
            await asyncio.sleep(0)

    compacting = asyncio.create_task(compact_on())
    async with asyncio.timeout(60):
        await asyncio.gather(*(write(first) for first in range(5)))
    writing = False
    await compacting
    for visitor, known in zip(visitors, await store.read(visitors), strict=True):
        assert history.compact_events(known.events) == history.compact_events(b"".join(held[visitor]))


async def test_keys_of_others_are_left_alone(
    store: Store, compactor: Compactor, direct: redis.Redis, namespace: str
) -> None:
    names = [f"{namespace}-other:e:{{a}}", f"{namespace}:x:{{a}}", f"{namespace}:e:{{\xe9}}"]
    strange = {name.encode("latin-1"): b"x" * 50 for name in names}
    for key, value in strange.items():
        direct.append(key, value)
        direct.append(key, value)
    direct.hset(store.keys("spoilt")[0], "field", "value")
    await grow(store, "a", some(5))
    await compact(compactor)
    assert {key: direct.get(key) for key in strange} == {key: 2 * value for key, value in strange.items()}
    assert direct.hget(store.keys("spoilt")[0], "field") == b"value"
    direct.delete(store.keys("spoilt")[0])
    for key in strange:
        direct.delete(key)


async def test_one_of_many_processes_compacts_and_then_all_rest(
    every_store_url: str,
    namespace: str,
    store: Store,
    compactor: Compactor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "service.workers.compaction")
    monkeypatch.setattr(compaction, "PAUSE_S", 0)
    monkeypatch.setattr(compaction, "_RETRY_S", 0.05)
    monkeypatch.setattr(compaction, "REST_MS", 0)
    others = [Store.open(every_store_url, namespace=namespace, retention_ms=RETENTION_MS) for _ in range(3)]
    for place in range(40):
        await grow(store, f"visitor-{place}", some(3), trait(1, 2.0))
    stored_anew: list[int] = []
    whole = Compactor.compact

    async def compact_and_count(compactor: Compactor, keys: Sequence[str], now_ms: int, rest_ms: int) -> int:
        stored_anew.append(await whole(compactor, keys, now_ms, rest_ms))
        return stored_anew[-1]

    monkeypatch.setattr(Compactor, "compact", compact_and_count)
    tasks = [asyncio.create_task(compaction.run(other, lambda: NOW_MS)) for other in others]
    async with asyncio.timeout(20):
        while sum(stored_anew) < 40 or "stored 40 visitors anew" not in caplog.text:  # nor before the pass has ended
            await asyncio.sleep(0.02)
    await grow(store, "late", some(3), trait(1, 2.0))
    await asyncio.sleep(0.3)
    assert sum(stored_anew) == 40  # a pass just ended, the next one is an hour away
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for other in others:
        await other.close()


async def test_a_pass_goes_on_where_another_process_was_cut_off(
    store: Store, compactor: Compactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(200):
        await Visitors(store).append({f"visitor-{place}": History(some(2, seed=place), trait(1, 2.0))}, NOW_MS)
    passing = compactor.pages(5, 0, lambda: NOW_MS)
    done = [await anext(passing) for _ in range(20)]
    host, port = done[-1].address
    scanned: list[tuple[Address, int]] = []
    scan = compactor.scan

    async def scan_and_note(address: Address, cursor: int, count: int) -> tuple[int, list[str]]:
        scanned.append((address, cursor))
        return await scan(address, cursor, count)

    monkeypatch.setattr(compactor, "scan", scan_and_note)
    mark = f"{host} {port} {done[-1].cursor}"
    rest = [page async for page in compactor.pages(5, 0, lambda: NOW_MS, mark)]
    assert scanned[0] == (done[-1].address, done[-1].cursor)
    assert sum(page.stored_anew for page in (*done, *rest)) == 200
    gone = compactor.pages(5, 0, lambda: NOW_MS, "elsewhere 1 7")
    await anext(gone)
    assert scanned[-1] == (min(await store.addresses()), 0)


async def test_a_lease_is_one_owners_until_it_ends(store: Store) -> None:
    assert await lease(store, "work", "one", 200)
    assert await lease(store, "work", "one", 200)
    assert not await lease(store, "work", "two", 200)
    await asyncio.sleep(0.3)
    assert await lease(store, "work", "two", 200)


async def test_a_feature_cache_that_is_gone_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_RETRY_S", 0.01)
    asked = 0

    async def fail(*_: object) -> list[object]:
        nonlocal asked
        asked += 1
        raise StoreError("gone")

    store = Store.open("unix:///nowhere", namespace="p", retention_ms=DAY_MS)
    monkeypatch.setattr(store, "run", fail)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await compaction.run(store)
    assert asked > 2
    await store.close()


def test_a_visitor_that_was_compacted_scores_as_before(
    redis_server: RedisServer, start_service: StartService, artifacts: Path, namespace: str
) -> None:
    service = start_service(redis_url=redis_server.url, artifacts=artifacts, namespace=namespace)
    service.wait_until_ready()

    def features() -> object:
        return httpx2.get(f"{service.url}/v1/visitors/anna").json()["features"]["shop"]

    event = {"userId": "anna", "event": "Product Added", "properties": {"price": 9, "category": "shoes"}}
    told = {"context": {"device": "mobile"}, "traits": {"loyalty": 3}}
    for number in range(5):
        httpx2.post(f"{service.url}/v1/events", json={**event, **told, "messageId": str(number)}).raise_for_status()
    before = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "anna"}).json()
    known = features()

    async def compact_all() -> int:
        store = Store.open(redis_server.url, namespace=namespace, retention_ms=RETENTION_MS)
        try:
            return sum([page.stored_anew async for page in Compactor(store).pages(100, 0, unix_ms)])
        finally:
            await store.close()

    assert asyncio.run(compact_all()) == 1
    with redis.Redis.from_url(redis_server.url) as direct:
        assert direct.exists(f"{namespace}:t:{{anna}}") == 0
        assert direct.strlen(f"{namespace}:e:{{anna}}") == 7 * RECORD_BYTES
    after = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "anna"}).json()
    assert {**after, **dict.fromkeys(MOMENTARY, 0)} == {**before, **dict.fromkeys(MOMENTARY, 0)}
    now = features()
    assert isinstance(known, dict)
    assert isinstance(now, dict)
    assert {name: value for name, value in now.items() if name != "since_view"} == {
        name: value for name, value in known.items() if name != "since_view"
    }
    assert (now["device"], now["loyalty"], now["carts_7d"]) == (0, 3, 5)
