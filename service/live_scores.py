"""Live scores on their way into the propensity database: held for a moment, then written together.

Nobody waits for it. Of a visitor who is scored again meanwhile the latest score is written; what does not fit while the
feature cache is away or slow is dropped and counted. Held is what the production model said of a visitor with events:
no score that was degraded, nor one of features that a request made up, nor one of somebody of whom nothing is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Final

from service import metrics
from service.core.bundle import Bundle
from service.errors import StoreError
from service.lifecycle import cancel
from service.propensities import Propensities
from service.scoring import Batch, Score, ScoreFailure

# Scores that are written at once: their commands take a millisecond to make, which is how long a request may wait.
PIECE: Final = 250
_PAUSE_S: Final = 0.25
_PAUSE_AFTER_FAILURE_S: Final = 1.0

_Held = dict[str, tuple[float, int]]


class LiveScores:
    """Holds the scores of up to `buffer` visitors, 0 for none at all."""

    def __init__(self, propensities: Propensities, *, buffer: int) -> None:
        self._propensities, self._buffer = propensities, buffer
        self._held: dict[tuple[str, str], _Held] = {}
        self._some = asyncio.Event()
        self._writing = asyncio.create_task(self._write_on()) if buffer else None

    @property
    def held(self) -> int:
        """Of how many visitors scores are held."""
        return sum(map(len, self._held.values()))

    def add(self, bundle: Bundle, batch: Batch, answers: Sequence[Score | ScoreFailure]) -> None:
        """Take the scores of a batch."""
        if self._writing is None or batch.degraded:
            return
        held = self._held.setdefault((bundle.name, bundle.version), {})
        room, at_ms = self._buffer - self.held, batch.now_ms
        for request, answer in zip(batch.requests, answers, strict=True):
            if type(answer) is not Score or answer.propensity is None or not answer.events or request.features:
                continue
            if room > 0 or answer.visitor_id in held:
                room -= answer.visitor_id not in held
                held[answer.visitor_id] = answer.propensity, at_ms
            else:
                metrics.live_scores("dropped").add(1)
        if held:
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
            if not await self._write():
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _write(self) -> bool:
        """Write what is held by now, piece by piece; what could not be written stays."""
        self._some.clear()
        for (model, version), held in list(self._held.items()):
            for _ in range(-(-len(held) // PIECE)):
                piece = list(islice(held.items(), PIECE))
                scores = [score for _, (score, _) in piece]
                moments = [at_ms for _, (_, at_ms) in piece]
                try:
                    await self._propensities.put(model, version, [name for name, _ in piece], scores, moments)
                except StoreError:
                    self._some.set()
                    return False
                for name, written in piece:
                    if held[name] is written:
                        del held[name]
                metrics.live_scores("written").add(len(piece))
        if self.held:
            self._some.set()
        return True
