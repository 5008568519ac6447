"""Compaction: visitors at rest are stored anew in as little memory as they need, slowly and in the background.

Redis takes memory in advance for values that grow, and a second key costs as much as several events. Pass after pass
every visitor is looked at, by one process of all that share the feature cache: who holds the lease. Where a pass was
cut off the next process goes on. A visitor is replaced by one atomic step that keeps what was appended meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple

from service.errors import StoreError
from service.location import Address
from service.scoring import unix_ms
from service.store import Store

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


class Page(NamedTuple):
    """What became of some keys: how many were looked at, how many visitors stored anew, and where the next ones are."""

    looked_at: int
    stored_anew: int
    address: Address
    cursor: int


async def pages(
    store: Store, count: int, rest_ms: int, now_ms: Callable[[], int], mark: str = ""
) -> AsyncIterator[Page]:
    """Compact every visitor, about `count` keys at a time, from the mark of an earlier page on.

    Raises StoreError where a server is lost, after the visitors of the others.
    """
    addresses = sorted(await store.addresses())
    begun, cursor = _place(mark)
    lost: StoreError | None = None
    for address in addresses[addresses.index(begun) :] if begun in addresses else addresses:
        cursor, is_over = cursor if address == begun else 0, False
        while not is_over:
            try:
                cursor, keys = await store.scan(address, cursor, count)
                page = Page(len(keys), await store.compact(keys, now_ms(), rest_ms), address, cursor)
            except StoreError as error:
                lost = error
                break
            is_over = cursor == 0
            yield page
    if lost is not None:
        raise lost


def _place(mark: str) -> tuple[Address | None, int]:
    if not mark:
        return None, 0
    host, port, cursor = mark.split(" ")
    return (host, int(port)), int(cursor)


async def run(store: Store, now_ms: Callable[[], int] = unix_ms) -> None:
    """Compact visitors at rest, pass after pass, as long as this process has the lease. Never returns."""
    while True:
        owner = uuid.uuid4().hex  # of one pass: after it the lease is nobody's, not even this process's
        try:
            if await store.lease(_LEASE, owner, _LEASE_MS):
                await _pass(store, owner, now_ms)
        except StoreError as error:
            logger.debug("compaction waits for the feature cache: %s", error)
        await asyncio.sleep(_RETRY_S)


async def _pass(store: Store, owner: str, now_ms: Callable[[], int]) -> None:
    """One pass, from where the last one was cut off; afterwards the lease keeps everybody from the next one."""
    looked_at = stored_anew = number = 0
    async for page in pages(store, PAGE, REST_MS, now_ms, await store.noted(_MARK)):
        looked_at, stored_anew, number = looked_at + page.looked_at, stored_anew + page.stored_anew, number + 1
        if number % _RENEW_PAGES == 0:
            host, port = page.address
            await store.note(_MARK, f"{host} {port} {page.cursor}", _MARK_MS)
            if not await store.lease(_LEASE, owner, _LEASE_MS):
                return
        await asyncio.sleep(PAUSE_S)
    await store.note(_MARK, "", 1)
    await store.lease(_LEASE, owner, BETWEEN_PASSES_MS)
    logger.info("compaction looked at %d keys and stored %d visitors anew", looked_at, stored_anew)
