"""One refresh at a time, over the real feature caches."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from audiences.turns import NotAlone, alone
from service.store import Store

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = Store.open(store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=86_400_000)
    yield opened
    await opened.close()


async def test_while_one_refreshes_another_is_refused_and_afterwards_it_is_not(store: Store) -> None:
    async with alone(store, lease_s=0.3):
        await asyncio.sleep(0.5)  # it is held for longer than it was given
        with pytest.raises(NotAlone, match="another refresh is running"):
            async with alone(store):
                pytest.fail("two refresh at once")
    await asyncio.sleep(0.01)
    async with alone(store):
        pass


async def test_one_that_was_silent_until_another_began_ends(store: Store) -> None:
    with pytest.raises(NotAlone, match="this one was silent for too long"):
        async with alone(store, lease_s=0.3):
            await store.run(("SET", f"{store.namespace}:refreshing", "another", "PX", 10_000))
            await asyncio.sleep(5)


async def test_what_goes_wrong_in_a_refresh_is_told_as_it_is(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        async with alone(store):
            raise ZeroDivisionError
    await asyncio.sleep(0.01)
    async with alone(store):
        pass
