"""Joining anonymous visitors with known ones: nothing lost, nothing twice, in any order and wherever it is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import redis

from service import history, joining
from service.consent import Identities, statement
from service.core import events
from service.errors import StoreError
from service.history import History
from service.joining import Login
from service.keys import keys_of
from service.persons import Family, Persons
from service.propensities import Propensities
from service.servers import Command
from service.store import Store
from service.streams import Quarantine, Quarantined, ScoreStream
from service.visitors import Visitors
from service.workers.compaction import Compactor

NOW_MS = 1_767_225_600_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
KIND = 1


def event(ts_ms: int, number: int = 1) -> bytes:
    return events.pack(ts_ms, KIND, number, number, float(number))


def trait(ts_ms: int, value: float) -> bytes:
    return events.pack(ts_ms, events.TRAIT_NUMBER, events.hash32("loyalty"), 0, value)


@pytest.fixture
def namespace() -> str:
    return f"joining-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(every_store_url: str, direct: redis.Redis, namespace: str) -> AsyncIterator[Store]:
    """A feature cache, in which every key has an end when the test is over."""
    opened = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
    yield opened
    await opened.close()
    assert [key for key in direct.scan_iter(f"{namespace}:*") if direct.pttl(key) < 0] == []


ANONYMOUS = History(event(NOW_MS - 4, 1) + event(NOW_MS - 2, 2), trait(NOW_MS - 4, 1))
KNOWN = History(event(NOW_MS - 3, 3) + event(NOW_MS - 2, 2), trait(NOW_MS - 3, 2))
TOGETHER = History(b"".join(event(NOW_MS - 4 + place, kind) for place, kind in enumerate((1, 3, 2))), KNOWN.traits)
SAID = statement(NOW_MS - 5, {"ads": True}, False)


async def whole(store: Store, visitor_id: str) -> History:
    """What counts of a visitor."""
    [found] = await store.read([visitor_id])
    return History(history.compact_events(found.events), history.compact_traits(found.traits, NOW_MS))


async def begin(store: Store) -> None:
    await Visitors(store).append({"a": ANONYMOUS, "u": KNOWN}, NOW_MS)
    await Visitors(store).append_said({"a": SAID}, NOW_MS)


async def join(store: Store, anonymous: str = "a", known: str = "u", ts_ms: int = NOW_MS) -> str:
    [outcome] = await Persons(store).join([(anonymous, Login(ts_ms, known))], NOW_MS)
    return outcome


@pytest.mark.anyio
async def test_both_ids_have_the_history_of_both_and_what_both_had_counts_once(store: Store) -> None:
    await begin(store)
    assert await join(store) == "joined"
    assert await join(store) == "known"
    assert await whole(store, "u") == await whole(store, "a") == TOGETHER
    assert (await Identities(store).read(["u"], NOW_MS))[0].consents["ads"]
    assert await Persons(store).family("a") == await Persons(store).family("u") == Family("u", ["a"])


@pytest.mark.anyio
async def test_what_comes_for_the_anonymous_id_later_reaches_the_known_one(store: Store, direct: redis.Redis) -> None:
    await begin(store)
    await join(store)
    length = direct.strlen(store.keys("a")[0])
    late = History(event(NOW_MS - 9, 9), trait(NOW_MS - 1, 3))
    assert await Visitors(store).append({"a": late, "other": late}, NOW_MS) == {}
    assert await Visitors(store).append({"a": late}, NOW_MS) == {}
    assert await Visitors(store).append_missing({"a": History(event(NOW_MS - 8, 8))}, NOW_MS) == 1
    assert await Visitors(store).append_missing({"a": History(event(NOW_MS - 8, 8))}, NOW_MS) == 0
    await Visitors(store).append_said({"a": statement(NOW_MS, {"crm": True}, False)}, NOW_MS)
    expected = event(NOW_MS - 9, 9) + event(NOW_MS - 8, 8) + TOGETHER.events
    assert await whole(store, "u") == History(expected, late.traits)
    assert direct.strlen(store.keys("a")[0]) == length
    assert (await Identities(store).read(["u"], NOW_MS))[0].consents["crm"]


@pytest.mark.anyio
async def test_who_is_joined_has_no_score_of_its_own_any_more(store: Store) -> None:
    scores = Propensities(store)
    await scores.put("shop", "1", ["anonymous", "ann", "other"], np.array([0.1, 0.2, 0.3], np.float32), NOW_MS)
    await Persons(store).join([("anonymous", Login(NOW_MS, "ann"))], NOW_MS)
    assert [one.visitor_id for one in await scores.top("shop", 9)] == ["other", "ann"]


@pytest.mark.anyio
async def test_a_folded_history_is_joined_with_its_traits(store: Store) -> None:
    await begin(store)
    await Compactor(store).compact(store.keys("a"), NOW_MS)
    assert await join(store) == "joined"
    assert await whole(store, "u") == TOGETHER


@pytest.mark.anyio
async def test_who_was_never_seen_can_be_joined_and_into_whom_nobody_knows(store: Store) -> None:
    assert await join(store) == "joined"
    await Visitors(store).append({"a": ANONYMOUS}, NOW_MS)
    assert (await whole(store, "u")).events == ANONYMOUS.events


@pytest.mark.anyio
async def test_on_a_shared_device_everybody_gets_what_came_after_their_login(store: Store) -> None:
    await begin(store)
    await join(store, "a", "u", NOW_MS)
    await join(store, "a", "v", NOW_MS + 100)
    late = event(NOW_MS - 90, 7) + event(NOW_MS + 50, 8) + event(NOW_MS + 150, 9)
    await Visitors(store).append({"a": History(late, trait(NOW_MS + 150, 5))}, NOW_MS)
    assert (await whole(store, "u")).events == late[:24] + TOGETHER.events + late[24:48]
    assert await whole(store, "v") == await whole(store, "a") == History(late[48:], trait(NOW_MS + 150, 5))
    assert (await Persons(store).family("u"), await Persons(store).family("a")) == (Family("u", []), Family("v", ["a"]))
    # The first one leaves: the second keeps the device, and nothing tells of the first.
    assert await Persons(store).erase("u")
    await Visitors(store).append({"a": History(event(NOW_MS + 20, 6))}, NOW_MS)
    assert await whole(store, "u") == History()
    assert (await whole(store, "v")).events == event(NOW_MS + 20, 6) + late[48:]


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["a", "b", "u"])
async def test_erasing_one_id_erases_the_person(store: Store, direct: redis.Redis, namespace: str, asked: str) -> None:
    await begin(store)
    await Visitors(store).append({"other": KNOWN}, NOW_MS)
    await join(store, "a")
    await join(store, "b")
    refused = [Quarantined("type", "m", 1, [name], "{}") for name in ("a", "u", "other")]
    await Quarantine(store).add(refused, 100)
    await ScoreStream(store).add([b'{"score_id":"1","visitor_id":"a","propensity":0.5}'], 100)
    assert await Persons(store).erase(asked)
    assert not await Persons(store).erase(asked)
    assert {key for key in direct.scan_iter(f"{namespace}:[etil]:*")} == {key.encode() for key in store.keys("other")}
    assert [item.visitor_ids for item in await Quarantine(store).latest()] == [("other",)]
    assert direct.xlen(f"{namespace}:scores") == 0
    assert await join(store) == "joined"
    assert await whole(store, "u") == History()


@pytest.mark.anyio
async def test_erasing_leaves_nothing_of_the_visitor_and_all_of_the_others(store: Store) -> None:
    refused = [
        Quarantined("type", "no such type", NOW_MS, ["a b"], '{"userId": "a b"}'),
        Quarantined("type", "no such type", NOW_MS, ["other", "a b"], '{"userId": "other", "anonymousId": "a b"}'),
        Quarantined("type", "no such type", NOW_MS, ["a"], '{"userId": "a"}'),
    ]
    await Visitors(store).append({"a b": History(event(NOW_MS), trait(NOW_MS, 1)), "a": History(event(NOW_MS))}, NOW_MS)
    await Quarantine(store).add(refused, 100)
    assert await Persons(store).erase("a b")
    assert not await Persons(store).erase("a b")
    assert await store.read(["a b", "a"]) == [History(), History(event(NOW_MS))]
    assert await Quarantine(store).latest() == [refused[2]._replace(visitor_ids=("a",))]


@pytest.mark.anyio
async def test_who_is_known_is_not_joined_into_another_and_chains_end_at_the_last(store: Store) -> None:
    await begin(store)
    await join(store, "a", "u")
    assert await join(store, "u", "w") == "refused"
    assert await Persons(store).family("w") == Family("w", [])
    # Who names the anonymous id as a user means whom it was joined into.
    assert await join(store, "b", "a") == "joined"
    assert await Persons(store).family("b") == Family("u", ["a", "b"])
    assert await join(store, "u", "a") == "known"


@pytest.mark.anyio
async def test_a_machine_on_which_everybody_logs_in_is_not_joined_without_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "MOST_JOINED", 3)
    outcomes = await Persons(store).join([(f"a-{place}", Login(place, "u")) for place in range(5)], NOW_MS)
    assert outcomes == ["joined"] * 3 + ["refused"] * 2
    assert (await Persons(store).family("a-4")).visitor_id == "a-4"


@pytest.mark.anyio
async def test_two_who_name_each_other_at_once_never_lead_in_a_circle(store: Store) -> None:
    for place in range(20):
        left, right = f"left-{place}", f"right-{place}"
        await Visitors(store).append({left: ANONYMOUS, right: KNOWN}, NOW_MS)
        outcomes = await asyncio.gather(join(store, left, right), join(store, right, left))
        assert sorted(outcomes) in (["joined", "known"], ["joined", "refused"], ["refused", "refused"])
        families = {(await Persons(store).family(name)).visitor_id for name in (left, right)}
        if "joined" in outcomes:
            assert len(families) == 1
            assert await whole(store, left) == await whole(store, right) == TOGETHER
        else:
            assert await whole(store, left) == ANONYMOUS


@pytest.mark.anyio
async def test_many_at_once_join_the_same_and_nothing_is_lost(store: Store) -> None:
    async def visit(number: int) -> None:
        await Visitors(store).append({"a": History(event(NOW_MS + number, number))}, NOW_MS)
        await join(store, "a", "u", NOW_MS)

    await asyncio.gather(*(visit(number) for number in range(1, 40)))
    assert (await whole(store, "u")).events == b"".join(event(NOW_MS + number, number) for number in range(1, 40))


@pytest.mark.anyio
async def test_many_who_log_in_on_one_device_at_once_share_its_events_out_and_none_counts_twice(store: Store) -> None:
    numbers = range(1, 21)

    async def visit(number: int) -> None:
        await Visitors(store).append({"a": History(event(NOW_MS + number, number))}, NOW_MS)
        for _ in range(10):  # as who is answered 503 sends it again
            with contextlib.suppress(StoreError):
                await join(store, "a", f"u{number % 3}", NOW_MS + number)
                return

    await asyncio.gather(*map(visit, numbers))
    await Visitors(store).settle("a", NOW_MS)
    kept = [(await whole(store, f"u{place}")).events for place in range(3)]
    assert sorted(int(one["id"]) for blob in kept for one in events.from_bytes(blob)) == list(numbers)


@pytest.mark.anyio
async def test_a_key_that_holds_something_else_refuses_the_join_and_loses_nothing(
    store: Store, direct: redis.Redis
) -> None:
    await begin(store)
    direct.lpush(keys_of(store.namespace, "b").said, "x")
    direct.lpush(keys_of(store.namespace, "w").joined, "x")
    direct.pexpire(keys_of(store.namespace, "b").said, DAY_MS)
    direct.pexpire(keys_of(store.namespace, "w").joined, DAY_MS)
    assert await join(store, "b", "u") == "refused"
    assert await join(store, "a", "w") == "refused"
    assert await whole(store, "a") == ANONYMOUS
    assert await Persons(store).family("w") == Family("w", [])
    # An owner that cannot take it leaves it where it is.
    await join(store)
    direct.delete(store.keys("u")[0])
    direct.lpush(store.keys("u")[0], "x")
    direct.pexpire(store.keys("u")[0], DAY_MS)
    await Visitors(store).append({"a": ANONYMOUS}, NOW_MS)
    direct.delete(store.keys("u")[0])
    await Visitors(store).settle("a", NOW_MS)
    assert (await whole(store, "u")).events == ANONYMOUS.events


@pytest.mark.anyio
async def test_compaction_settles_what_was_left_and_keeps_what_is_beside_a_visitor(
    store: Store, direct: redis.Redis
) -> None:
    await begin(store)
    await join(store)
    for key in store.keys("a"):
        direct.append(key, event(NOW_MS - 1, 5) if ":e:" in key else trait(NOW_MS - 1, 5))
    beside = keys_of(store.namespace, "u")[2:]
    for key in beside:
        direct.pexpire(key, HOUR_MS)
    await Compactor(store).compact([key for name in ("a", "u") for key in store.keys(name)], NOW_MS)
    assert await whole(store, "u") == History(TOGETHER.events + event(NOW_MS - 1, 5), trait(NOW_MS - 1, 5))
    assert direct.get(keys_of(store.namespace, "a").said) == joining.head([Login(NOW_MS, "u")])
    assert (
        min(direct.pttl(key) for key in (keys_of(store.namespace, "u").said, keys_of(store.namespace, "u").joined))
        > 23 * HOUR_MS
    )
    await Compactor(store).compact(store.keys("a"), NOW_MS)
    assert await Persons(store).family("a") == Family("u", ["a"])


class Killed(BaseException):
    """In place of the end of a process."""


def killing(store: Store, at: int, *, after: bool) -> Callable[[], int]:
    """Have a store end at its n-th round trip, before the servers hear of it or when they are done with it.

    Gives a function that tells how many round trips there were.
    """
    run, counted = store._servers.run, itertools.count()
    done: list[int] = []

    async def run_or_die(commands: Sequence[Command]) -> list[Any]:
        place = next(counted)
        done.append(place)
        if place == at and not after:
            raise Killed
        replies = await run(commands)
        if place == at:
            raise Killed
        return replies

    store._servers.run = run_or_die  # type: ignore[method-assign]
    return lambda: len(done)


async def take(store: Store) -> None:
    """What the route of events does with an anonymous visitor's last event and the login."""
    await Visitors(store).append({"a": History(event(NOW_MS - 1, 5), trait(NOW_MS - 1, 5))}, NOW_MS)
    await Visitors(store).append_said({"u": statement(NOW_MS, {"crm": True}, True)}, NOW_MS)
    await join(store)


