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
from hypothesis import given, settings
from hypothesis import strategies as some

from service import consent, history, joining
from service.consent import Identities, statement
from service.core import events
from service.errors import StoreError
from service.joining import Linked, Login
from service.propensities import Propensities
from service.servers import Command
from service.store import Family, History, Quarantined, Store

NOW_MS = 1_767_225_600_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
KIND = 1


def event(ts_ms: int, number: int = 1) -> bytes:
    return events.pack(ts_ms, KIND, number, number, float(number))


def trait(ts_ms: int, value: float) -> bytes:
    return events.pack(ts_ms, events.TRAIT_NUMBER, events.hash32("loyalty"), 0, value)


# --- the head ---


@settings(max_examples=30)
@given(
    some.lists(some.tuples(some.integers(0, 2**53), some.text(min_size=1, max_size=256)), min_size=1, max_size=8),
    some.binary(max_size=200),
)
def test_a_head_gives_back_its_logins_and_what_stands_behind_it(logins: list[tuple[int, str]], tail: bytes) -> None:
    given_logins = tuple(Login(*login) for login in logins)
    head = joining.head(given_logins)
    assert joining.split(head + tail) == Linked(head, given_logins, tail)
    assert len(head) % events.RECORD_BYTES == len(head) % consent.RECORD_BYTES == 1
    assert joining.owners([head + tail, None, b"", None, tail, tail]) == {0: logins[-1][1]}


@pytest.mark.parametrize("value", [None, b"", event(1), joining.MAGIC, joining.MAGIC + b"\x02\0[]", b"x" * 100])
def test_what_is_no_head_is_none(value: bytes | None) -> None:
    assert joining.split(value) is None


def test_an_event_is_of_who_logged_in_last_before_it_and_before_the_first_login_of_the_first() -> None:
    logins: tuple[Login, ...] = ()
    for login in (Login(10, "ann"), Login(30, "bob"), Login(20, "ann"), Login(40, "ann"), Login(5, "ann")):
        logins = joining.with_login(logins, login)
    assert logins == (Login(10, "ann"), Login(30, "bob"), Login(40, "ann"))
    owners = [joining.owner_at(logins, ts_ms) for ts_ms in (0, 10, 29, 30, 39, 40, 99)]
    assert owners == ["ann", "ann", "ann", "bob", "bob", "ann", "ann"]


def test_logins_are_bounded() -> None:
    logins: tuple[Login, ...] = ()
    for moment in range(100):
        logins = joining.with_login(logins, Login(moment, f"u-{moment}"))
    assert len(logins) == joining.MOST_LOGINS
    assert logins[-1] == Login(99, "u-99")


# --- in the feature cache ---


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
    await store.append({"a": ANONYMOUS, "u": KNOWN}, NOW_MS)
    await store.append_said({"a": SAID}, NOW_MS)


async def join(store: Store, anonymous: str = "a", known: str = "u", ts_ms: int = NOW_MS) -> str:
    [outcome] = await store.join([(anonymous, Login(ts_ms, known))], NOW_MS)
    return outcome


@pytest.mark.anyio
async def test_both_ids_have_the_history_of_both_and_what_both_had_counts_once(store: Store) -> None:
    await begin(store)
    assert await join(store) == "joined"
    assert await join(store) == "known"
    assert await whole(store, "u") == await whole(store, "a") == TOGETHER
    assert (await Identities(store).read(["u"], NOW_MS))[0].consents["ads"]
    assert await store.family("a") == await store.family("u") == Family("u", ["a"])


@pytest.mark.anyio
async def test_what_comes_for_the_anonymous_id_later_reaches_the_known_one(store: Store, direct: redis.Redis) -> None:
    await begin(store)
    await join(store)
    length = direct.strlen(store.keys("a")[0])
    late = History(event(NOW_MS - 9, 9), trait(NOW_MS - 1, 3))
    assert await store.append({"a": late, "other": late}, NOW_MS) == {}
    assert await store.append({"a": late}, NOW_MS) == {}
    assert await store.append_missing({"a": History(event(NOW_MS - 8, 8))}, NOW_MS) == 1
    assert await store.append_missing({"a": History(event(NOW_MS - 8, 8))}, NOW_MS) == 0
    await store.append_said({"a": statement(NOW_MS, {"crm": True}, False)}, NOW_MS)
    expected = event(NOW_MS - 9, 9) + event(NOW_MS - 8, 8) + TOGETHER.events
    assert await whole(store, "u") == History(expected, late.traits)
    assert direct.strlen(store.keys("a")[0]) == length
    assert (await Identities(store).read(["u"], NOW_MS))[0].consents["crm"]


@pytest.mark.anyio
async def test_who_is_joined_has_no_score_of_its_own_any_more(store: Store) -> None:
    scores = Propensities(store)
    await scores.put("shop", "1", ["anonymous", "ann", "other"], np.array([0.1, 0.2, 0.3], np.float32), NOW_MS)
    await store.join([("anonymous", Login(NOW_MS, "ann"))], NOW_MS)
    assert [one.visitor_id for one in await scores.top("shop", 9)] == ["other", "ann"]


