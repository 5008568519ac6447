"""What visitors said of themselves: hashed identifiers, and for which purposes their data may be used.

It is kept under `NS:i:{ID}` as records of 48 bytes, grown by APPEND like a visitor's events, and as free of order:

`ts_ms i64 | forms u8 | rules u8 | 0 u16 | check u32 | payload 32 bytes`, little-endian, where check is the CRC-32 of
the other 44 bytes.

- An *identifier*: the forms that it is the hash of, one bit each; the version of the rules; the hash.
- A *statement*, with the bit STATEMENT: for each purpose, in the order of PURPOSES, one byte that is 0 (not said), 1
  (refused) or 2 (agreed); then one byte that is 1 if the event named a `userId`.

Of each form and each purpose the latest by the time of the event counts; of two of one moment a refusal, or the greater
hash. An agreement of a moment that is still to come does not count yet, a refusal does. Nothing said is a refusal.
"""

from __future__ import annotations

import hashlib
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from service import joining
from service.identity import EXTERNAL, HASHED, RULES, VERSIONS
from service.keys import keys_of
from service.servers import Refusal, granted
from service.shards import Cache

PURPOSES: Final = ("ads", "email", "crm", "analytics")
# Segment's own example of a category, and the names of the purposes themselves.
CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"Advertising": ("ads",), **{purpose: (purpose,) for purpose in PURPOSES}}
)

RECORD_BYTES: Final = 48
STATEMENT: Final = 128
# What is let grow before it is compacted to what counts: nine records at most, and some that are still to come.
MOST_BYTES: Final = 64 * RECORD_BYTES
_MOST_TO_COME: Final = 20

_LAYOUT: Final = struct.Struct("<qBBHI32s")
_CHECKED: Final = struct.Struct("<qBBH")
_NOT_SAID, _REFUSED, _AGREED = range(3)
_BITS: Final = {form: 1 << place for place, form in enumerate(HASHED)}


class Known(NamedTuple):
    """What is known of a visitor: hashes by form, whether each purpose was agreed to, and the oldest rules."""

    identifiers: Mapping[str, tuple[str, ...]]
    consents: Mapping[str, bool]
    rules: str


class _Record(NamedTuple):
    ts_ms: int
    forms: int
    rules: int
    payload: bytes


NOTHING: Final = Known({}, dict.fromkeys(PURPOSES, False), "")


def identifier(ts_ms: int, forms: Sequence[str], digest: str, rules: int = RULES) -> bytes:
    """The record of a hash, 64 hex digits, under all forms that have it."""
    return _pack(ts_ms, sum(_BITS[form] for form in forms), rules, bytes.fromhex(digest))


def statement(ts_ms: int, consents: Mapping[str, bool], is_user: bool) -> bytes:
    """The record of what was said of some purposes, and whether the visitor was named by a `userId`."""
    said = [(_AGREED if consents[name] else _REFUSED) if name in consents else _NOT_SAID for name in PURPOSES]
    return _pack(ts_ms, STATEMENT, 0, bytes([*said, is_user]).ljust(32, b"\0"))


def _pack(ts_ms: int, forms: int, rules: int, payload: bytes) -> bytes:
    check = zlib.crc32(payload, zlib.crc32(_CHECKED.pack(ts_ms, forms, rules, 0)))
    return _LAYOUT.pack(ts_ms, forms, rules, 0, check, payload)


def _records(blob: bytes) -> Iterator[_Record]:
    """The sound records of a value."""
    for start in range(0, len(blob) - RECORD_BYTES + 1, RECORD_BYTES):
        ts_ms, forms, rules, _, check, payload = _LAYOUT.unpack_from(blob, start)
        if check == zlib.crc32(payload, zlib.crc32(_CHECKED.pack(ts_ms, forms, rules, 0))):
            yield _Record(ts_ms, forms, rules, payload)


def known(visitor_id: str, blob: bytes, now_ms: int) -> Known:
    """What the value of a visitor says at a moment, in Unix milliseconds."""
    records = list(_records(blob))
    found = {form: record for form in HASHED if (record := _latest_hash(records, form)) is not None}
    identifiers = {form: (record.payload.hex(),) for form, record in found.items()}
    # An id with half a surrogate pair, which JSON can hold and UTF-8 cannot, can be told to nobody.
    is_named = any(record.forms & STATEMENT and record.payload[len(PURPOSES)] for record in records)
    if is_named and (text := visitor_id.encode("utf-8", "replace")).decode() == visitor_id:
        own = visitor_id, hashlib.sha256(text).hexdigest()
        identifiers |= {form: (value,) for form, value in zip(EXTERNAL, own, strict=True)}
    consents = {
        purpose: (record := _latest_word(records, place, now_ms)) is not None and record.payload[place] == _AGREED
        for place, purpose in enumerate(PURPOSES)
    }
    rules = VERSIONS.get(min((record.rules for record in found.values()), default=0), "")
    return Known(dict(sorted(identifiers.items())), consents, rules)


def _latest_hash(records: Sequence[_Record], form: str) -> _Record | None:
    mine = [record for record in records if record.forms & _BITS[form] and not record.forms & STATEMENT]
    return max(mine, key=lambda record: (record.ts_ms, record.payload, record.rules), default=None)


def _latest_word(records: Sequence[_Record], place: int, now_ms: int) -> _Record | None:
    """The latest statement that says anything of a purpose, agreements that are still to come left out."""
    said = [
        record
        for record in records
        if record.forms & STATEMENT
        and (record.payload[place] == _REFUSED or (record.payload[place] == _AGREED and record.ts_ms <= now_ms))
    ]
    return max(said, key=lambda record: (record.ts_ms, -record.payload[place], record.payload), default=None)


def compact(blob: bytes, now_ms: int) -> bytes:
    """The records of a value that count or may count yet, in the order of time."""
    records = sorted(set(_records(blob)))
    kept = {record for form in HASHED if (record := _latest_hash(records, form)) is not None}
    kept |= {record for at in range(len(PURPOSES)) if (record := _latest_word(records, at, now_ms)) is not None}
    users = [record for record in records if record.forms & STATEMENT and record.payload[len(PURPOSES)]]
    if not kept.intersection(users):
        kept.update(users[-1:])
    kept.update([record for record in records if record.ts_ms > now_ms][:_MOST_TO_COME])
    return b"".join(_pack(*record) for record in sorted(kept))


class Identities:
    """What is known of many visitors, read from the feature cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def read(self, visitor_ids: Sequence[str], now_ms: int | None = None) -> list[Known]:
        """What is known of each visitor. Nothing of an anonymous one who was joined into another.

        So a person who is in a list under both ids is sent once. Raises StoreError.
        """
        moment = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        keys = [keys_of(self._cache.namespace, visitor_id).said for visitor_id in visitor_ids]
        replies = await self._cache.attempt(*(("GET", key) for key in keys))
        blobs = [b"" if isinstance(reply, Refusal) and reply.is_wrong_type else granted(reply) for reply in replies]
        return [
            NOTHING if joining.is_linked(blob) else known(name, blob or b"", moment)
            for name, blob in zip(visitor_ids, blobs, strict=True)
        ]
