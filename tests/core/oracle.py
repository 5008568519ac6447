"""Features in plain Python, one visitor and one event at a time: the slow answer that the kernel must give.

Written from the descriptions in `service.core.spec` and from the record layout. It shares no code with
`service.core.features` and `service.core.events` and uses no numpy.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from service.core.spec import Aggregate, Clock, Decay, FeatureSpec, Ratio, Request, Session, Trait

TRAIT_NUMBER: Final = 65534
TRAIT_TEXT: Final = 65535
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, order=True)
class Event:
    """One record. The order of the fields is the canonical order, then the order that settles clashes."""

    ts_ms: int
    kind: int
    id: int
    attribute: int
    bits: int

    @property
    def value(self) -> float | None:
        """The value, or None where it is absent: bits that are no finite number."""
        number: float = struct.unpack("<f", self.bits.to_bytes(4, "little"))[0]
        return number if math.isfinite(number) else None


def intact(record: bytes) -> bool:
    """Whether the weighted sum of the record's three words carries the seal in its top 16 bits."""
    first, second, third = (int.from_bytes(record[place : place + 8], "little") for place in (0, 8, 16))
    total = first * 0x9E3779B97F4A7C15 + second * 0xC2B2AE3D27D4EB4F + third * 0x165667B19E3779F9
    return total >> 48 & 0xFFFF == 0x5CE7


def decode(blob: bytes) -> list[Event]:
    """The events of a blob in canonical order, each (ts, kind, id) once; broken records and a torn tail left out."""
    chosen: dict[tuple[int, int, int], Event] = {}
    for start in range(0, len(blob) // 24 * 24, 24):
        record = blob[start : start + 24]
        if intact(record):
            ts_ms, identifier, attribute, bits, kind, _ = struct.unpack("<qIIIHH", record)
            event = Event(ts_ms, kind, identifier, attribute, bits)
            key = (ts_ms, kind, identifier)
            chosen[key] = min(event, chosen.get(key, event))
    return sorted(chosen.values())


def features(
    spec: FeatureSpec, blob: bytes, now_ms: int, traits: bytes = b"", context: Mapping[str, object] | None = None
) -> list[float]:
    """The features of one visitor at `now_ms`, each rounded to float32, in the order of the spec."""
    codes = {kind.code for kind in spec.events.values()}
    known = [event for event in decode(blob) if event.kind in codes]
    kept = [event for event in known if now_ms - spec.limits.history < event.ts_ms <= now_ms]
    row = _Row(spec, kept[-spec.limits.records :], now_ms, decode(traits), context or {})
    return [row.feature(name) for name in spec.features]


def float32(number: float) -> float:
    """The nearest float32; infinite beyond the largest."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)
    return rounded


@dataclass(frozen=True)
class _Row:
    spec: FeatureSpec
    events: list[Event]
    now_ms: int
    traits: list[Event]
    context: Mapping[str, object]

    def feature(self, name: str) -> float:
        return float32(self._value(name))

    def _value(self, name: str) -> float:
        feature = self.spec.features[name]
        if isinstance(feature, Aggregate):
            return self._aggregate(feature)
        if isinstance(feature, Session):
            going_on = self._session()
            if feature.session == "count":
                return len(going_on)
            return (self.now_ms - going_on[0].ts_ms) / 1000 if going_on else 0.0
        if isinstance(feature, Ratio):
            above, below = (self.feature(operand) for operand in feature.ratio)
            return _divided(above + feature.prior[0], below + feature.prior[1])
        if isinstance(feature, Clock):
            return self._clock(feature)
        if isinstance(feature, Trait):
            return self._trait(feature)
        assert isinstance(feature, Request)
        return _request(feature, self.context.get(feature.request))

    def _session(self) -> list[Event]:
        going_on: list[Event] = []
        edge = self.now_ms
        for event in reversed(self.events):
            if edge - event.ts_ms >= self.spec.limits.session_gap:
                break
            going_on.insert(0, event)
            edge = event.ts_ms
        return going_on

    def _aggregate(self, feature: Aggregate) -> float:
        names = list(self.spec.events) if "any" in feature.kinds else feature.kinds
        codes = [self.spec.events[name].code for name in names]
        pool = self._session() if feature.window == "session" else self.events
        oldest = self.now_ms - feature.window if isinstance(feature.window, int) else -math.inf
        chosen = [event for event in pool if event.kind in codes and event.ts_ms > oldest]
        if isinstance(feature, Decay):
            return math.fsum(0.5 ** ((self.now_ms - event.ts_ms) / feature.half_life) for event in chosen)
        return _statistic(feature.operation, chosen, self.now_ms)

    def _clock(self, feature: Clock) -> float:
        sign = -1 if feature.offset[0] == "-" else 1
        offset = sign * timedelta(hours=int(feature.offset[1:3]), minutes=int(feature.offset[4:]))
        local = EPOCH + timedelta(milliseconds=self.now_ms) + offset
        return {"hour": local.hour, "weekday": local.weekday(), "day": local.day, "month": local.month}[feature.clock]

    def _trait(self, feature: Trait) -> float:
        latest = None
        for record in self.traits:
            is_trait = record.kind in (TRAIT_NUMBER, TRAIT_TEXT)
            if is_trait and record.id == _hash(feature.trait) and record.ts_ms <= self.now_ms:
                latest = record
        if latest is None:
            return math.nan
        if feature.categories is None:
            return math.nan if latest.value is None else latest.value
        if latest.kind == TRAIT_NUMBER:
            return math.nan
        return _code(feature.categories, {_hash(name): name for name in feature.categories}.get(latest.attribute))


def _statistic(operation: str, events: Sequence[Event], now_ms: int) -> float:
    values = [event.value for event in events if event.value is not None]
    if operation == "count":
        return len(events)
    if operation == "distinct":
        return len({event.attribute for event in events} - {0})
    if operation == "sum":
        return math.fsum(values)
    if operation in ("recency", "tenure"):
        last_or_first = -1 if operation == "recency" else 0
        return (now_ms - events[last_or_first].ts_ms) / 1000 if events else math.nan
    if not values:
        return math.nan
    return {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values), "latest": values[-1]}[
        operation
    ]


def _divided(above: float, below: float) -> float:
    if math.isnan(above) or math.isnan(below):
        return math.nan
    if below != 0:
        return above / below
    return math.nan if above == 0 else math.copysign(math.inf, above) * math.copysign(1, below)


def _request(feature: Request, value: object) -> float:
    if feature.categories is not None:
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, (int, float)):
            value = f"{value:.0f}" if value == int(value) else str(value)
        return _code(feature.categories, value) if isinstance(value, str) and value else math.nan
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(float32(value)) else math.nan


def _code(categories: Sequence[str] | Mapping[str, float], category: object) -> float:
    if isinstance(categories, Mapping):
        return categories.get(str(category), math.nan)
    return categories.index(str(category)) if category in categories else len(categories)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:4], "little") or 1
