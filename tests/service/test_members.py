"""Members of audiences, against a plain dictionary and over real servers, also where a change is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.core import events
from service.erasures import key_of
from service.errors import CursorGone, InvalidCursor
from service.history import History
from service.members import ERASED, Change, Member, Members, TooManyAudiences
from service.persons import Persons
from service.servers import Command
from service.store import Store
from service.visitors import Visitors
from tests.conftest import RedisServer

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000
STRANGE = ["a", "a b", "ab", "a!", "a-", "{x}", "é", "\ud800", "=1+1", "a\nb", "A", "x" * 256, "%20", "0.5"]


@pytest.fixture
async def store(every_store_url: str) -> AsyncIterator[Store]:
    """A store of its own over each feature cache."""
    found = Store.open(every_store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    yield found
    await found.close()


async def members_of(members: Members, audience: str, n: int = 7) -> dict[str, int]:
    """All members, page by page; fails if one comes twice."""
    found: list[Member] = []
    cursor = None
    while True:
        page = await members.page(audience, cursor, n)
        assert len(page.items) <= n
        found += page.items
        cursor = page.cursor
        if cursor is None:
            assert len({one.visitor_id for one in found}) == len(found)
            return {one.visitor_id: one.entered_ms for one in found}


async def changes_of(members: Members, audience: str, since: str = "", n: int = 5) -> list[Change]:
    """All changes after a cursor, page by page."""
    found: list[Change] = []
    while True:
        page = await members.changes(audience, since, n)
        found += page.items
        if not page.items:
            return found
        since = page.items[-1].cursor


async def test_who_enters_is_a_member_until_leaving(store: Store) -> None:
    members = Members(store)
    entered = {visitor_id: NOW_MS + place for place, visitor_id in enumerate(STRANGE)}
    await members.change("best", entered, [], NOW_MS, "score above 0.2")
    assert await members_of(members, "best") == entered
    assert await members.size("best") == len(STRANGE)
    assert await members.has("best", [*STRANGE, "nobody", "a "]) == [*entered.values(), 0, 0]
    await members.change("best", {}, STRANGE[:3], NOW_MS + 9, "score")
    assert await members_of(members, "best") == {name: entered[name] for name in STRANGE[3:]}
    told = await changes_of(members, "best")
    assert {(one.visitor_id, one.entered, one.at_ms, one.why) for one in told} == {
        *((name, True, NOW_MS, "score above 0.2") for name in STRANGE),
        *((name, False, NOW_MS + 9, "score") for name in STRANGE[:3]),
    }
    numbers = [int(one.cursor) for one in told]
    assert numbers == list(range(numbers[0], numbers[0] + len(told)))


async def test_a_change_made_twice_is_told_once(store: Store) -> None:
    members = Members(store)
    for _ in range(2):
        await members.change("best", {"a": 1, "b": 2}, ["c"], NOW_MS, "first")
    for _ in range(2):
        await members.change("best", {"b": 3}, ["a"], NOW_MS + 1, "second")
    assert await members_of(members, "best") == {"b": 2}
    told = [(one.visitor_id, one.entered) for one in await changes_of(members, "best")]
    assert sorted(told[:2]) == [("a", True), ("b", True)]
    assert told[2:] == [("a", False)]


async def test_erasing_leaves_one_change_without_the_id(store: Store) -> None:
    members = Members(store)
    await members.change("best", {"gone": 1, "stays": 2}, [], NOW_MS, "score")
    await members.change("best", {}, ["gone"], NOW_MS, "score")
    await members.change("best", {"gone": 3}, [], NOW_MS, "score")
    assert await Persons(store).erase("gone")
    assert not await Persons(store).erase("gone")
    assert await members_of(members, "best") == {"stays": 2}
    told = [(one.visitor_id, one.entered, one.why) for one in await changes_of(members, "best", n=1)]
    assert told == [("stays", True, "score"), (key_of("gone"), False, ERASED)]


async def test_old_changes_go_and_a_reader_of_them_hears_of_it(store: Store) -> None:
    members = Members(store, kept_changes=300)
    await members.change("best", {"first": 1}, [], NOW_MS, "score")
    [first] = await changes_of(members, "best")
    await members.change("best", {f"v{place}": 1 for place in range(1000)}, [], NOW_MS, "score")
    kept = await changes_of(members, "best", n=100)
    assert 300 <= len(kept) < 300 + 128
    with pytest.raises(CursorGone):
        await members.changes("best", first.cursor, 10)
    assert await changes_of(members, "best", kept[-1].cursor) == []
    for wrong in ("x", "-1", "9" * 16, "1.5", "9" * 30):
        with pytest.raises(InvalidCursor):
            await members.changes("best", wrong, 10)


async def test_audiences_are_listed_with_what_is_known_of_them(store: Store) -> None:
    members = Members(store)
    assert await members.names() == []
    await members.describe("best", '{"top": 5}', NOW_MS)
    await members.change("best", {"a": 1}, [], NOW_MS + 5, "score")
    await members.change("other", {"a": 1}, [], NOW_MS + 5, "score")
    [best, other] = await members.names()
    assert best[:5] == ("best", 1, NOW_MS + 5, NOW_MS, '{"top": 5}')
    assert best.cursor == (await changes_of(members, "best"))[-1].cursor
    assert other[:5] == ("other", 1, NOW_MS + 5, 0, "")
    await members.drop("best")
    assert [one.name for one in await members.names()] == ["other"]
    assert await members_of(members, "best") == {}
    assert await changes_of(members, "best") == []


async def test_an_audience_that_is_listed_while_it_begins_stays_known(store: Store) -> None:
    members = Members(store)
    await members._register("best")
    assert await members.names() == []
    await store.run(("HSET", members.journal("best").known_key, "described_ms", NOW_MS))
    assert [one.name for one in await members.names()] == ["best"]


async def test_names_of_audiences_that_are_gone_leave_their_place_to_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.members.MOST_AUDIENCES", 2)
    members = Members(store)
    await members.describe("kept", "{}", NOW_MS)
    await members._register("gone")
    await members.describe("new", "{}", NOW_MS)
    assert [one.name for one in await members.names()] == ["kept", "new"]
    with pytest.raises(TooManyAudiences):
        await members.describe("another", "{}", NOW_MS)


async def test_a_page_that_is_shorter_by_who_was_erased_is_not_taken_for_the_last(store: Store) -> None:
    members = Members(store)
    for place, name in enumerate(("a", "gone", "b", "c")):
        await members.change("best", {name: 1}, [], NOW_MS + place, "score")
    await members.forget(["gone"])
    page = await members.changes("best", "", 2)
    assert ([one.visitor_id for one in page.items], page.cursor) == (["a"], page.items[-1].cursor)
    page = await members.changes("best", page.cursor or "", 3)
    assert [one.visitor_id for one in page.items] == ["b", "c"]
    page = await members.changes("best", page.cursor or "", 3)
    assert ([one.why for one in page.items], page.cursor) == ([ERASED], None)


async def test_who_was_erased_does_not_enter_again_before_coming_back(store: Store) -> None:
    members = Members(store)
    await Visitors(store).append({"gone": History(events.pack(NOW_MS, 1, 1, 1, 1.0)), "stays": History()}, NOW_MS)
    await members.change("best", {"gone": 1, "stays": 2}, [], NOW_MS, "score")
    await Persons(store).erase("gone")
    await members.change("best", {"gone": 1, "stays": 2}, [], NOW_MS, "score")
    assert await members_of(members, "best") == {"stays": 2}
    await Visitors(store).append({"gone": History(events.pack(NOW_MS + 1, 1, 1, 1, 1.0))}, NOW_MS + 1)
    await members.change("best", {"gone": 3}, [], NOW_MS, "score")
    assert await members_of(members, "best") == {"stays": 2, "gone": 3}


class CutOff(Exception):
    """The process was killed here."""


class Cut:
    """A feature cache that fails after so many round trips, as if the caller had been killed."""

    def __init__(self, store: Store, trips: int) -> None:
        self._store, self.left = store, trips

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def run(self, *commands: Command) -> list[Any]:
        self.left -= 1
        if self.left < 0:
            raise CutOff
        # Half of what is sent in one go arrives, too.
        if self.left == 0:
            await self._store.run(*commands[: len(commands) // 2 + 1])
            raise CutOff
        return await self._store.run(*commands)


@pytest.mark.parametrize("trips", range(1, 16))
async def test_a_change_that_was_cut_off_and_made_again_ends_as_one_that_was_not(
    redis_server: RedisServer, trips: int
) -> None:
    store = Store.open(redis_server.url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    before = {f"v{place}": place for place in range(300)}
    entered = {f"v{place}": place for place in range(200, 900)}
    left = [f"v{place}" for place in range(150)]
    members = Members(store)
    await members.change("best", before, [], NOW_MS, "before")
    with contextlib.suppress(CutOff):
        await Members(cast(Store, Cut(store, trips))).change("best", entered, left, NOW_MS + 1, "score")
    await members.change("best", entered, left, NOW_MS + 1, "score")
    assert await members_of(members, "best", 100) == {
        name: ms for name, ms in {**entered, **before}.items() if name not in left
    }
    told = [(one.visitor_id, one.entered) for one in await changes_of(members, "best", n=500)]
    assert sorted(told[:300]) == sorted((name, True) for name in before)
    assert sorted(told[300:]) == sorted(
        [(name, True) for name in entered if name not in before] + [(name, False) for name in left]
    )
    await store.close()


async def test_two_that_change_and_drain_at_once_lose_and_double_nothing(redis_server: RedisServer) -> None:
    store = Store.open(redis_server.url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    members = Members(store)
    names = [f"v{place}" for place in range(400)]

    async def enter_and_leave(some: list[str]) -> None:
        for at_ms in range(NOW_MS, NOW_MS + 6):
            await members.change("best", dict.fromkeys(some, at_ms) if at_ms % 2 == 0 else {}, some, at_ms, "score")

    await asyncio.gather(
        *(enter_and_leave(names[first::4]) for first in range(4)), *(members.journal("best").drain() for _ in range(20))
    )
    state: dict[str, bool] = {}
    told = await changes_of(members, "best", n=1000)
    for one in told:
        assert state.get(one.visitor_id, False) != one.entered
        state[one.visitor_id] = one.entered
    assert not any(state.values())
    assert set(state) == set(names)
    assert await members.size("best") == 0
    await store.close()


actions = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from(STRANGE[:6]), st.integers(1, 99)),
    st.tuples(st.just("leave"), st.sampled_from(STRANGE[:6]), st.just(0)),
    st.tuples(st.just("erase"), st.sampled_from(STRANGE[:6]), st.just(0)),
)


@given(st.lists(st.tuples(actions, st.integers(1, 3)), max_size=12))
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_members_are_those_of_a_dictionary_and_changes_lead_there(
    redis_server: RedisServer, steps: list[tuple[tuple[str, str, int], int]]
) -> None:
    async def run() -> None:
        store = Store.open(redis_server.url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
        members, wanted = Members(store), dict[str, int]()
        for (what, visitor_id, since_ms), times in steps:
            for _ in range(times):
                if what == "erase":
                    await members.forget([visitor_id])
                else:
                    entered = {visitor_id: since_ms} if what == "enter" else {}
                    await members.change("best", entered, [] if entered else [visitor_id], NOW_MS, what)
            if what == "enter":
                wanted.setdefault(visitor_id, since_ms)
            else:
                wanted.pop(visitor_id, None)
        assert await members_of(members, "best", 2) == wanted
        followed: set[str] = set()
        for one in await changes_of(members, "best", n=2):
            (followed.add if one.entered else followed.discard)(one.visitor_id)
        assert followed == set(wanted)
        await store.close()

    asyncio.run(run())
