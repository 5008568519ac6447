"""Event records: the 24 bytes, their check, their hashes and their order."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import struct

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import events
from tests.core import oracle, sql_oracle

# The layout of the feature cache: what is stored today must be readable for as long as anyone keeps it.
GOLDEN = {
    (1_700_000_000_000, 3, 0x12345678, 0x9ABCDEF0, 19.99): "0068e5cf8b01000078563412f0debc9a85eb9f41030089c2",
    (0, 1, 1, 0, 0.0): "0000000000000000010000000000000000000000010025f3",
    (-1, 65000, 0xFFFFFFFF, 0xFFFFFFFF, -1.5): "ffffffffffffffffffffffffffffffff0000c0bfe8fd2eab",
    (1_700_000_000_000, events.TRAIT_TEXT, 7, 9, math.nan): "0068e5cf8b01000007000000090000000000c07fffff06af",
}
FLOAT32_MAX = float(np.finfo(np.float32).max)
# MD5 of this text starts with four zero bytes.
HASHES_TO_ZERO = "00005b9f9446"

uint32 = st.integers(0, 2**32 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
kinds = st.integers(0, 65535)
numbers = st.one_of(st.floats(), st.floats(width=32), st.integers(-(10**6), 10**6).map(float))
fields = st.tuples(int64, kinds, uint32, uint32, numbers)


@pytest.mark.parametrize(("event", "layout"), GOLDEN.items())
def test_a_record_keeps_its_24_bytes(event: tuple[int, int, int, int, float], layout: str) -> None:
    assert events.pack(*event).hex() == layout
    assert events.records(*([field] for field in event)).tobytes().hex() == layout


def test_a_record_of_the_layout_is_read_back_field_by_field() -> None:
    blob = bytes.fromhex(next(iter(GOLDEN.values())))
    (record,) = events.from_bytes(blob)
    assert events.RECORD_BYTES == 24
    assert record["ts_ms"] == 1_700_000_000_000
    assert (record["kind"], record["id"], record["attribute"]) == (3, 0x12345678, 0x9ABCDEF0)
    assert record["value"] == np.float32(19.99)
    assert events.valid(events.from_bytes(blob)).all()


@settings(max_examples=200)
@given(st.lists(fields, max_size=20))
def test_one_record_packed_alone_is_the_same_record_of_an_array(rows: list[tuple[int, int, int, int, float]]) -> None:
    columns = zip(*rows, strict=True) if rows else ([] for _ in range(5))
    made = events.records(*(list(column) for column in columns))
    assert b"".join(events.pack(*row) for row in rows) == made.tobytes()
    assert events.valid(made).all()
    assert all(oracle.intact(made[place : place + 1].tobytes()) for place in range(len(made)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan, 1e39, -1e300, FLOAT32_MAX * 1.01])
def test_a_value_that_float32_cannot_hold_is_absent_with_the_same_bits(value: float) -> None:
    assert events.pack(0, 1, 1, 1, value) == events.pack(0, 1, 1, 1, math.nan)
    assert events.records([0], [1], [1], [1], [value]).tobytes() == events.pack(0, 1, 1, 1, math.nan)
    assert events.content_id(5, value) == events.content_id(5, math.nan)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_fall_the_same_way_alone_and_in_an_array(sign: int) -> None:
    half_a_step = 2.0**103
    for value in (
        FLOAT32_MAX,
        math.nextafter(FLOAT32_MAX, math.inf),
        math.nextafter(FLOAT32_MAX + half_a_step, 0.0),
        FLOAT32_MAX + half_a_step,
    ):
        assert events.pack(0, 1, 1, 1, sign * value) == events.records([0], [1], [1], [1], [sign * value]).tobytes()


def test_every_single_bit_flip_is_detected() -> None:
    for event in GOLDEN:
        blob = events.pack(*event)
        flipped = [
            (int.from_bytes(blob, "little") ^ 1 << bit).to_bytes(24, "little") for bit in range(8 * events.RECORD_BYTES)
        ]
        assert not events.valid(events.from_bytes(b"".join(flipped))).any()


@settings(max_examples=200)
@given(fields, st.integers(0, 191))
def test_a_bit_flip_of_any_record_is_detected(event: tuple[int, int, int, int, float], bit: int) -> None:
    flipped = int.from_bytes(events.pack(*event), "little") ^ 1 << bit
    assert not events.valid(events.from_bytes(flipped.to_bytes(24, "little"))).any()


def test_rubbish_passes_the_check_once_in_65536() -> None:
    rubbish = random.Random(1).randbytes(24 * 2_000_000)
    passed = int(events.valid(events.from_bytes(rubbish)).sum())
    assert 10 <= passed <= 60  # 30.5 expected
    assert not events.valid(events.from_bytes(bytes(24))).any()
    assert not events.valid(events.from_bytes(b"\xff" * 24)).any()


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_judged_as_the_definition_says(blob: bytes) -> None:
    known = events.from_bytes(blob)
    assert len(known) == len(blob) // 24
    verdicts = [oracle.intact(blob[24 * place : 24 * place + 24]) for place in range(len(known))]
    assert events.valid(known).tolist() == verdicts


def test_a_torn_tail_is_left_out() -> None:
    whole = events.pack(1, 1, 1, 1, 1.0) + events.pack(2, 1, 2, 1, 1.0)
    for cut in range(24):
        assert len(events.from_bytes(whole[: 24 + cut])) == 1
        assert events.valid(events.from_bytes(whole[: 24 + cut])).all()


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=80), max_size=5))
def test_joined_blobs_are_the_whole_records_of_each_one_after_another(blobs: list[bytes]) -> None:
    joined, starts = events.join(blobs)
    assert starts.dtype == np.int64
    parts = [joined[first:end].tobytes() for first, end in itertools.pairwise(starts)]
    assert parts == [blob[: len(blob) // 24 * 24] for blob in blobs]
    assert len(joined) == starts[-1]


def test_misaligned_bytes_are_read_but_no_record_of_them_is_believed() -> None:
    blob = b"".join(events.pack(1_700_000_000_000 + place, 1, place, 7, 2.5) for place in range(64))
    for shift in range(1, 24):
        assert not events.valid(events.from_bytes(blob[shift:])).any()
    # The same records at an odd address, as they come out of a network buffer, are all there.
    assert events.valid(events.from_bytes(memoryview(b"x" + blob)[1:])).all()  # type: ignore[arg-type]


def test_records_that_do_not_lie_one_after_another_in_memory_can_be_checked() -> None:
    made = events.records([1, 2, 3, 4], [1] * 4, [1, 2, 3, 4], [0] * 4, [1.0] * 4)
    assert events.valid(made[::2]).tolist() == [True, True]
    assert events.valid(made[::-1]).all()


@settings(max_examples=200)
@given(uint32, numbers)
def test_the_id_from_content_is_the_same_alone_and_in_an_array(attribute: int, value: float) -> None:
    (made,) = events.records([0], [1], [1], [attribute], [value])
    ids = events.content_ids(np.array([1, attribute], "<u4"), np.array([1, made["value"]], "<f4"))
    assert events.content_id(attribute, value) == ids[1]


def test_the_id_from_content_is_pinned_and_spreads() -> None:
    assert events.content_id(0, math.nan) == 3_936_106_335
    assert events.content_id(0x9ABCDEF0, 19.99) == 139_910_856
    assert events.content_id(3, 0.0) == events.content_id(3, -0.0), "equal values make equal ids"
    quiet, other = np.array([0x7FC00000, 0xFFC12345], "<u4").view("<f4")
    assert (
        len({int(events.content_ids(np.array([9], "<u4"), np.array([nan], "<f4"))[0]) for nan in (quiet, other)}) == 1
    )
    prices = (np.arange(100_000) / 100).astype(np.float32)
    assert len(np.unique(events.content_ids(np.full(len(prices), 5, "<u4"), prices))) > 99_990


def test_the_hash_of_a_text_is_pinned() -> None:
    assert events.hash32("") == 0xD98C1DD4
    assert events.hash32("mobile") == struct.unpack("<I", hashlib.md5(b"mobile").digest()[:4])[0]
    assert events.hash32("Größe 🎈") == int.from_bytes(hashlib.md5("Größe 🎈".encode()).digest()[:4], "little")


def test_no_text_has_the_hash_that_means_absent() -> None:
    assert hashlib.md5(HASHES_TO_ZERO.encode()).digest()[:4] == bytes(4)
    assert events.hash32(HASHES_TO_ZERO) == 1


def test_a_lone_surrogate_can_be_hashed() -> None:
    assert 0 < events.hash32("\ud800") < 2**32


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=40))
def test_the_hash_of_a_text_is_the_one_that_duckdb_computes(texts: list[str]) -> None:
    texts = [*texts, HASHES_TO_ZERO]
    query = f"SELECT {sql_oracle.HASH32.format('text')} FROM (SELECT unnest(?) AS text)"
    with duckdb.connect() as connection:
        hashes = [row[0] for row in connection.execute(query, [texts]).fetchall()]
        assert connection.execute(f"SELECT {sql_oracle.HASH32.format('NULL')}").fetchone() == (None,)
    assert hashes == [events.hash32(text) for text in texts]


def test_the_canonical_order_is_row_time_kind_id_then_content() -> None:
    rng = random.Random(2)
    rows = [
        (rng.randrange(2), rng.randrange(3), rng.randrange(3), rng.randrange(3), rng.randrange(2), rng.choice([-1, 2]))
        for _ in range(500)
    ]
    row, ts_ms, kind, identifier, attribute, value = (list(column) for column in zip(*rows, strict=True))
    made = events.records(ts_ms, kind, identifier, attribute, value)
    order = events.canonical_order(made, np.array(row))
    bits = made["value"].view("<u4").tolist()
    keys = list(zip(row, ts_ms, kind, identifier, attribute, bits, strict=True))
    assert [keys[place] for place in order] == sorted(keys)
    first = events.first_of_each(made[order], np.array(row)[order])
    assert int(first.sum()) == len({key[:4] for key in keys})


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2), numbers)), st.data()
)
def test_compacting_keeps_each_event_once_and_the_latest_ones(
    rows: list[tuple[int, int, int, int, float]], data: st.DataObject
) -> None:
    packed = [events.pack(*row) for row in rows]
    broken = data.draw(st.lists(st.binary(min_size=24, max_size=24), max_size=3))
    blob = b"".join(data.draw(st.permutations(packed + broken))) + data.draw(st.binary(max_size=23))
    newest = data.draw(st.integers(0, len(rows) + 1))
    kept = oracle.decode(b"".join(packed) + b"".join(broken))
    compacted = events.compact(blob, newest)
    assert oracle.decode(compacted) == (kept[-newest:] if newest else [])
    assert len(compacted) == 24 * min(newest, len(kept))
    assert events.compact(compacted, newest) == compacted