@pytest.mark.anyio
async def test_a_folded_history_is_joined_with_its_traits(store: Store) -> None:
    await begin(store)
    await store.compact(store.keys("a"), NOW_MS)
    assert await join(store) == "joined"
    assert await whole(store, "u") == TOGETHER


@pytest.mark.anyio
async def test_who_was_never_seen_can_be_joined_and_into_whom_nobody_knows(store: Store) -> None:
    assert await join(store) == "joined"
    await store.append({"a": ANONYMOUS}, NOW_MS)
    assert (await whole(store, "u")).events == ANONYMOUS.events


@pytest.mark.anyio
async def test_on_a_shared_device_everybody_gets_what_came_after_their_login(store: Store) -> None:
    await begin(store)
    await join(store, "a", "u", NOW_MS)
    await join(store, "a", "v", NOW_MS + 100)
    late = event(NOW_MS - 90, 7) + event(NOW_MS + 50, 8) + event(NOW_MS + 150, 9)
    await store.append({"a": History(late, trait(NOW_MS + 150, 5))}, NOW_MS)
    assert (await whole(store, "u")).events == late[:24] + TOGETHER.events + late[24:48]
    assert await whole(store, "v") == await whole(store, "a") == History(late[48:], trait(NOW_MS + 150, 5))
    assert (await store.family("u"), await store.family("a")) == (Family("u", []), Family("v", ["a"]))
    # The first one leaves: the second keeps the device, and nothing tells of the first.
    assert await store.erase("u")
    await store.append({"a": History(event(NOW_MS + 20, 6))}, NOW_MS)
    assert await whole(store, "u") == History()
    assert (await whole(store, "v")).events == event(NOW_MS + 20, 6) + late[48:]


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["a", "b", "u"])
async def test_erasing_one_id_erases_the_person(store: Store, direct: redis.Redis, namespace: str, asked: str) -> None:
    await begin(store)
    await store.append({"other": KNOWN}, NOW_MS)
    await join(store, "a")
    await join(store, "b")
    refused = [Quarantined("type", "m", 1, [name], "{}") for name in ("a", "u", "other")]
    await store.quarantine(refused, 100)
    await store.log_scores([b'{"score_id":"1","visitor_id":"a","propensity":0.5}'], 100)
    assert await store.erase(asked)
    assert not await store.erase(asked)
    assert {key for key in direct.scan_iter(f"{namespace}:[etil]:*")} == {key.encode() for key in store.keys("other")}
    assert [item.visitor_ids for item in await store.quarantined()] == [("other",)]
    assert direct.xlen(f"{namespace}:scores") == 0
    assert await join(store) == "joined"
    assert await whole(store, "u") == History()


@pytest.mark.anyio
async def test_who_is_known_is_not_joined_into_another_and_chains_end_at_the_last(store: Store) -> None:
    await begin(store)
    await join(store, "a", "u")
    assert await join(store, "u", "w") == "refused"
    assert await store.family("w") == Family("w", [])
    # Who names the anonymous id as a user means whom it was joined into.
    assert await join(store, "b", "a") == "joined"
    assert await store.family("b") == Family("u", ["a", "b"])
    assert await join(store, "u", "a") == "known"


@pytest.mark.anyio
async def test_a_machine_on_which_everybody_logs_in_is_not_joined_without_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "MOST_JOINED", 3)
    outcomes = await store.join([(f"a-{place}", Login(place, "u")) for place in range(5)], NOW_MS)
    assert outcomes == ["joined"] * 3 + ["refused"] * 2
    assert (await store.family("a-4")).visitor_id == "a-4"


@pytest.mark.anyio
async def test_two_who_name_each_other_at_once_never_lead_in_a_circle(store: Store) -> None:
    for place in range(20):
        left, right = f"left-{place}", f"right-{place}"
        await store.append({left: ANONYMOUS, right: KNOWN}, NOW_MS)
        outcomes = await asyncio.gather(join(store, left, right), join(store, right, left))
        assert sorted(outcomes) in (["joined", "known"], ["joined", "refused"], ["refused", "refused"])
        families = {(await store.family(name)).visitor_id for name in (left, right)}
        if "joined" in outcomes:
            assert len(families) == 1
            assert await whole(store, left) == await whole(store, right) == TOGETHER
        else:
            assert await whole(store, left) == ANONYMOUS


@pytest.mark.anyio
async def test_many_at_once_join_the_same_and_nothing_is_lost(store: Store) -> None:
    async def visit(number: int) -> None:
        await store.append({"a": History(event(NOW_MS + number, number))}, NOW_MS)
        await join(store, "a", "u", NOW_MS)

    await asyncio.gather(*(visit(number) for number in range(1, 40)))
    assert (await whole(store, "u")).events == b"".join(event(NOW_MS + number, number) for number in range(1, 40))


