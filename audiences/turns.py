"""One refresh at a time: two with different scores would each write its own differences into the same lists."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from service.core.errors import PropensityError
from service.errors import StoreError
from service.leases import lease
from service.lifecycle import cancel
from service.store import Store

_LEASE: Final = "refreshing"
# Reading and deciding keep the event loop for seconds; who was killed keeps others waiting for this long.
LEASE_S: Final = 30.0


class NotAlone(PropensityError):
    """Another refresh is at it."""


@asynccontextmanager
async def alone(store: Store, lease_s: float = LEASE_S) -> AsyncIterator[None]:
    """Hold the lease of refreshes. Raises NotAlone where another has it, now or, after a long silence, later."""
    own, body, lost = uuid.uuid4().hex, asyncio.current_task(), asyncio.Event()
    assert body is not None
    if not await lease(store, _LEASE, own, round(1000 * lease_s)):
        raise NotAlone(
            f"another refresh is running, or was killed less than {lease_s:g} s ago; run it again after that"
        )

    async def hold() -> None:
        while not lost.is_set():
            await asyncio.sleep(lease_s / 6)
            with suppress(StoreError):  # the refresh meets it too
                if not await lease(store, _LEASE, own, round(1000 * lease_s)):
                    lost.set()
                    body.cancel()

    holding = asyncio.create_task(hold())
    try:
        yield
    except asyncio.CancelledError:
        if not lost.is_set():
            raise
        body.uncancel()
        raise NotAlone("another refresh began, since this one was silent for too long; run it again") from None
    finally:
        await cancel(holding)
        if not lost.is_set():
            with suppress(StoreError):
                await lease(store, _LEASE, own, 1)
