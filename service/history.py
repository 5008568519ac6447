"""A visitor's history as it is stored: what two values hold, and what is worth keeping of them. Pure.

A visitor has a value of events and one of traits, which both grow at their ends. Compaction at rest folds them into
one: the traits, then the events. What comes later grows both values again, so that a history is read from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from service.core import events
from service.core.events import RECORD_BYTES, Records

# The design's bound on a visitor's records.
MOST_EVENTS: Final = 2048

# The kinds of traits, and no others, have this high byte, which stands here in a record.
_TRAIT: Final = b"\xff"
_HIGH_OF_KIND: Final = 21


class History(NamedTuple):
    """A visitor's records as they are stored, or some to add: events and traits, 24 bytes each."""

    events: bytes = b""
    traits: bytes = b""


def unfold(stored: object, traits: object) -> History:
    """What the values of a visitor's two keys hold; anything but bytes holds nothing."""
    known, later = _bytes(stored), _bytes(traits)
    folded = _folded(known)
    return History(known[folded:], known[:folded] + later) if folded else History(known, later)


def fold(stored: bytes, traits: bytes, now_ms: int) -> tuple[bytes, bytes]:
    """What to store for a visitor at rest under its two keys, an empty value being none."""
    known = unfold(stored, traits)
    kept = compact_traits(known.traits, now_ms)
    return (kept + compact_events(known.events), b"") if stored else (b"", kept)


def trim_events(stored: bytes) -> bytes:
    """A value of events without what is not worth keeping; traits that were folded into it stay as they are."""
    folded = _folded(stored)
    return stored[:folded] + compact_events(stored[folded:])


def _folded(stored: bytes) -> int:
    """How many bytes of trait records a value of events begins with."""
    if stored[_HIGH_OF_KIND : _HIGH_OF_KIND + 1] != _TRAIT:
        return 0
    kinds = stored[_HIGH_OF_KIND::RECORD_BYTES]
    return (len(kinds) - len(kinds.lstrip(_TRAIT))) * RECORD_BYTES


def compact_events(blob: bytes) -> bytes:
    """The events worth keeping of a value: sound, each once, in canonical order, the latest 2,048."""
    known = events.from_bytes(blob)
    if len(blob) == known.nbytes and _is_ascending(known) and events.valid(known).all():
        return blob[-MOST_EVENTS * RECORD_BYTES :]
    return events.compact(_aligned(blob), MOST_EVENTS)


def _is_ascending(known: Records) -> bool:
    """Whether each record is later than the one before it, as most are."""
    ts_ms = known["ts_ms"]
    return bool((ts_ms[1:] > ts_ms[:-1]).all())


def compact_traits(blob: bytes, now_ms: int) -> bytes:
    """The trait records worth keeping: the latest of each trait at `now_ms`, and those that are still to come."""
    if not blob:
        return b""
    known = events.from_bytes(_aligned(blob))
    known = known[events.valid(known)]
    known = known[events.canonical_order(known)]
    known = known[events.first_of_each(known)]
    keep = known["ts_ms"] > now_ms
    backwards = np.flatnonzero(~keep)[::-1]
    keep[backwards[np.unique(known["id"][backwards], return_index=True)[1]]] = True
    return known[keep][-MOST_EVENTS:].tobytes()


def _aligned(blob: bytes) -> bytes:
    """Whole records of a value. Bytes that are no record shift what follows, so a torn value is cut both ways."""
    torn = len(blob) % RECORD_BYTES
    return blob[:-torn] + blob[torn:] if torn else blob


def missing(known: bytes, new: bytes, compact: Callable[[bytes], bytes]) -> bytes:
    """The records of `new` that `known` has not, without those that compaction would drop again."""
    if not known and len(new) <= MOST_EVENTS * RECORD_BYTES:
        return new
    known = _aligned(known)
    held = set(_records(known))
    return b"".join(record for record in _records(compact(known + new)) if record not in held)


def _records(blob: bytes) -> Iterator[bytes]:
    return (blob[start : start + RECORD_BYTES] for start in range(0, len(blob), RECORD_BYTES))


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def fresh_bytes(key: str, size: int) -> int:
    """Memory that Redis 7.0 takes for a key whose value of `size` bytes is stored in one piece, TTL not counted.

    An entry of 24 bytes, an object of 16, and two strings with a head and an end, each in an allocation of its own.
    """
    return 24 + 16 + _allocated(len(key) + 4) + _allocated(size + (4 if size < 256 else 6))


def _allocated(size: int) -> int:
    """What jemalloc gives for `size` bytes: multiples of 16, beyond 128 bytes four sizes to each doubling."""
    step = max(16, 1 << (size - 1).bit_length() >> 3)
    return -(-size // step) * step
