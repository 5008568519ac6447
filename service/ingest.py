"""Events as they are sent, turned into records. Pure; these rules are the definition that files are read by, too.

An event is a JSON object of the Segment spec. *Text of* a value below is what `features.text_of` writes: a string
itself; `true` and `false`; `3` for 3 and for 3.0, up to 1e15; another number in the shortest form that reads back as
the same float64. The empty string, null, arrays and objects have no text. *Number of* a value is: a number itself; the
number that a string spells (`12.5`, `-1e3`, spaces around it allowed, nothing else); read as float64, and none where
float32 cannot hold it as a finite number. Booleans have no number.

1. **Visitor**: text of `userId`, else of `anonymousId`; booleans do not count. Without either, or longer than 256
   characters, the event is refused (`visitor`).
2. **Type**: `track`, `page`, `identify`, and also `screen`, `group` and `alias`, of which only traits are kept. Without
   a type it is `track`. Any other is refused (`type`). `properties`, `traits` and `context` are objects or absent,
   otherwise the event is refused (`shape`).
3. **Time**: `timestamp`, in milliseconds since 1970 UTC. A string, spaces around it allowed, is ISO 8601 (`2026-01-31`,
   then `T` or a space and `23:59`, `23:59:59` or `23:59:59.999999`, then `Z`, `+hh`, `+hhmm`, `+hh:mm` or nothing,
   which means UTC), cut down to whole milliseconds; or it spells a number. A number x is seconds where |x| < 1e11,
   otherwise milliseconds, and floor(milliseconds + 0.5) is taken. Absent or null is the moment of receipt. Anything
   else, and what lies before 1970, is refused (`timestamp`); more than 24 hours after receipt is refused too
   (`future`); up to that it is kept and counts once its time has come.
4. **Kind**: the line of the catalogue whose `event` equals the name of the event, exactly. The name of a track event is
   its `event`, a string that is not empty, otherwise it is refused (`event`). A page event is tried by its `name`, then
   as `Page Viewed`. Without a line no event is kept.
5. **Value**: number of `properties[value]`, where the line names a value; absent is NaN.
6. **Attribute**: `hash32` of the text of `properties[attribute]`, where the line names one; absent is 0.
7. **Id**: `hash32` of the text of `messageId`, or without one `content_id` of attribute and value.
8. **Traits**: of every event, whatever its type and kind: each trait that a loaded spec reads, from `traits` where it
   has the key with a value other than null, else from `context`. Where any spec lists categories for it, it is kept as
   text: kind TRAIT_TEXT, attribute `hash32` of its text, value its number if it has one; without text there is no
   record. Otherwise it is kept as a number: kind TRAIT_NUMBER, attribute 0; without a number there is no record. In
   both, a boolean's number is 1 or 0. The record's id is `hash32` of the trait's name, its time that of the event.

An event that leaves no record is ignored, which is no error: senders need not know what is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from service.core import events, features
from service.core.errors import PropensityError
from service.core.spec import EventKind, FeatureSpec
from service.joining import Login

LONGEST_ID: Final = 256
FUTURE_MS: Final = 24 * 3_600_000
PAGE_VIEWED: Final = "Page Viewed"
# Hashes of attributes and traits are remembered, since they come again and again; longer texts hardly do.
_LONGEST_REMEMBERED: Final = 64

_TYPES: Final = ("track", "page", "identify", "screen", "group", "alias")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_ISO_8601: Final = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
).fullmatch
# Each text fits in one way alone: with `\d+\.?\d*`, 32 kB of digits and a letter took 40 s and kept all others waiting.
_NUMBER: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII).fullmatch


class CatalogueConflict(PropensityError):
    """Two specs that cannot be served together, since a record means one thing in the one and another in the other."""


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """An event that leaves records; any part may be empty. The message is for who could not keep all of them.

    `parse` gives events and traits; what it says of a person is the part of `service.door`.
    """

    visitor_id: str
    events: bytes
    traits: bytes
    message: str | None = None
    said: bytes = b""
    login: tuple[str, Login] | None = None


class Ignored(msgspec.Struct, frozen=True, gc=False):
    """A sound event of which nothing is kept; the message says why."""

    message: str


class Refused(msgspec.Struct, frozen=True, gc=False):
    """An event that cannot be understood: a reason out of a fixed set, and what to write instead."""

    reason: str
    message: str


_NOT_KEPT: Final = Ignored("the event is not in the catalogue of any model, and carries no trait that one reads")


class KeptTrait(NamedTuple):
    """How the records of one trait look: their id, and whether they hold its text."""

    identifier: int
    is_text: bool


@dataclass(frozen=True)
class Catalogue:
    """What of events is kept: the union over specs. Made by `catalogue`."""

    kinds: Mapping[str, EventKind]  # by the event's name
    names: Mapping[int, str]  # code -> name of the kind in the first spec that has it
    traits: Mapping[str, KeptTrait]  # by name


class _Refusal(Exception):
    def __init__(self, reason: str, message: str) -> None:
        self.refused = Refused(reason, message)


def catalogue(specs: Iterable[FeatureSpec]) -> Catalogue:
    """The union of the specs' catalogues and traits. Raises CatalogueConflict where they disagree."""
    kinds: dict[str, EventKind] = {}
    codes: dict[int, EventKind] = {}
    names: dict[int, str] = {}
    traits: dict[str, KeptTrait] = {}
    for spec in specs:
        for name, kind in spec.events.items():
            if kinds.setdefault(kind.event, kind) != kind or codes.setdefault(kind.code, kind) != kind:
                other = codes.get(kind.code, kinds[kind.event])
                raise CatalogueConflict(
                    f"model {spec.model}: events.{name} is {_line(kind)}, another model says {_line(other)}; "
                    "a deployment has one catalogue: give the same code, event, value and attribute in every spec"
                )
            names.setdefault(kind.code, name)
        for feature in spec.traits.values():
            known = traits.get(feature.trait, KeptTrait(events.hash32(feature.trait), False))
            traits[feature.trait] = known._replace(is_text=known.is_text or feature.categories is not None)
    return Catalogue(kinds, names, traits)


