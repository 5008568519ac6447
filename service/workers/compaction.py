"""Compaction: visitors at rest are stored anew in as little memory as they need, slowly and in the background.

Redis takes memory in advance for values that grow, and a second key costs as much as several events. Pass after pass
every visitor is looked at, by one process of all that share the feature cache: who holds the lease. Where a pass was
cut off the next process goes on. A visitor is replaced by one atomic step that keeps what was appended meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final, NamedTuple

from service import history, joining, values
from service.core.events import RECORD_BYTES
from service.errors import StoreError
from service.history import MOST_EVENTS
from service.keys import beside, visitor_of
from service.leases import lease
from service.location import Address
from service.scoring import unix_ms
from service.servers import granted
from service.store import Store
from service.values import Change
from service.visitors import Visitors

logger = logging.getLogger(__name__)

# A page takes about a millisecond, which is how long a score may have to wait for it. With the pause a pass takes an
# hour for a million visitors, and 1 to 3 % of a core.
PAGE: Final = 25
PAUSE_S: Final = 0.1
# Who is still about gets more events soon.
REST_MS: Final = 30 * 60_000
# From the end of a pass to the next one.
BETWEEN_PASSES_MS: Final = 3_600_000

_LEASE: Final = "compaction"
_LEASE_MS: Final = 60_000
_RENEW_PAGES: Final = 100
_MARK: Final = "compaction:mark"
_MARK_MS: Final = 24 * 3_600_000
_RETRY_S: Final = 10.0

# What a value takes of memory, its length, whether the visitor's other value exists, and for how long it is kept. What
# the visitor said, and who is joined into it, is kept no shorter.
_WEIGH: Final = """
local life = redis.call('PTTL', KEYS[1])
for place = 3, 4 do
  local left = redis.call('PTTL', KEYS[place])
  if left >= 0 and left < life then redis.call('PEXPIRE', KEYS[place], life) end
