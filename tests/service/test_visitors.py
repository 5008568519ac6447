"""What is added to visitors stays within its bounds, and is there once."""

from __future__ import annotations

import pytest
import redis

from service import history
from service.core import events
from service.core.events import RECORD_BYTES
from service.history import MOST_EVENTS, History
from service.store import Store
from service.visitors import Visitors
from tests.service.histories import NOW_MS, some

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


def trait(name: str, text: str, ts_ms: int = NOW_MS) -> bytes:
    return events.pack(ts_ms, events.TRAIT_TEXT, events.hash32(name), events.hash32(text), float("nan"))


async def test_a_long_history_is_compacted_to_the_latest_events(store: Store, direct: redis.Redis) -> None:
    blob = some(2 * MOST_EVENTS + 1)
    await Visitors(store).append({"a": History(blob[: -2 * RECORD_BYTES])}, NOW_MS)
    assert direct.strlen(store.keys("a")[0]) == (2 * MOST_EVENTS - 1) * RECORD_BYTES
    await Visitors(store).append({"a": History(blob[-2 * RECORD_BYTES :])}, NOW_MS)
    assert direct.get(store.keys("a")[0]) == blob[-MOST_EVENTS * RECORD_BYTES :]


async def test_compaction_drops_doubles_and_broken_records(store: Store) -> None:
    sound, broken = some(10), b"\1" * RECORD_BYTES
    await Visitors(store).append({"a": History(sound * MOST_EVENTS + broken)}, NOW_MS)
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
    await Visitors(store).append({"a": History(blob)}, NOW_MS)
    assert direct.get(store.keys("a")[0]) == blob[-MOST_EVENTS * RECORD_BYTES :] + some(1, seed=9)


async def test_a_history_that_was_erased_while_it_is_compacted_stays_erased(
    store: Store, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact = history.compact_events

    def compact_late(blob: bytes) -> bytes:
        direct.delete(store.keys("a")[0])
        return compact(blob)

    monkeypatch.setattr(history, "compact_events", compact_late)
    await Visitors(store).append({"a": History(some(2 * MOST_EVENTS + 1))}, NOW_MS)
    assert await store.read(["a"]) == [History()]


async def test_the_next_append_mends_a_torn_value(store: Store, direct: redis.Redis) -> None:
    direct.set(store.keys("a")[0], some(2) + b"torn")
    await Visitors(store).append({"a": History(some(1, NOW_MS + 10, seed=1))}, NOW_MS)
    assert await store.read(["a"]) == [History(some(2) + some(1, NOW_MS + 10, seed=1))]


async def test_of_many_trait_records_the_latest_of_each_and_the_future_ones_stay(store: Store) -> None:
    rare = trait("loyalty", "gold", NOW_MS - DAY_MS)
    often = [trait("device", str(place % 2), NOW_MS - 100 + place) for place in range(100)]
    ahead = trait("device", "later", NOW_MS + 5)
    await Visitors(store).append({"a": History(b"", rare + b"".join(often) + ahead)}, NOW_MS)
    assert await store.read(["a"]) == [History(b"", rare + often[-1] + ahead)]


async def test_adding_what_is_missing_twice_changes_nothing(store: Store) -> None:
    history = {"a": History(some(30), trait("x", "1")), "b": History(some(5, seed=1))}
    assert await Visitors(store).append_missing(history, NOW_MS) == 36
    before = await store.read(["a", "b"])
    assert await Visitors(store).append_missing(history, NOW_MS) == 0
    assert await store.read(["a", "b"]) == before == list(history.values())


async def test_only_what_is_missing_is_added(store: Store) -> None:
    await Visitors(store).append({"a": History(some(30)[: 10 * RECORD_BYTES])}, NOW_MS)
    assert await Visitors(store).append_missing({"a": History(some(30))}, NOW_MS) == 20
    assert await store.read(["a"]) == [History(some(30))]


async def test_what_compaction_would_drop_is_not_added_again(store: Store) -> None:
    long = {"a": History(some(3 * MOST_EVENTS))}
    await Visitors(store).append_missing(long, NOW_MS)
    before = await store.read(["a"])
    assert len(before[0].events) == MOST_EVENTS * RECORD_BYTES
    assert await Visitors(store).append_missing(long, NOW_MS) == 0
    assert await store.read(["a"]) == before
