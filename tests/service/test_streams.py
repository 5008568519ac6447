"""Streams keep about as much as they are told to."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest
import redis

from service.store import Store
from service.streams import Quarantine, Quarantined

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


@pytest.fixture
async def store(every_store_url: str, direct: redis.Redis) -> AsyncIterator[Store]:
    """A feature cache, in which every key has an end when the test is over."""
    opened = Store.open(every_store_url, namespace=f"streams-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    yield opened
    await opened.close()
    assert [key for key in direct.scan_iter(f"{opened.namespace}:*") if direct.pttl(key) < 89 * DAY_MS] == []


async def test_the_quarantine_keeps_about_the_latest_events(store: Store) -> None:
    for place in range(10):
        await Quarantine(store).add([Quarantined("type", "m", place, [], str(n)) for n in range(100)], 200)
    kept = await Quarantine(store).latest(1000)
    assert 200 <= len(kept) <= 400
    assert kept[0].event == "99"