@pytest.mark.anyio
@pytest.mark.parametrize("every_store_url", ["valkey", "cluster"], indirect=True)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("again", ["the client", "compaction", "the next event"])
async def test_killed_at_any_step_of_a_join_nothing_is_lost_or_counted_twice(
    every_store_url: str, direct: redis.Redis, after: bool, again: str
) -> None:
    expected = History(TOGETHER.events + event(NOW_MS - 1, 5), trait(NOW_MS - 1, 5))
    steps = 0
    for at in range(100):
        namespace = f"killed-{uuid.uuid4().hex[:12]}"
        store = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
        await begin(store)
        other = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
        count = killing(store, at, after=after)
        try:
            await take(store)
            is_killed = False
        except Killed:
            is_killed = True
        was_linked = (await Persons(other).family("a")).visitor_id == "u"
        if again == "the client" or not was_linked:
            await take(other)
        elif again == "compaction":
            await Compactor(other).compact([key for name in ("a", "u") for key in other.keys(name)], NOW_MS)
        else:
            await Visitors(other).append({"a": History(event(NOW_MS - 1, 5))}, NOW_MS)
        assert await whole(other, "u") == await whole(other, "a") == expected, (at, count())
        [known] = await Identities(other).read(["u"], NOW_MS)
        assert known.consents == {"ads": True, "crm": True, "email": False, "analytics": False}
        assert await Persons(other).family("u") == Family("u", ["a"])
        for opened in (store, other):
            await opened.close()
        if not is_killed:
            break
        steps += 1
    assert steps >= 10


