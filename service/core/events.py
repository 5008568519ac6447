"""Event records: the 24 bytes that one event leaves in the feature cache, and how to make, check and order them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

RECORD: Final = np.dtype(
    [
        ("ts_ms", "<i8"),
        ("id", "<u4"),
        ("attribute", "<u4"),
        ("value", "<f4"),
        ("kind", "<u2"),
        ("check", "<u2"),
    ]
)
RECORD_BYTES: Final = RECORD.itemsize

# Kinds of trait records; the catalogue of a feature spec uses 1 ... MAX_KIND.
TRAIT_NUMBER: Final = 65534
TRAIT_TEXT: Final = 65535
MAX_KIND: Final = 65000

# take and compress copy records five to ten times as fast as an index does.
Records = npt.NDArray[np.void]

_LAYOUT: Final = struct.Struct("<qIIfHH")
_HEAD: Final = struct.Struct("<qIIfH")
_WORDS: Final = struct.Struct("<QQQ")
# The check makes the top 16 bits of the weighted sum of a record's three 64-bit words equal to _SEAL, so that
# one integer dot product verifies any number of records. The weights are odd: every bit reaches the top.
_WEIGHTS: Final = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
_THREE_WORDS: Final = np.dtype(("<i8", (3,)))
_WEIGHT_ARRAY: Final = np.array(_WEIGHTS, np.uint64).view(np.int64)
_UNDO: Final = pow(_WEIGHTS[2], -1, 1 << 16)
_SEAL: Final = 0x5CE7
_SEAL_ARRAY: Final = np.array(_SEAL)
_CHECK_SHIFT: Final = np.array(48)
_MASK64: Final = (1 << 64) - 1
_NAN: Final = float("nan")
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
FLOAT32_END: Final = FLOAT32_MAX + 2.0**103  # the least number that float32 rounds to infinity


def hash32(text: str) -> int:
    """Hash of a message id, an attribute or a category: the first 4 bytes of MD5, little-endian; never 0.

    0 means "absent" in a record. MD5 because DuckDB and the standard library give the same bits.
    """
    digest = hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "little") or 1


def pack(ts_ms: int, kind: int, identifier: int, attribute: int, value: float) -> bytes:
    """One record of 24 bytes. A value that float32 cannot hold as a finite number becomes NaN ("absent")."""
    finite = value if abs(value) < FLOAT32_END else _NAN
    head = _HEAD.pack(ts_ms, identifier, attribute, finite, kind)
    first, second, third = _WORDS.unpack(head + b"\0\0")
    return head + _check(first, second, third).to_bytes(2, "little")


def _check(first: int, second: int, third: int) -> int:
    total = (first * _WEIGHTS[0] + second * _WEIGHTS[1] + third * _WEIGHTS[2]) & _MASK64
    return (_SEAL - (total >> 48)) * _UNDO & 0xFFFF


def content_id(attribute: int, value: float) -> int:
    """Id of an event that carries no message id: equal attribute and value at one instant are one event."""
    finite = value if abs(value) < FLOAT32_END else _NAN
    return int(content_ids(np.array([attribute], "<u4"), np.array([finite], "<f4"))[0])


def content_ids(attribute: npt.NDArray[np.uint32], value: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """`content_id` for arrays: uint32[E] from attribute uint32[E] and value float32[E]."""
    plain = np.where(np.isfinite(value), value + np.float32(0), np.float32(np.nan))  # -0.0 + 0.0 is 0.0
    bits = plain.astype("<f4").view("<u4").astype(np.uint64)
    mixed = (attribute.astype(np.uint64) << np.uint64(32) | bits) * np.uint64(_WEIGHTS[0])
    mixed ^= mixed >> np.uint64(32)
    return (mixed * np.uint64(_WEIGHTS[1]) >> np.uint64(32)).astype(np.uint32)


def records(
    ts_ms: npt.ArrayLike,
    kind: npt.ArrayLike,
    identifier: npt.ArrayLike,
    attribute: npt.ArrayLike,
    value: npt.ArrayLike,
) -> Records:
    """RECORD[E] from five columns of length E; fills the check. Values that are not finite become NaN."""
    made = np.empty(np.shape(ts_ms), RECORD)
    made["ts_ms"] = ts_ms
    made["id"] = identifier
    made["attribute"] = attribute
    with np.errstate(over="ignore"):
        values = np.asarray(value).astype(np.float32)
    made["value"] = np.where(np.isfinite(values), values, np.float32(np.nan))
    made["kind"] = kind
    made["check"] = 0
    missing = np.uint64(_SEAL) - (_sums(made).view(np.uint64) >> np.uint64(48))
    made["check"] = (missing * np.uint64(_UNDO) & np.uint64(0xFFFF)).astype(np.uint16)
    return made


def valid(array: Records) -> npt.NDArray[np.bool_]:
    """bool[E]: whether the check of each record fits the rest of it (wrong by chance once in 65,536)."""
    sums = _sums(array)
    sums >>= _CHECK_SHIFT
    sound: npt.NDArray[np.bool_] = sums == _SEAL_ARRAY
    return sound


def words(array: Records) -> npt.NDArray[np.int64]:
    """int64[E, 3]: the 24 bytes of each record as ts, attribute << 32 | id, and the rest."""
    return np.ascontiguousarray(array).view(_THREE_WORDS)


def _sums(array: Records) -> npt.NDArray[np.int64]:
    sums: npt.NDArray[np.int64] = _WEIGHT_ARRAY.dot(words(array).T)
    return sums


def from_bytes(blob: bytes) -> Records:
    """RECORD[len // 24] over the bytes without a copy; a torn tail shorter than one record is left out."""
    return np.frombuffer(blob, RECORD, count=len(blob) // RECORD_BYTES)


def join(blobs: Sequence[bytes]) -> tuple[Records, npt.NDArray[np.int64]]:
    """RECORD[E], the records of all blobs, torn tails left out; int64[n + 1], where those of each blob start."""
    starts = list(accumulate([len(blob) // RECORD_BYTES for blob in blobs], initial=0))
    whole = b"".join(blobs)
    if len(whole) != starts[-1] * RECORD_BYTES:
        whole = b"".join([blob[: len(blob) // RECORD_BYTES * RECORD_BYTES] for blob in blobs])
    return np.frombuffer(whole, RECORD), np.array(starts)


def canonical_order(array: Records, row: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """int64[E]: order by (row, ts, kind, id), then attribute and value bits so that clashes fall the same way."""
    keys = [array["value"].view("<u4"), array["attribute"], array["id"], array["kind"], array["ts_ms"]]
    if row is not None:
        keys.append(row)
    return np.lexsort(keys)


def first_of_each(array: Records, row: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.bool_]:
    """bool[E] over records in canonical order: True on the first record of each event (row, ts, kind, id)."""
    first = np.ones(len(array), np.bool_)
    same = array["ts_ms"][1:] == array["ts_ms"][:-1]
    same &= array["kind"][1:] == array["kind"][:-1]
    same &= array["id"][1:] == array["id"][:-1]
    if row is not None:
        same &= row[1:] == row[:-1]
    first[1:] = ~same
    return first


def compact(blob: bytes, newest: int) -> bytes:
    """The same events, sorted and unique, broken records left out, the latest `newest` of them kept."""
    known = from_bytes(blob)
    known = known.compress(valid(known))
    known = known.take(canonical_order(known))
    known = known.compress(first_of_each(known))
    return known[max(0, len(known) - newest) :].tobytes()
