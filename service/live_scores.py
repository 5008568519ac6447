"""Live scores on their way into the propensity database: held for a moment, then written together.

Nobody waits for it. Of a visitor who is scored again meanwhile the latest score is written; what does not fit while the
feature cache is away or slow is dropped and counted. Held is what the production model said of a visitor with events:
no score that was degraded, nor one of features that a request made up, nor one of somebody of whom nothing is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Final

from service import metrics
from service.core.bundle import Bundle
from service.errors import StoreError
from service.lifecycle import cancel
from service.propensities import Propensities
from service.scoring import Batch, Score, ScoreFailure
from service.shards import SHARDS, shard_of, tag_of

# The longer, the more visitors share a round trip, and the fewer are written twice.
_PAUSE_S: Final = 1.0
# Shards that are written at once; while they are, a request waits for half a millisecond or so.
_AT_ONCE: Final = 2
# Pauses last so many times as long as the writes before them, which then take one part in twenty of a core that service
# and feature cache share. Without pauses 16,000 visitors a second took a fifth of the scores.
_PAUSES: Final = 19

_Shard = dict[str, tuple[float, int]]


class LiveScores:
    """Holds the scores of up to `buffer` visitors, 0 for none at all."""

    def __init__(self, propensities: Propensities, *, buffer: int) -> None:
        self._propensities, self._buffer = propensities, buffer
        self._held: dict[tuple[str, str], list[_Shard]] = {}
        self.held = 0  # of how many visitors
        self._some = asyncio.Event()
        self._writing = asyncio.create_task(self._write_on()) if buffer else None

    def add(self, bundle: Bundle, batch: Batch, answers: Sequence[Score | ScoreFailure]) -> None:
        """Take the scores of a batch."""
        if self._writing is None or batch.degraded:
            return
        model = bundle.name, bundle.version
        shards = self._held.get(model) or self._held.setdefault(model, [{} for _ in range(SHARDS)])
        at_ms = batch.now_ms
        names = batch.owners or [request.visitor_id for request in batch.requests]
        for name, request, answer in zip(names, batch.requests, answers, strict=True):
            if type(answer) is not Score or answer.propensity is None or not answer.events or request.features:
                continue
            if not 0 <= answer.propensity <= 1:  # NaN of a broken model; the writing of all others would end with it
                metrics.live_scores("dropped").add(1)
                continue
            tag = tag_of(name)
            held = shards[shard_of(tag)]
            if tag not in held:
                if self.held >= self._buffer:
                    metrics.live_scores("dropped").add(1)
                    continue
                self.held += 1
            held[tag] = answer.propensity, at_ms
        if self.held:
            self._some.set()

    async def close(self) -> None:
        """Write what is held, if the feature cache takes it."""
        if self._writing is not None:
            await cancel(self._writing)
            if not await self._write():
                metrics.live_scores("dropped").add(self.held)

    async def _write_on(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(_PAUSE_S)
            await self._write(pausing=True)

    async def _write(self, pausing: bool = False) -> bool:
        """Write what is held by now, some shards at a time; what could not be written stays."""
        self._some.clear()
        for (model, version), shards in list(self._held.items()):
            for first in range(0, SHARDS, _AT_ONCE):
                part = [dict(held) if first <= shard < first + _AT_ONCE else {} for shard, held in enumerate(shards)]
                if not any(part):
                    continue
                begun = perf_counter()
                try:
                    await self._propensities.put_live(model, version, part)
                except StoreError:
                    self._some.set()
                    return False
                self._let_go(shards, part)
                if pausing:
                    await asyncio.sleep(_PAUSES * (perf_counter() - begun))
        if self.held:
            self._some.set()
        return True

    def _let_go(self, shards: Sequence[_Shard], written: Sequence[_Shard]) -> None:
        """Hold no longer what was written, but what has come since."""
        for held, part in zip(shards, written, strict=True):
            for tag, score in part.items():
                if held[tag] is score:
                    del held[tag]
                    self.held -= 1
        metrics.live_scores("written").add(sum(map(len, written)))