@pytest.mark.anyio
@pytest.mark.parametrize("every_store_url", ["valkey"], indirect=True)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("asked", ["a", "u"])
async def test_killed_at_any_step_of_an_erasure_and_begun_again_nothing_is_left(
    every_store_url: str, direct: redis.Redis, after: bool, asked: str
) -> None:
    for at in range(100):
        namespace = f"killed-{uuid.uuid4().hex[:12]}"
        store = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
        await begin(store)
        await join(store, "a")
        await join(store, "b")
        await Quarantine(store).add([Quarantined("type", "m", 1, ["b"], "{}")], 100)
        other = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
        killing(store, at, after=after)
        try:
            await Persons(store).erase(asked)
            is_killed = False
        except Killed:
            is_killed = True
        await Persons(other).erase(asked)
        assert list(direct.scan_iter(f"{namespace}:[etil]:*")) == [], at
        assert await Quarantine(other).latest() == []
        for opened in (store, other):
            await opened.close()
        if not is_killed:
            return
    raise AssertionError("it never ended")


@pytest.mark.anyio
async def test_a_server_that_is_gone_is_a_store_error() -> None:
    store = Store.open("redis://127.0.0.1:1", namespace="p", retention_ms=DAY_MS)
    for asking in (
        join(store),
        Visitors(store).settle("a", NOW_MS),
        Persons(store).family("a"),
        Visitors(store).append_said({"a": SAID}, NOW_MS),
    ):
        with pytest.raises(StoreError):
            await asking
    await store.close()