end
local taken = redis.call('MEMORY', 'USAGE', KEYS[1]) or 0
return {taken, redis.call('STRLEN', KEYS[1]), redis.call('EXISTS', KEYS[2]), life}
"""


class Page(NamedTuple):
    """What became of some keys: how many were looked at, how many visitors stored anew, and where the next ones are."""

    looked_at: int
    stored_anew: int
    address: Address
    cursor: int


class Compactor:
    """Stores the visitors of a feature cache anew, in one piece and under one key."""

    def __init__(self, store: Store) -> None:
        self._store, self._visitors = store, Visitors(store)
        # What a value stored in one piece takes beyond `fresh_bytes` on this server; seen when values are stored anew.
        self._excess = 0

    async def pages(self, count: int, rest_ms: int, now_ms: Callable[[], int], mark: str = "") -> AsyncIterator[Page]:
        """Compact every visitor, about `count` keys at a time, from the mark of an earlier page on.

        Raises StoreError where a server is lost, after the visitors of the others.
        """
        addresses = sorted(await self._store.addresses())
        begun, cursor = _place(mark)
        lost: StoreError | None = None
        for address in addresses[addresses.index(begun) :] if begun in addresses else addresses:
            cursor, is_over = cursor if address == begun else 0, False
            while not is_over:
                try:
                    cursor, keys = await self.scan(address, cursor, count)
                    page = Page(len(keys), await self.compact(keys, now_ms(), rest_ms), address, cursor)
                except StoreError as error:
                    lost = error
                    break
                is_over = cursor == 0
                yield page
        if lost is not None:
            raise lost

    async def scan(self, address: Address, cursor: int, count: int) -> tuple[int, list[str]]:
        """About `count` keys of visitors on one server from a cursor on, 0 at first; and the next one, 0 at the end."""
        words = ("SCAN", cursor, "MATCH", f"{self._store.namespace}:[et]:{{*}}", "COUNT", count, "TYPE", "string")
        (reply,) = await self._store.run_on(address, words)
        following, keys = granted(reply)
        return int(following), [key.decode() for key in keys if key.isascii()]

    async def compact(self, keys: Sequence[str], now_ms: int, rest_ms: int = 0) -> int:
        """Compact the visitors among `keys` that take more memory than they must.

        Left alone is who was written to in the last `rest_ms`. Records that are broken, doubled or beyond the bound
        go; what is appended meanwhile stays. Returns how many visitors were stored anew.
        """
        changes = await self._changes(await self._loose(keys, rest_ms), now_ms)
        replies = await self._store.attempt(*map(values.replacement, changes))
        done = [
            (first.key, *reply)
            for (first, *_), reply in zip(changes, replies, strict=True)
            if isinstance(reply, list) and reply
        ]
        for key, taken, size in done:
            self._excess = max(self._excess, taken - history.fresh_bytes(key, size))
        return len(done)

    async def _changes(self, loose: Mapping[tuple[str, str], bool], now_ms: int) -> list[list[Change]]:
        """What to store anew of each visitor; who was joined into another is settled meanwhile."""
        changes: list[list[Change]] = []
        stored = await self._store.attempt(*(("MGET", *pair) for pair in loose))
        for (pair, is_spacious), found in zip(loose.items(), stored, strict=True):
            known = [value or b"" for value in found] if isinstance(found, list) else []
            if any(map(joining.is_linked, known)):
                await self._visitors.settle(visitor_of(self._store.namespace, pair[0]), now_ms)
            elif any(known):
                kept = history.fold(known[0], known[1], now_ms)
                if is_spacious or kept != tuple(known):
                    changes.append([Change(*change) for change in zip(pair, known, kept, strict=True) if change[1]])
        return changes

    async def _loose(self, keys: Sequence[str], rest_ms: int) -> dict[tuple[str, str], bool]:
        """Both keys of each visitor at rest that may be worth storing anew; True where that spares memory for sure."""
        families = [beside(self._store.namespace, key) for key in keys]
        asked = [
            ("EVAL", _WEIGH, 4, key, one.traits if key == one.events else one.events, one.said, one.joined)
            for key, one in zip(keys, families, strict=True)
        ]
        loose: dict[tuple[str, str], bool] = {}
        for key, one, reply in zip(keys, families, await self._store.attempt(*asked), strict=True):
            if isinstance(reply, list):
                taken, size, others, life_ms = reply
                pair = one.events, one.traits
                spare = taken - history.fresh_bytes(key, size) - self._excess
                is_spacious = others > 0 or spare > max(16, size // 16)
                is_busy = 0 <= self._store.retention_ms - life_ms < rest_ms
                if not is_busy and (is_spacious or size % RECORD_BYTES or size > MOST_EVENTS * RECORD_BYTES):
                    loose[pair] = loose.get(pair, False) or is_spacious
        return loose


def _place(mark: str) -> tuple[Address | None, int]:
    if not mark:
        return None, 0
    host, port, cursor = mark.split(" ")
    return (host, int(port)), int(cursor)


async def run(store: Store, now_ms: Callable[[], int] = unix_ms) -> None:
    """Compact visitors at rest, pass after pass, as long as this process has the lease. Never returns."""
    compactor = Compactor(store)
    while True:
        owner = uuid.uuid4().hex  # of one pass: after it the lease is nobody's, not even this process's
        try:
            if await lease(store, _LEASE, owner, _LEASE_MS):
                await _pass(store, compactor, owner, now_ms)
        except StoreError as error:
            logger.debug("compaction waits for the feature cache: %s", error)
        await asyncio.sleep(_RETRY_S)


async def _pass(store: Store, compactor: Compactor, owner: str, now_ms: Callable[[], int]) -> None:
    """One pass, from where the last one was cut off; afterwards the lease keeps everybody from the next one."""
    looked_at = stored_anew = number = 0
    mark_key = f"{store.namespace}:{_MARK}"
    (mark,) = await store.run(("GET", mark_key))
    async for page in compactor.pages(PAGE, REST_MS, now_ms, (mark or b"").decode()):
        looked_at, stored_anew, number = looked_at + page.looked_at, stored_anew + page.stored_anew, number + 1
        if number % _RENEW_PAGES == 0:
            host, port = page.address
            await store.run(("SET", mark_key, f"{host} {port} {page.cursor}", "PX", _MARK_MS))
            if not await lease(store, _LEASE, owner, _LEASE_MS):
                return
        await asyncio.sleep(PAUSE_S)
    await store.run(("DEL", mark_key))
    await lease(store, _LEASE, owner, BETWEEN_PASSES_MS)
    logger.info("compaction looked at %d keys and stored %d visitors anew", looked_at, stored_anew)
