"""Paging through everyone while scores change and members come and go, as `make bench-members` does with a million."""

from __future__ import annotations

import uuid

import pytest

from loadtest.bench_members import Walk, fill, split, walk, walk_in_turbulence
from service.members import Member
from service.shards import Page
from service.store import Store
from tests.conftest import DAY_MS, RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


async def test_nobody_who_stays_is_missed_and_nobody_is_on_two_pages(redis_server: RedisServer) -> None:
    store = Store.open(redis_server.url, namespace=f"walk-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    ids = [f"visitor-{place:05}" for place in range(20_000)]
    await fill(store, ids)
    waves: list[int] = []
    walks = await walk_in_turbulence(store, ids, lambda name, found, seconds, count: waves.append(count))
    await store.close()
    assert [(one.missing, one.twice) for one in walks] == [(0, 0), (0, 0)]
    assert min(one.found for one in walks) >= len(split(ids)[0]) == 16_000
    assert min(one.pages for one in walks) >= 20
    assert min(waves) >= 3


async def test_the_walk_sees_who_is_missing_and_who_comes_twice() -> None:
    """The proof can fail: pages by rank, which a score that changes moves on."""
    pages = {None: Page([Member("a", 1), Member("b", 1)], "1"), "1": Page([Member("b", 1), Member("d", 1)], None)}

    async def turn(cursor: str | None) -> Page[Member]:
        return pages[cursor]

    assert await walk(turn, {"a", "b", "c"}) == Walk(pages=2, found=4, missing=1, twice=1)
