"""Served scores for whoever consumes them: held for a moment, then written to a stream together.

Nobody waits for it. What does not fit while the feature cache is away is dropped and counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from service import metrics
from service.errors import StoreError
from service.lifecycle import cancel
from service.shards import Cache
from service.streams import ScoreStream

# Scores of one entry of the stream.
ENTRY_SCORES: Final = 100
_PAUSE_S: Final = 0.1
_PAUSE_AFTER_FAILURE_S: Final = 1.0


class ScoreLog:
    """Holds up to `buffer` scores and writes them to the stream, of which about `length` entries are kept."""

    def __init__(self, cache: Cache, *, length: int, buffer: int) -> None:
        self._stream, self._length, self._buffer = ScoreStream(cache), length, buffer
        self._held: deque[bytes] = deque()
        self._some = asyncio.Event()
        self._writing = asyncio.create_task(self._write_on()) if length else None

    def add(self, score: bytes) -> None:
        """Take a score, as the JSON that was served."""
        if self._writing is None:
            return
        if len(self._held) >= self._buffer:
            metrics.score_log("dropped").inc()
            return
        self._held.append(score)
        if len(self._held) == 1:
            self._some.set()

    async def close(self) -> None:
        """Write what is held, if the feature cache takes it."""
        if self._writing is not None:
            await cancel(self._writing)
            if not await self._write():
                metrics.score_log("dropped").inc(len(self._held))

    async def _write_on(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(_PAUSE_S)
            if not await self._write():
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _write(self) -> bool:
        """Write all that is held; what could not be written stays, and may be in the stream twice after that."""
        self._some.clear()
        scores = list(self._held)
        entries = [b"\n".join(scores[first : first + ENTRY_SCORES]) for first in range(0, len(scores), ENTRY_SCORES)]
        try:
            if entries:
                await self._stream.add(entries, self._length)
        except StoreError:
            self._some.set()
            return False
        for _ in scores:
            self._held.popleft()
        if self._held:
            self._some.set()
        metrics.score_log("written").inc(len(scores))
        return True
