"""Whom a model scored: in which bins of the reference features and scores lie, and what was known of the visitors.

Rows are kept as they were computed and counted some hundred at a time, which costs a tenth of counting each; once a
second, and before an exposition, the counts go to the counters. Rows that were not answered, and those of visitors
whose history could not be read, are not given here: they say nothing of the visitors.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service import metrics
from service.core import bins, drift
from service.core.bundle import Bundle

COUNTED_TOGETHER: Final = 512


class Rows(NamedTuple):
    """What was scored: float32[n, F], float32[n], and how many events each visitor had and the age of the last.

    Nothing of it may be changed afterwards. Without events, int64[n] each, nobody asked for the visitors' histories.
    """

    matrix: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    events: npt.NDArray[np.int64] | None = None
    last_age_ms: npt.NDArray[np.int64] | None = None

    def without(self, places: list[int]) -> Rows:
        """All but some of the rows."""
        keep = np.delete(np.arange(len(self.scores)), places)
        events, last_age_ms = (None if part is None else part[keep] for part in (self.events, self.last_age_ms))
        return Rows(self.matrix[keep], self.scores[keep], events, last_age_ms)


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
        events = [rows.events for rows in waiting if rows.events is not None]
        ages_ms = [rows.last_age_ms for rows in waiting if rows.last_age_ms is not None]
        if events:
            self._count_histories(np.concatenate(events), np.concatenate(ages_ms))

    def _count_histories(self, events: npt.NDArray[np.int64], ages_ms: npt.NDArray[np.int64]) -> None:
        self._capped.inc(int(np.count_nonzero(events >= self._cap)))
        self._without_history.inc(int(np.count_nonzero(events == 0)))
        self._ages.observe_all(ages_ms[events > 0] / 1000)


def _describe(bundle: Bundle, layout: bins.Layout) -> None:
    """Say what the reference is that the counts are compared with."""
    labels = bundle.name, bundle.version
    for feature, text, share in zip(layout.features, layout.texts, layout.shares, strict=True):
        metrics.REFERENCE_SHARE.labels(*labels, feature, text).set(share)
    for feature, described in {**bundle.reference.features, bins.SCORE: bundle.reference.score}.items():
        metrics.REFERENCE_ROWS.labels(*labels, feature).set(described.rows)
    for feature, critical in drift.critical_values(bundle.spec, bundle.reference).items():
        metrics.DRIFT_CRITICAL.labels(*labels, feature).set(critical)
