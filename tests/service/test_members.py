"""Members of audiences, against a plain dictionary and over real servers, also where a change is cut off."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from service.errors import CursorGone, InvalidCursor
from service.members import ERASED, Change, Member, Members, key_of
from service.store import Store

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
    assert await store.erase("gone")
    assert not await store.erase("gone")
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