def _line(kind: EventKind) -> str:
    return str({name: value for name, value in kind.model_dump().items() if value is not None})


def parse(catalogue: Catalogue, event: object, received_ms: int) -> Accepted | Ignored | Refused:
    """The records that one event leaves, by the rules above. `received_ms` is Unix time."""
    try:
        return _parse(catalogue, event, received_ms)
    except _Refusal as refusal:
        return refusal.refused


def _parse(catalogue: Catalogue, event: object, received_ms: int) -> Accepted | Ignored:
    if not isinstance(event, dict):
        raise _Refusal("shape", "an event is a JSON object")
    properties, traits, context = _object(event, "properties"), _object(event, "traits"), _object(event, "context")
    visitor_id = visitor_of(event)
    ts_ms = timestamp_ms(event.get("timestamp"), received_ms)
    kind = _kind(catalogue, event)
    record = b"" if kind is None else _event_record(kind, event, properties, ts_ms)
    trait_records = b"".join([*_trait_records(catalogue, traits, context, ts_ms)])
    return Accepted(visitor_id, record, trait_records) if record or trait_records else _NOT_KEPT


def _object(event: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = event.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _Refusal("shape", f"{name} must be an object")
    return value


def visitor_ids(event: object) -> list[str]:
    """The ids that an event names, `userId` first."""
    if not isinstance(event, dict):
        return []
    found = (event.get("userId"), event.get("anonymousId"))
    return [text for value in found if not isinstance(value, bool) and (text := text_of(value)) is not None]


def is_named(event: object) -> bool:
    """Whether the catalogue is asked for a sound event: a track or page event."""
    return isinstance(event, dict) and event.get("type") in (None, "track", "page")


def visitor_of(event: Mapping[str, Any]) -> str:
    """Rule 1, of an event that is an object."""
    user = event.get("userId")
    visitor_id = user if type(user) is str and user else next(iter(visitor_ids(event)), None)
    if visitor_id is None:
        raise _Refusal("visitor", "give userId or anonymousId, as a string that is not empty")
    if len(visitor_id) > LONGEST_ID:
        raise _Refusal("visitor", f"an id has at most {LONGEST_ID} characters, this one {len(visitor_id)}")
    return visitor_id


def timestamp_ms(value: object, received_ms: int) -> int:
    """Rule 3."""
    ts_ms = received_ms if value is None else _milliseconds(value)
    if ts_ms is None or ts_ms < 0:
        raise _Refusal("timestamp", "timestamp must be ISO 8601, as 2026-01-31T23:59:59.999Z, or epoch ms or s")
    if ts_ms > received_ms + FUTURE_MS:
        raise _Refusal("future", "timestamp is more than 24 hours ahead; send UTC or an offset, and epoch in ms or s")
    return ts_ms


def _milliseconds(value: object) -> int | None:
    if isinstance(value, str) and _ISO_8601(text := value.strip()):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None
        return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MILLISECOND
    number = number_of(value)
    if math.isnan(number):
        return None
    return math.floor((number * 1000 if abs(number) < 1e11 else number) + 0.5)


def _kind(catalogue: Catalogue, event: Mapping[str, Any]) -> EventKind | None:
    sort = "track" if event.get("type") is None else event["type"]
    if sort not in _TYPES:
        raise _Refusal("type", f"type must be one of {', '.join(_TYPES)}")
    name = event.get("event") if sort == "track" else event.get("name")
    if sort == "track":
        if not isinstance(name, str) or not name:
            raise _Refusal("event", "a track event needs its name in `event`, a string that is not empty")
        return catalogue.kinds.get(name)
    if sort == "page":
        named = catalogue.kinds.get(name) if isinstance(name, str) else None
        return named or catalogue.kinds.get(PAGE_VIEWED)
    return None


def _event_record(kind: EventKind, event: Mapping[str, Any], properties: Mapping[str, Any], ts_ms: int) -> bytes:
    value = number_of(properties.get(kind.value)) if kind.value is not None else math.nan
    attribute = _hash_of(properties.get(kind.attribute)) if kind.attribute is not None else 0
    message_id = text_of(event.get("messageId"))
    identifier = events.content_id(attribute, value) if message_id is None else events.hash32(message_id)
    return events.pack(ts_ms, kind.code, identifier, attribute, value)


def _trait_records(
    catalogue: Catalogue, traits: Mapping[str, Any], context: Mapping[str, Any], ts_ms: int
) -> Iterator[bytes]:
    for name, (identifier, is_text) in catalogue.traits.items():
        value = traits.get(name)
        if value is None and (value := context.get(name)) is None:
            continue
        number = float(value) if isinstance(value, bool) else number_of(value)
        if is_text and (attribute := _hash_of(value)):
            yield events.pack(ts_ms, events.TRAIT_TEXT, identifier, attribute, number)
        elif not is_text and not math.isnan(number):
            yield events.pack(ts_ms, events.TRAIT_NUMBER, identifier, 0, number)


def _hash_of(value: object) -> int:
    text = text_of(value)
    if text is None:
        return 0
    return _remembered(text) if len(text) <= _LONGEST_REMEMBERED else events.hash32(text)


_remembered: Final = lru_cache(maxsize=4096)(events.hash32)


def text_of(value: object) -> str | None:
    """Text of a JSON value, as the rules above define it; None where it has none."""
    if type(value) is str:  # nearly all
        return value or None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return features.text_of(value) or None if isinstance(value, str | bool | int | float) else None


def number_of(value: object) -> float:
    """Number of a JSON value, as the rules above define it; NaN where it has none."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, str):
        value = value.strip()
        value = float(value) if _NUMBER(value) else None
    if isinstance(value, int | float) and abs(value) < events.FLOAT32_END:
        return float(value)
    return math.nan
