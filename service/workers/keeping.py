"""Keeping: the propensity database forgets who was not scored for long, and says how much it has.

Once a minute every process counts visitors and members for its metrics, and takes into the journals what somebody who
was killed had left in an outbox. Once in a while one process of all that share the feature cache, who holds the lease,
looks at every visitor and drops the score and the segment of those who were not scored within the retention.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Final

from service import metrics
from service.errors import StoreError
from service.leases import lease
from service.members import Members
from service.propensities import Propensities
from service.scoring import unix_ms
from service.store import Store

logger = logging.getLogger(__name__)

BETWEEN_COUNTS_S: Final = 60.0
# A page of 200 visitors takes half a millisecond of the server: for a million visitors a pass is nine minutes.
PAUSE_S: Final = 0.1
BETWEEN_PASSES_MS: Final = 6 * 3_600_000

_LEASE: Final = "keeping"
_LEASE_MS: Final = 60_000
_RENEW_PAGES: Final = 100


async def count(propensities: Propensities, members: Members) -> None:
    """Bring the metrics up to date, and the journals."""
    for model in await propensities.models():
        metrics.set_ranked(model, await propensities.count(model))
        await propensities.journal(model).drain()
    audiences = await members.names()
    metrics.set_audiences({one.name: (one.size, one.described_ms) for one in audiences})
    for one in audiences:
        await members.journal(one.name).drain()


async def prune(store: Store, propensities: Propensities, owner: str, now_ms: int, pause_s: float = PAUSE_S) -> int:
    """Forget who was not scored within the retention, as long as `owner` has the lease. Returns how many there were."""
    pruned = number = 0
    for model in await propensities.models():
        async for dropped in propensities.prune(model, now_ms - store.retention_ms):
            pruned, number = pruned + dropped, number + 1
            if number % _RENEW_PAGES == 0 and not await lease(store, _LEASE, owner, _LEASE_MS):
                return pruned
            await asyncio.sleep(pause_s)
    return pruned


async def run(store: Store, propensities: Propensities, members: Members, now_ms: Callable[[], int] = unix_ms) -> None:
    """Do so for ever."""
    pruning: asyncio.Task[None] | None = None
    try:
        while True:
            if pruning is None or pruning.done():
                pruning = asyncio.create_task(_prune_in_turn(store, propensities, now_ms))
            try:
                await count(propensities, members)
            except StoreError as error:
                logger.debug("keeping waits for the feature cache: %s", error)
            await asyncio.sleep(BETWEEN_COUNTS_S)
    finally:
        if pruning is not None:
            pruning.cancel()
            await asyncio.wait([pruning])


async def _prune_in_turn(store: Store, propensities: Propensities, now_ms: Callable[[], int]) -> None:
    """Prune, if it is this process's turn."""
    owner = uuid.uuid4().hex  # of one pass, see `service.workers.compaction`
    try:
        if await lease(store, _LEASE, owner, _LEASE_MS):
            pruned = await prune(store, propensities, owner, now_ms())
            await lease(store, _LEASE, owner, BETWEEN_PASSES_MS)
            if pruned:
                logger.info("the propensity database forgot %d visitors who were not scored for long", pruned)
    except StoreError as error:
        logger.debug("pruning waits for the feature cache: %s", error)
