"""Whom a model scored: in which bins of the reference features and scores lie, and what was known of the visitors.

Rows are kept as they were computed and counted some hundred at a time, which costs a tenth of counting each; once a
second, and before an exposition, the counts go to the counters. Rows that were not answered, and those of visitors
whose history could not be read, are not given here: they say nothing of the visitors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service import metrics
from service.core import bins, drift, events
from service.core.bundle import Bundle

COUNTED_TOGETHER: Final = 512
# The rules tell from the events of half a window how many scores of it are of one visitor; docs/drift.md says how.
HALF_WINDOWS_MS: Final = {"1h": 1_800_000, "24h": 43_200_000}


class Histories(NamedTuple):
    """Of n visitors at a moment: how many events each had, the age of the last, int64[n] each, and all as stored."""

    events: npt.NDArray[np.int64]
    last_age_ms: npt.NDArray[np.int64]
    stored: Sequence[bytes]
    now_ms: int

    def at(self, places: list[int]) -> Histories:
        """Those of some visitors."""
        return Histories(
            self.events[places], self.last_age_ms[places], [self.stored[place] for place in places], self.now_ms
        )


class Rows(NamedTuple):
    """What was scored: float32[n, F], float32[n], and the visitors' histories where they were asked for.

    Nothing of it may be changed afterwards.
    """

    matrix: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    histories: Histories | None = None

    def without(self, places: list[int]) -> Rows:
        """All but some of the rows."""
        keep = np.delete(np.arange(len(self.scores)), places).tolist()
        histories = None if self.histories is None else self.histories.at(keep)
        return Rows(self.matrix[keep], self.scores[keep], histories)


class Population:
    """Counts what one version of a model scored. For the thread of the event loop alone."""

    def __init__(self, bundle: Bundle) -> None:
        self._cap = bundle.spec.limits.records
        self._layout = bins.layout(bundle)
        self._waiting: list[Rows] = []
        self._rows = 0
        self._counts = np.zeros(len(self._layout.texts), np.int64)
        labels = bundle.name, bundle.version
        places = list(zip(self._layout.features, self._layout.texts, strict=True))
        self._bins = [metrics.FEATURE_BINS.labels(*labels, feature, text) for feature, text in places]
        self._ages = metrics.LAST_EVENT_AGE.labels(bundle.name)
        self._capped = metrics.SCORES_CAPPED.labels(bundle.name)
        self._without_history = metrics.SCORES_WITHOUT_HISTORY.labels(bundle.name)
        self._earlier = {ms: metrics.EARLIER_EVENTS.labels(*labels, name) for name, ms in HALF_WINDOWS_MS.items()}
        _describe(bundle, self._layout)

    def add(self, rows: Rows) -> None:
        """Take rows, to be counted soon."""
        self._waiting.append(rows)
        self._rows += len(rows.scores)
        if self._rows >= COUNTED_TOGETHER:
            self._count()

    def tell(self) -> None:
        """Give all that was counted to the client library."""
        self._count()
        for place in self._counts.nonzero()[0].tolist():
            self._bins[place].inc(int(self._counts[place]))
        self._counts[:] = 0

    def _count(self) -> None:
        if not self._rows:
            return
        waiting, self._waiting, self._rows = self._waiting, [], 0
        self._counts += self._layout.count(
            np.concatenate([rows.matrix for rows in waiting]), np.concatenate([rows.scores for rows in waiting])
        )
        histories = [rows.histories for rows in waiting if rows.histories is not None]
        if histories:
            self._count_histories(histories)

    def _count_histories(self, histories: Sequence[Histories]) -> None:
        known = np.concatenate([part.events for part in histories])
        self._capped.inc(int(np.count_nonzero(known >= self._cap)))
        self._without_history.inc(int(np.count_nonzero(known == 0)))
        self._ages.observe_all(np.concatenate([part.last_age_ms for part in histories])[known > 0] / 1000)
        records, starts = events.join([blob for part in histories for blob in part.stored])
        asked_ms = np.repeat([part.now_ms for part in histories], [len(part.stored) for part in histories])
        age_ms = np.repeat(asked_ms, np.diff(starts)) - records["ts_ms"]
        for half_ms, earlier in self._earlier.items():
            recent = np.diff(np.concatenate(([0], np.cumsum((age_ms >= 0) & (age_ms < half_ms))))[starts])
            earlier.inc(int(np.maximum(recent - 1, 0).sum()))


def _describe(bundle: Bundle, layout: bins.Layout) -> None:
    """Say what the reference is that the counts are compared with."""
    labels = bundle.name, bundle.version
    for feature, text, share in zip(layout.features, layout.texts, layout.shares, strict=True):
        metrics.REFERENCE_SHARE.labels(*labels, feature, text).set(share)
    for feature, described in {**bundle.reference.features, bins.SCORE: bundle.reference.score}.items():
        metrics.REFERENCE_ROWS.labels(*labels, feature).set(described.rows)
    for feature, critical in drift.critical_values(bundle.spec, bundle.reference).items():
        metrics.DRIFT_CRITICAL.labels(*labels, feature).set(critical)
