"""Erasures: who asked to be forgotten, so that what was computed before does not bring them back.

A batch of scores from yesterday still has a visitor who was erased today, and a worker may hold a score that it has not
written yet. Both are asked about here before they are written. Who comes back with new events is a visitor again.

Key: `NS:erased`, a sorted set of `key_of` the visitors by the moment, in milliseconds. It holds no ids, and forgets
after the retention.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

from service.servers import Command
from service.shards import Cache, slices, tag_of, text_of

_ASKED: Final = 1000


def key_of(visitor_id: str) -> str:
    """What a visitor is known by where the id must not be: 64 hex digits of the SHA-256 of its UTF-8."""
    return hashlib.sha256(visitor_id.encode("utf-8", "surrogatepass")).hexdigest()


class Erasures:
    """Who was erased and has not come back.

    An erasure deletes what is known of the visitor alone, notes it here, and then takes the visitor out of all sets, in
    this order. So whoever writes in between sees the note, before writing or after.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def note(self, visitor_id: str) -> None:
        """Remember that a visitor was erased."""
        now_ms, life_ms = time.time_ns() // 1_000_000, self._cache.retention_ms
        await self._cache.run(
            ("ZADD", self._key, now_ms, key_of(visitor_id)),
            ("ZREMRANGEBYSCORE", self._key, "-inf", now_ms - life_ms),
            ("PEXPIRE", self._key, life_ms),
        )

    @asynccontextmanager
    async def writing(
        self, visitor_ids: Sequence[str], forget: Callable[[Sequence[str]], Awaitable[object]]
    ) -> AsyncIterator[Collection[str]]:
        """Who of those that are about to be written must not be; who is erased meanwhile is forgotten afterwards."""
        before = await self._state()
        erased = await self._among(visitor_ids) if before[0] else frozenset()
        yield erased
        if await self._state() != before:
            late = await self._among(visitor_ids) - erased
            if late:
                await forget(sorted(late))

    @asynccontextmanager
    async def writing_tags(
        self, tags: Sequence[str], forget: Callable[[Sequence[str]], Awaitable[object]]
    ) -> AsyncIterator[Collection[str]]:
        """The same for visitors by their tags; which visitors they are is asked only where somebody was erased."""
        before = await self._state()
        erased = await self._among(list(map(text_of, tags))) if before[0] else frozenset()
        yield list(map(tag_of, erased))
        if await self._state() != before:
            late = await self._among(list(map(text_of, tags))) - erased
            if late:
                await forget(sorted(late))

    async def among(self, visitor_ids: Sequence[str]) -> Collection[str]:
        """Who of the visitors is one of them."""
        return await self._among(visitor_ids) if (await self._state())[0] else frozenset()

    async def noted(self, keys: Sequence[str]) -> frozenset[str]:
        """Those of the keys whose visitors were erased within the retention, come back or not."""
        found: set[str] = set()
        for some in slices(keys, _ASKED):
            (moments,) = await self._cache.run(("ZMSCORE", self._key, *some))
            found |= {key for key, at_ms in zip(some, moments, strict=True) if at_ms is not None}
        return frozenset(found)

    async def _state(self) -> tuple[int, list[bytes]]:
        """Something that is another after each erasure."""
        count, latest = await self._cache.run(("ZCARD", self._key), ("ZRANGE", self._key, -1, -1, "WITHSCORES"))
        return count, latest

    async def _among(self, visitor_ids: Sequence[str]) -> frozenset[str]:
        """Those who were erased, and of whom nothing has come since."""
        erased: list[str] = []
        for some in slices(visitor_ids, _ASKED):
            (moments,) = await self._cache.run(("ZMSCORE", self._key, *map(key_of, some)))
            erased += [visitor_id for visitor_id, at_ms in zip(some, moments, strict=True) if at_ms is not None]
        words: list[Command] = [("EXISTS", key) for visitor_id in erased for key in self._cache.keys(visitor_id)[:2]]
        known = await self._cache.run(*words) if words else []
        return frozenset(
            visitor_id for visitor_id, *exist in zip(erased, known[::2], known[1::2], strict=True) if not any(exist)
        )

    @property
    def _key(self) -> str:
        return f"{self._cache.namespace}:erased"
