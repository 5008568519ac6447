"""Keeping: metrics of the propensity database, what was left in outboxes, and who was not scored for long."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from service import metrics
from service.leases import lease
from service.members import Members
from service.persons import Persons
from service.propensities import Propensities
from service.store import Store
from service.workers import keeping
from tests.conftest import DAY_MS, RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

NOW_MS = 1_767_225_600_000


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    found = Store.open(redis_server.url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=30 * DAY_MS)
    yield found
    await found.close()


async def test_the_metrics_say_how_many_there_are(store: Store) -> None:
    propensities, members = Propensities(store), Members(store)
    await propensities.put("counted", "1", ["a", "b"], [0.5, 0.25], NOW_MS)
    await members.describe("kept", "{}", NOW_MS)
    await members.change("kept", {"a": 1}, [], NOW_MS, "score")
    await members.change("dropped", {"a": 1}, [], NOW_MS, "score")
    await keeping.count(propensities, members)
    assert metrics.RANKED_VISITORS.labels("counted")._value.get() == 2
    assert metrics.AUDIENCE_MEMBERS.labels("kept")._value.get() == 1
    assert metrics.AUDIENCE_DESCRIBED.labels("kept")._value.get() == NOW_MS / 1000
    await members.drop("dropped")
    await keeping.count(propensities, members)
    assert metrics.AUDIENCE_MEMBERS.labels("dropped")._value.get() == 0


async def test_changes_of_one_who_was_killed_get_into_the_journal(store: Store) -> None:
    members = Members(store)
    await members.describe("best", "{}", NOW_MS)
    outbox, counter = members.journal("best").outbox(3)
    await store.run(("RPUSH", outbox, f"7 {NOW_MS} 1 score a"), ("SET", counter, 7))
    await keeping.count(Propensities(store), members)
    assert [one.visitor_id for one in (await members.changes("best", "", 5)).items] == ["a"]


async def test_only_who_has_the_lease_prunes(store: Store) -> None:
    propensities = Propensities(store)
    await propensities.put("shop", "1", ["old", "new"], [0.5, 0.5], [NOW_MS - 31 * DAY_MS, NOW_MS])
    assert await lease(store, "keeping", "another", 60_000)
    task = asyncio.create_task(keeping.run(store, propensities, Members(store), lambda: NOW_MS))
    await asyncio.sleep(0.3)
    assert await propensities.count("shop") == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await keeping.prune(store, propensities, "another", NOW_MS, 0) == 1
    assert await propensities.of("shop", ["old", "new"]) == [None, 0.5]


async def test_every_key_lives_no_longer_than_the_retention(store: Store) -> None:
    propensities, members = Propensities(store), Members(store)
    await propensities.put("shop", "1", ["a", "b"], [0.5, 0.25], NOW_MS)
    await propensities.move("shop", {"a": "champions"}, NOW_MS)
    await members.describe("best", "{}", NOW_MS)
    await members.change("best", {"a": 1, "b": 1}, [], NOW_MS, "score")
    await Persons(store).erase("b")
    (keys,) = await store.run(("KEYS", f"{store.namespace}:*"))
    lives = await store.run(*(("PTTL", key) for key in keys))
    assert len(keys) >= 12
    assert {key: life for key, life in zip(keys, lives, strict=True) if not 0 < life <= 30 * DAY_MS} == {}
