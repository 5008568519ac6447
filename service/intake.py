"""What comes in: how late events are, of which kind, and which of the properties that the catalogue names they have.

The records of accepted events are kept and counted once a second, all together; see `service.population`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from prometheus_client import Counter

from service import ingest, metrics
from service.core import events
from service.core.events import RECORD_BYTES, Records
from service.core.spec import EventKind
from service.ingest import Accepted, Catalogue, Ignored, Refused

UNKNOWN: Final = "unknown"
_COUNTED_TOGETHER: Final = 4096


class _Property(NamedTuple):
    """A property of a kind, by its place; the column of the record that tells whether it was there; its counters."""

    kind: int
    column: str
    present: Counter
    missing: Counter

    @classmethod
    def of(cls, kind: int, name: str, key: str, column: str) -> _Property:
        present, missing = (metrics.EVENT_PROPERTIES.labels(name, key, state) for state in ("present", "missing"))
        return cls(kind, column, present, missing)


class Intake:
    """Counts what is accepted under one catalogue. For the thread of the event loop alone."""

    def __init__(self, catalogue: Catalogue) -> None:
        kinds = sorted(catalogue.kinds.values(), key=lambda kind: kind.code)
        names = [_label(catalogue.names[kind.code]) for kind in kinds]
        self._codes = np.array([kind.code for kind in kinds], np.uint16)
        self._kinds = [metrics.EVENTS_BY_KIND.labels(name) for name in names]
        self._unknown = metrics.events_by_kind(UNKNOWN)
        self._properties = [
            _Property.of(place, name, key, column)
            for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
            for key, column in _properties(kind)
        ]
        self._records: list[bytes] = []
        self._received_ms: list[int] = []
        self._waiting = 0

    def add(self, batch: Sequence[object], outcomes: Sequence[Accepted | Ignored | Refused], now_ms: int) -> None:
        """Take the events that were received at a moment, and what became of each; they are counted soon."""
        records = []
        for event, outcome in zip(batch, outcomes, strict=True):
            if type(outcome) is Accepted:
                records.append(outcome.events or outcome.traits[:RECORD_BYTES])
                if outcome.events:  # nearly all
                    continue
            if type(outcome) is Refused:
                metrics.events_refused(outcome.reason).add(1)
            elif ingest.is_named(event):
                self._unknown.add(1)
        if records:
            self._keep(b"".join(records), now_ms)

    def _keep(self, records: bytes, now_ms: int) -> None:
        self._records.append(records)
        self._received_ms.append(now_ms)
        self._waiting += len(records) // RECORD_BYTES
        if self._waiting >= _COUNTED_TOGETHER:
            self.tell()

    def tell(self) -> None:
        """Give what was taken to the client library."""
        if not self._waiting:
            return
        records, starts = events.join(self._records)
        lag_ms = np.repeat(self._received_ms, np.diff(starts)) - records["ts_ms"]
        # Both were cut down to whole milliseconds; an event without a timestamp is of now, not of the future.
        metrics.EVENT_LAG.observe_all((lag_ms + 0.5) / 1000)
        self._count(records)
        self._records, self._received_ms, self._waiting = [], [], 0

    def _count(self, records: Records) -> None:
        records = records.compress(np.isin(records["kind"], self._codes))
        place = np.searchsorted(self._codes, records["kind"])
        of_kind = np.bincount(place, minlength=len(self._codes)).tolist()
        lacking = {
            "value": np.bincount(place[np.isnan(records["value"])], minlength=len(self._codes)).tolist(),
            "attribute": np.bincount(place[records["attribute"] == 0], minlength=len(self._codes)).tolist(),
        }
        for counter, times in zip(self._kinds, of_kind, strict=True):
            counter.inc(times)
        for one in self._properties:
            missing = lacking[one.column][one.kind]
            one.present.inc(of_kind[one.kind] - missing)
            one.missing.inc(missing)


def _label(name: str) -> str:
    return f"{name} (catalogue)" if name == UNKNOWN else name


def _properties(kind: EventKind) -> Iterator[tuple[str, str]]:
    """The properties that are kept of a kind, each with the column of the record that tells whether it was there."""
    if kind.attribute is not None:
        yield kind.attribute, "attribute"
    if kind.value is not None and kind.value != kind.attribute:
        yield kind.value, "value"