@pytest.mark.anyio
async def test_many_who_log_in_on_one_device_at_once_share_its_events_out_and_none_counts_twice(store: Store) -> None:
    numbers = range(1, 21)

    async def visit(number: int) -> None:
        await store.append({"a": History(event(NOW_MS + number, number))}, NOW_MS)
        for _ in range(10):  # as who is answered 503 sends it again
            with contextlib.suppress(StoreError):
                await join(store, "a", f"u{number % 3}", NOW_MS + number)
                return

    await asyncio.gather(*map(visit, numbers))
    await store.settle("a", NOW_MS)
    kept = [(await whole(store, f"u{place}")).events for place in range(3)]
    assert sorted(int(one["id"]) for blob in kept for one in events.from_bytes(blob)) == list(numbers)


@pytest.mark.anyio
async def test_a_key_that_holds_something_else_refuses_the_join_and_loses_nothing(
    store: Store, direct: redis.Redis
) -> None:
    await begin(store)
    direct.lpush(store._said_key("b"), "x")
    direct.lpush(store._joined_key("w"), "x")
    direct.pexpire(store._said_key("b"), DAY_MS)
    direct.pexpire(store._joined_key("w"), DAY_MS)
    assert await join(store, "b", "u") == "refused"
    assert await join(store, "a", "w") == "refused"
    assert await whole(store, "a") == ANONYMOUS
    assert await store.family("w") == Family("w", [])
    # An owner that cannot take it leaves it where it is.
    await join(store)
    direct.delete(store.keys("u")[0])
    direct.lpush(store.keys("u")[0], "x")
    direct.pexpire(store.keys("u")[0], DAY_MS)
    await store.append({"a": ANONYMOUS}, NOW_MS)
    direct.delete(store.keys("u")[0])
    await store.settle("a", NOW_MS)
    assert (await whole(store, "u")).events == ANONYMOUS.events


@pytest.mark.anyio
async def test_compaction_settles_what_was_left_and_keeps_what_is_beside_a_visitor(
    store: Store, direct: redis.Redis
) -> None:
    await begin(store)
    await join(store)
    for key in store.keys("a"):
        direct.append(key, event(NOW_MS - 1, 5) if ":e:" in key else trait(NOW_MS - 1, 5))
    for key in (store._said_key("u"), store._joined_key("u")):
        direct.pexpire(key, HOUR_MS)
    await store.compact([key for name in ("a", "u") for key in store.keys(name)], NOW_MS)
    assert await whole(store, "u") == History(TOGETHER.events + event(NOW_MS - 1, 5), trait(NOW_MS - 1, 5))
    assert not (await store.said(["a"]))[0]
    assert min(direct.pttl(key) for key in (store._said_key("u"), store._joined_key("u"))) > 23 * HOUR_MS
    await store.compact(store.keys("a"), NOW_MS)
    assert await store.family("a") == Family("u", ["a"])


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
    await store.append({"a": History(event(NOW_MS - 1, 5), trait(NOW_MS - 1, 5))}, NOW_MS)
    await store.append_said({"u": statement(NOW_MS, {"crm": True}, True)}, NOW_MS)
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
        was_linked = (await other.family("a")).visitor_id == "u"
        if again == "the client" or not was_linked:
            await take(other)
        elif again == "compaction":
            await other.compact([key for name in ("a", "u") for key in other.keys(name)], NOW_MS)
        else:
            await other.append({"a": History(event(NOW_MS - 1, 5))}, NOW_MS)
        assert await whole(other, "u") == await whole(other, "a") == expected, (at, count())
        [known] = await Identities(other).read(["u"], NOW_MS)
        assert known.consents == {"ads": True, "crm": True, "email": False, "analytics": False}
        assert await other.family("u") == Family("u", ["a"])
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
        await store.quarantine([Quarantined("type", "m", 1, ["b"], "{}")], 100)
        other = Store.open(every_store_url, namespace=namespace, retention_ms=DAY_MS)
        killing(store, at, after=after)
        try:
            await store.erase(asked)
            is_killed = False
        except Killed:
            is_killed = True
        await other.erase(asked)
        assert list(direct.scan_iter(f"{namespace}:[etil]:*")) == [], at
        assert await other.quarantined() == []
        for opened in (store, other):
            await opened.close()
        if not is_killed:
            return
    raise AssertionError("it never ended")


@pytest.mark.anyio
async def test_a_server_that_is_gone_is_a_store_error() -> None:
    store = Store.open("redis://127.0.0.1:1", namespace="p", retention_ms=DAY_MS)
    for asking in (join(store), store.settle("a", NOW_MS), store.family("a"), store.append_said({"a": SAID}, NOW_MS)):
        with pytest.raises(StoreError):
            await asking
    await store.close()
