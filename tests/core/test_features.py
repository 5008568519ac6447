"""The kernel against two independent answers, plain Python and SQL, and against itself in another order."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import events, features
from service.core.features import Plan
from service.core.spec import FeatureSpec, parse
from tests.core import oracle, sql_oracle

NOW_MS = 1_700_000_000_000  # 2023-11-14 22:13:20 UTC, a Tuesday
DEVICES = ("mobile", "desktop", "tablet")
WINDOWS = ("1ms", "2ms", "50ms", "1s", "30m", "1d", "400d")
PERIODS = (1, 2, 50, 1_000, 1_800_000, 86_400_000, 34_560_000_000)
AGGREGATES = ("count", "sum", "mean", "min", "max", "latest", "distinct", "recency", "tenure", "decay")
# Sums of so few multiples of 1/256 below 2 ** 15 are exact in float64, so that every order of adding gives the same.
EXACT = st.integers(-(2**23), 2**23).map(lambda number: number / 256)
EXACT_OR_NONE = EXACT | st.just(math.nan)

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Visitor:
    """One row: what the feature cache and the request hold at a moment."""

    blob: bytes
    now_ms: int = NOW_MS
    traits: bytes = b""
    context: Mapping[str, object] | None = None


def computed(plan: Plan, visitors: Sequence[Visitor]) -> Matrix:
    """What the kernel gives for all rows at once."""
    records, starts = _joined([visitor.blob for visitor in visitors])
    traits, trait_starts = _joined([visitor.traits for visitor in visitors])
    moments = np.array([visitor.now_ms for visitor in visitors], np.int64)
    coded = [plan.encode_request(visitor.context) for visitor in visitors]
    request = np.array(coded, np.float32).reshape(len(visitors), len(plan.request_columns))
    return features.matrix(plan, records, starts, moments, traits, trait_starts, request)


def _joined(blobs: Sequence[bytes]) -> tuple[events.Records, npt.NDArray[np.int64]]:
    parts = [events.from_bytes(blob) for blob in blobs]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return np.concatenate([np.empty(0, events.RECORD), *parts]), starts


def wanted(spec: FeatureSpec, visitors: Sequence[Visitor]) -> npt.NDArray[np.float64]:
    """What plain Python gives, one row after another."""
    rows = [oracle.features(spec, v.blob, v.now_ms, v.traits, v.context) for v in visitors]
    return np.array(rows, np.float64).reshape(len(visitors), len(spec.features))


def approximate(spec: FeatureSpec, name: str) -> bool:
    """Whether two right answers may differ in the last bits: a power that is not exact takes part."""
    feature: Any = spec.features[name]
    if "ratio" in type(feature).model_fields:
        return any(approximate(spec, operand) for operand in feature.ratio)
    return "decay" in type(feature).model_fields


def assert_equal(spec: FeatureSpec, found: Matrix, right: npt.NDArray[np.float64]) -> None:
    """Bit for bit, the sign of zero and the bits of NaN apart; to 1e-6 relative where a power takes part."""
    assert found.dtype == np.float32
    assert found.shape == right.shape
    for column, name in enumerate(spec.names):
        tolerance = 1e-6 if approximate(spec, name) else 0.0
        np.testing.assert_allclose(
            found[:, column],
            right[:, column],
            rtol=tolerance,
            atol=0,
            equal_nan=True,
            err_msg=repr(spec.features[name]),
        )


# --- What hypothesis draws: specs, then records that sit on the edges of the spec's windows ---


@st.composite
def specs(draw: st.DrawFn, operations: Sequence[str] = AGGREGATES, others: bool = True) -> FeatureSpec:
    codes = draw(st.lists(st.sampled_from([1, 2, 3, 9, 65_000]), min_size=1, max_size=4, unique=True))
    names = [f"kind_{code}" for code in codes]
    windows = [None, *WINDOWS, *(["session"] * 3 if others else [])]
    kinds = st.one_of(st.sampled_from([*names, "any"]), st.lists(st.sampled_from(names), min_size=1, max_size=3))

    @st.composite
    def aggregates(draw: st.DrawFn) -> dict[str, Any]:
        operation = draw(st.sampled_from(operations))
        made = {operation: draw(kinds), "window": draw(st.sampled_from(windows))}
        return made | ({"half_life": draw(st.sampled_from(WINDOWS))} if operation == "decay" else {})

    clocks = st.fixed_dictionaries(
        {
            "clock": st.sampled_from(["hour", "weekday", "day", "month"]),
            "offset": st.sampled_from(["+00:00", "-11:45", "+14:00", "-00:30"]),
        }
    )
    coded = st.sampled_from([None, list(DEVICES), {"mobile": 2.5, "tablet": -1}, ["1", "true"], ["mobile"]])
    outside = st.one_of(
        st.sampled_from([{"session": "count"}, {"session": "duration"}]),
        clocks,
        st.fixed_dictionaries({"trait": st.sampled_from(["device", "age"]), "categories": coded}),
        st.fixed_dictionaries({"request": st.sampled_from(["device", "age"]), "categories": coded}),
    )
    plain = draw(st.lists(st.one_of(aggregates(), outside) if others else aggregates(), min_size=1, max_size=10))
    made = {f"plain_{place}": feature for place, feature in enumerate(plain)}
    priors = st.sampled_from([0, 0.5, 1, 20])
    for place in range(draw(st.integers(0, 3))):
        pair = [draw(st.sampled_from(list(made))), draw(st.sampled_from(list(made)))]
        made[f"ratio_{place}"] = {"ratio": pair, "prior": [draw(priors), draw(priors)]}
    order = draw(st.permutations(list(made)))
    return parse(
        {
            "model": "drawn",
            "events": {name: {"code": code, "event": name} for name, code in zip(names, codes, strict=True)},
            "limits": {
                "history": draw(st.sampled_from(WINDOWS)),
                "records": draw(st.sampled_from([1, 2, 3, 7, 2048])),
                "session_gap": draw(st.sampled_from(WINDOWS)),
            },
            "features": {name: made[name] for name in order},
        }
    )


def _edges(spec: FeatureSpec) -> list[int]:
    """Ages in milliseconds at which something changes: now, the end of each window, history, the session's gap."""
    windows = {getattr(feature, "window", None) for feature in spec.features.values()}
    lengths = {length for length in windows if isinstance(length, int)}
    lengths |= {spec.limits.history, spec.limits.session_gap, 2 * spec.limits.session_gap}
    return sorted({length + near for length in lengths for near in (-1, 0, 1)} | {-86_400_000, -1, 0, 1})


def records(
    spec: FeatureSpec, now_ms: int, values: st.SearchStrategy[float], broken: bool = True
) -> st.SearchStrategy[bytes]:
    """One record: often at an edge, often the twin of another, sometimes of an unknown kind or broken."""
    codes = [kind.code for kind in spec.events.values()]
    ages = st.one_of(st.sampled_from(_edges(spec)), st.integers(-2, 6), st.sampled_from(PERIODS))
    drawn = st.builds(
        lambda age, kind, identifier, attribute, value: events.pack(now_ms - age, kind, identifier, attribute, value),
        ages,
        st.sampled_from([*codes * 4, 4, 0, events.TRAIT_TEXT, 65_001]),
        st.integers(0, 2) | st.just(2**32 - 1),
        st.sampled_from([0, 0, 1, 2, 2**31, 2**32 - 1]),
        values,
    )
    flipped = st.builds(lambda blob, bit: _flip(blob, bit), drawn, st.integers(0, 191))
    return st.integers(0, 9).flatmap(lambda roll: flipped if broken and roll == 0 else drawn)


def _flip(blob: bytes, bit: int) -> bytes:
    return (int.from_bytes(blob, "little") ^ 1 << bit).to_bytes(24, "little")


def trait_records(now_ms: int) -> st.SearchStrategy[bytes]:
    names = st.sampled_from(["device", "device", "age", "else"]).map(events.hash32)
    ages = st.sampled_from([-1, 0, 0, 1, 10**12])
    texts = st.sampled_from([*DEVICES, "true", "watch"]).map(events.hash32)
    numbers = st.sampled_from([0.0, 1.0, 44.5, math.nan])
    text = st.builds(
        lambda a, n, t, v: events.pack(now_ms - a, events.TRAIT_TEXT, n, t, v), ages, names, texts, numbers
    )
    number = st.builds(lambda a, n, v: events.pack(now_ms - a, events.TRAIT_NUMBER, n, 0, v), ages, names, numbers)
    stray = st.builds(lambda a, n: events.pack(now_ms - a, 1, n, 1, 1.0), ages, names)
    return st.one_of(text, number, stray)


contexts: st.SearchStrategy[dict[str, object] | None] = st.none() | st.dictionaries(
    st.sampled_from(["device", "age", "else"]),
    st.sampled_from(["mobile", "tablet", "watch", "1", "", True, False, 1, 1.0, 1.5, -3, 1e39, None, [], {}]),
)


@st.composite
def visitors(draw: st.DrawFn, spec: FeatureSpec, values: st.SearchStrategy[float] = EXACT_OR_NONE) -> Visitor:
    now_ms = NOW_MS + draw(st.sampled_from([0, 1, 86_400_000, -999_999_999_999, 17 * 31_536_000_000]))
    blobs = draw(st.lists(records(spec, now_ms, values), max_size=14))
    torn = draw(st.binary(max_size=23)) if draw(st.booleans()) else b""
    traits = draw(st.lists(trait_records(now_ms), max_size=4))
    return Visitor(b"".join(blobs) + torn, now_ms, b"".join(traits), draw(contexts))


@st.composite
def asked(draw: st.DrawFn) -> tuple[FeatureSpec, list[Visitor]]:
    spec = draw(specs())
    return spec, draw(st.lists(visitors(spec), max_size=4))


# --- Against plain Python ---


@settings(max_examples=350)
@given(asked())
def test_every_feature_equals_plain_python(case: tuple[FeatureSpec, list[Visitor]]) -> None:
    spec, rows = case
    assert_equal(spec, computed(features.compile(spec), rows), wanted(spec, rows))


WILD = ("sum", "mean", "min", "max", "latest")


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(width=32, allow_nan=True, allow_infinity=False)), max_size=30))
def test_sums_of_any_values_are_as_exact_as_float64_adds(rows: list[tuple[int, float]]) -> None:
    spec = of_kind_a({operation: {operation: "a"} for operation in WILD})
    blob = b"".join(events.pack(NOW_MS - age, 1, place, 0, value) for place, (age, value) in enumerate(rows))
    found, right = computed(features.compile(spec), [Visitor(blob)])[0], wanted(spec, [Visitor(blob)])[0]
    np.testing.assert_array_equal(found[2:], right[2:])
    size = math.fsum(abs(value) for _, value in rows if not math.isnan(value))
    np.testing.assert_allclose(found[:2], right[:2], rtol=1e-6, atol=1e-12 * size, equal_nan=True)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 127, 130, 1000, 2048])
def test_sums_are_added_pairwise_over_the_row_in_canonical_order(length: int) -> None:
    spec = of_kind_a({"all": {"sum": "a"}, "late": {"sum": "a", "window": "1s"}, "mean": {"mean": "a"}})
    rng = np.random.default_rng(length)
    large = rng.normal(0, 2**40, length // 2)  # they cancel, so that the last bits of what they add to are seen
    values = rng.permutation([*large, *-large, *rng.normal(0, 1, length % 2)]).astype(np.float32)
    ages = 3 * np.arange(length)[::-1]
    packed = events.records(NOW_MS - ages, np.ones(length), np.arange(length), np.zeros(length), values)
    total, late = (
        np.add.reduceat(np.where(ages < window, values.astype(np.float64), 0.0), [0])[0] for window in (10**9, 1000)
    )
    found = one(spec, rng.permutation(packed).tobytes())
    assert found == [np.float32(number) for number in (total, late, total / length)]


def of_kind_a(of: Mapping[str, Any], **sections: Any) -> FeatureSpec:
    """A spec over two kinds: `a` of code 1 and `b` of code 2."""
    catalogue = {"a": {"code": 1, "event": "A"}, "b": {"code": 2, "event": "B"}}
    return parse({"model": "m", "events": catalogue, "features": dict(of), **sections})


@settings(max_examples=100)
@given(specs(), st.lists(st.tuples(st.binary(max_size=120), st.binary(max_size=60)), min_size=1, max_size=3))
def test_random_bytes_in_the_cache_count_for_nothing(spec: FeatureSpec, blobs: list[tuple[bytes, bytes]]) -> None:
    rows = [Visitor(blob, traits=traits) for blob, traits in blobs]
    assert_equal(spec, computed(features.compile(spec), rows), wanted(spec, rows))


def sealed(ts_ms: int, kind: int, identifier: int, attribute: int, bits: int) -> bytes:
    """A record with any 32 bits for its value and a check that fits."""
    head = struct.pack("<qIIIH", ts_ms, identifier, attribute, bits, kind)
    return next(
        head + struct.pack("<H", check) for check in range(65536) if oracle.intact(head + struct.pack("<H", check))
    )


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001])
def test_bits_that_are_no_finite_number_are_an_absent_value_whoever_wrote_them(bits: int) -> None:
    operations = {operation: {operation: "a"} for operation in ("count", *WILD)}
    spec = of_kind_a({**operations, "age": {"trait": "age"}})
    odd = sealed(NOW_MS - 1, 1, 1, 1, bits)
    opposite = sealed(NOW_MS - 1, 1, 3, 1, bits ^ 0x80000000)
    age = sealed(NOW_MS - 1, events.TRAIT_NUMBER, events.hash32("age"), 0, bits)
    rows = [Visitor(odd + opposite + events.pack(NOW_MS, 1, 2, 1, 4.0), traits=age), Visitor(odd, traits=age)]
    found = computed(features.compile(spec), rows)
    assert_equal(spec, found, wanted(spec, rows))
    np.testing.assert_array_equal(found[0], [3, 4, 4, 4, 4, 4, math.nan])


# --- Against SQL ---


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as made:
        yield made


@st.composite
def asked_of_sql(draw: st.DrawFn) -> tuple[FeatureSpec, list[Visitor]]:
    spec = draw(specs(operations=[kind for kind in sql_oracle.KINDS if kind != "ratio"], others=False))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        now_ms = NOW_MS + draw(st.integers(0, 3))
        blobs = st.lists(records(spec, now_ms, EXACT_OR_NONE, broken=False), max_size=12)
        rows.append(Visitor(b"".join(draw(blobs)), now_ms))
    return spec, rows


@settings(max_examples=80)
@given(case=asked_of_sql())
def test_every_feature_that_sql_can_say_equals_duckdb(
    connection: duckdb.DuckDBPyConnection, case: tuple[FeatureSpec, list[Visitor]]
) -> None:
    spec, rows = case
    joined, starts = _joined([visitor.blob for visitor in rows])
    moments = np.array([visitor.now_ms for visitor in rows], np.int64)
    right = sql_oracle.features(connection, spec, joined, starts, moments)
    assert_equal(spec, features.matrix(features.compile(spec), joined, starts, moments), right)


# --- Against itself ---


ANY_VALUES = st.floats(width=32, allow_infinity=False)


@st.composite
def rearranged(draw: st.DrawFn) -> tuple[FeatureSpec, list[Visitor], list[Visitor]]:
    spec = draw(specs())
    rows = draw(st.lists(visitors(spec, ANY_VALUES), min_size=1, max_size=3))
    return spec, rows, [draw(_rearranged(row)) for row in rows]


@st.composite
def _rearranged(draw: st.DrawFn, row: Visitor) -> Visitor:
    """The same events: in another order, some of them written again, broken and foreign records among them."""
    parts = []
    for blob in (row.blob, row.traits):
        pieces = [blob[start : start + 24] for start in range(0, len(blob) // 24 * 24, 24)]
        again = draw(st.lists(st.sampled_from(pieces), max_size=6)) if pieces else []
        noise = [
            bytes(24),
            b"\xff" * 24,
            events.pack(row.now_ms, 77, 1, 1, 1.0),
            *(_flip(piece, 170) for piece in again),
        ]
        parts.append(b"".join(draw(st.permutations(pieces + again + draw(st.permutations(noise))[:2]))))
    return Visitor(parts[0], row.now_ms, parts[1], row.context)


@settings(max_examples=200)
@given(rearranged())
def test_order_repetition_and_rubbish_do_not_change_a_bit(
    case: tuple[FeatureSpec, list[Visitor], list[Visitor]],
) -> None:
    spec, rows, others = case
    plan = features.compile(spec)
    assert computed(plan, rows).tobytes() == computed(plan, others).tobytes()


@settings(max_examples=100)
@given(rearranged())
def test_a_row_alone_is_the_same_row_of_a_batch_bit_for_bit(
    case: tuple[FeatureSpec, list[Visitor], list[Visitor]],
) -> None:
    spec, rows, others = case
    plan = features.compile(spec)
    together = computed(plan, [*rows, *others, *rows])
    alone = [computed(plan, [row]) for row in [*rows, *others, *rows]]
    assert together.tobytes() == b"".join(row.tobytes() for row in alone)


@settings(max_examples=100)
@given(rearranged(), st.data())
def test_one_blob_or_several_written_by_several_writers_are_the_same_history(
    case: tuple[FeatureSpec, list[Visitor], list[Visitor]], data: st.DataObject
) -> None:
    spec, rows, _ = case
    plan = features.compile(spec)
    merged = []
    for row in rows:
        whole = row.blob[: len(row.blob) // 24 * 24]
        cut = 24 * data.draw(st.integers(0, len(whole) // 24))
        overlap = 24 * data.draw(st.integers(0, 3))
        merged.append(Visitor(whole[max(cut - overlap, 0) :] + whole[:cut], row.now_ms, row.traits, row.context))
    assert computed(plan, rows).tobytes() == computed(plan, merged).tobytes()


@settings(max_examples=100)
@given(asked())
def test_compacting_a_visitor_changes_no_feature(case: tuple[FeatureSpec, list[Visitor]]) -> None:
    spec, rows = case
    plan = features.compile(spec)
    small = [Visitor(events.compact(r.blob, 2048), r.now_ms, events.compact(r.traits, 2048), r.context) for r in rows]
    assert computed(plan, rows).tobytes() == computed(plan, small).tobytes()


@settings(max_examples=100)
@given(asked(), st.integers(1, 10**10))
def test_what_happens_later_never_counts(case: tuple[FeatureSpec, list[Visitor]], later_ms: int) -> None:
    spec, rows = case
    plan = features.compile(spec)
    code = next(iter(spec.events.values())).code
    later = [
        Visitor(
            events.pack(row.now_ms + later_ms, code, 1, 1, 1.0) + row.blob,
            row.now_ms,
            events.pack(row.now_ms + later_ms, events.TRAIT_NUMBER, events.hash32("age"), 0, 9.0) + row.traits,
            row.context,
        )
        for row in rows
    ]
    assert computed(plan, rows).tobytes() == computed(plan, later).tobytes()


# --- Many rows: blocks, and rows that are longer than a block ---

SHOP: dict[str, Any] = {
    "model": "shop",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "cart": {"code": 2, "event": "Product Added", "value": "price", "attribute": "category"},
        "purchase": {"code": 3, "event": "Order Completed", "value": "revenue"},
    },
    "limits": {"history": "90d", "records": 700, "session_gap": "30m"},
    "features": {
        "views_1h": {"count": "view", "window": "1h"},
        "views_7d": {"count": "view", "window": "7d"},
        "carts_7d": {"count": "cart", "window": "7d"},
        "spend": {"sum": "purchase"},
        "mean_price": {"mean": ["view", "cart"], "window": "30d"},
        "cheapest": {"min": "any", "window": "30d"},
        "dearest": {"max": "view", "window": "7d"},
        "categories": {"distinct": ["view", "cart"], "window": "7d"},
        "session_categories": {"distinct": "view", "window": "session"},
        "last_price": {"latest": "view"},
        "since_view": {"recency": "view"},
        "known_for": {"tenure": "any"},
        "session_views": {"count": "view", "window": "session"},
        "session_events": {"session": "count"},
        "session_length": {"session": "duration"},
        "fading": {"decay": "view", "half_life": "1d"},
        "cart_rate": {"ratio": ["carts_7d", "views_7d"], "prior": [1, 20]},
        "hour": {"clock": "hour"},
        "device": {"trait": "device", "categories": list(DEVICES)},
        "referrer": {"request": "referrer", "categories": ["search", "ads"]},
    },
}


def shoppers(lengths: Sequence[int], seed: int) -> list[Visitor]:
    """Rows of so many events each, a third of them in order, the others shuffled and with repeated events."""
    rng = random.Random(seed)
    rows = []
    for place, length in enumerate(lengths):
        now_ms = NOW_MS + rng.randrange(10**9)
        packed = sorted(
            events.pack(
                now_ms - min(int(rng.expovariate(1 / 2e9)), rng.randrange(10**10)),
                rng.choice([1, 1, 1, 2, 3, 8]),
                rng.randrange(2**32),
                rng.randrange(6),
                rng.choice([math.nan, rng.randrange(10**7) / 256]),
            )
            for _ in range(length)
        )
        packed.sort(key=lambda record: struct.unpack("<qIIfH", record[:22])[0])
        if place % 3:
            packed += packed[: length // 5]
            rng.shuffle(packed)
        device = events.pack(now_ms - 5, events.TRAIT_TEXT, events.hash32("device"), events.hash32("tablet"), math.nan)
        rows.append(Visitor(b"".join(packed), now_ms, device * (place % 2), {"referrer": rng.choice(["ads", "tv"])}))
    return rows


BATCHES: Mapping[str, Callable[[], list[int]]] = {
    "many short rows": lambda: [length % 23 for length in range(600)],
    "a row longer than a block": lambda: [3, features.BLOCK_EVENTS + 100, 0, 5],
    "only long rows": lambda: [features.BLOCK_EVENTS + 1, 2 * features.BLOCK_EVENTS],
    "rows that fill a block to the last event": lambda: [features.BLOCK_EVENTS // 4] * 5,
    "empty rows about": lambda: [0, 0, 40, 0, 0, 1300, 0],
    "no events at all": lambda: [0] * 50,
    "no rows": list,
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_many_rows_equals_plain_python_and_each_row_alone(name: str) -> None:
    spec = parse(SHOP)
    plan = features.compile(spec)
    rows = shoppers(BATCHES[name](), seed=len(name))
    found = computed(plan, rows)
    assert_equal(spec, found, wanted(spec, rows))
    assert found.tobytes() == b"".join(computed(plan, [row]).tobytes() for row in rows)


@pytest.mark.parametrize("every", [1, 40])
def test_few_events_of_short_windows_are_looked_at_apart_and_give_the_same(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every so many rows the events are of the last weeks, of the others long ago."""
    spec = parse({**SHOP, "limits": {"history": "90d", "records": 2048}})
    plan = features.compile(spec)
    rng, day_ms, rows = random.Random(every), 86_400_000, []
    for place in range(1000):
        oldest = (40 if place % every == 0 else 89) * day_ms
        ages = sorted((rng.randrange(oldest - 40 * day_ms, oldest) for _ in range(20)), reverse=True)
        kinds, attributes = rng.choices([1, 1, 1, 2, 3], k=20), rng.choices(range(6), k=20)
        packed = [
            events.pack(NOW_MS - age, kind, rng.randrange(2**32), attribute, rng.gauss(0, 1))
            for age, kind, attribute in zip(ages, kinds, attributes, strict=True)
        ]
        rows.append(Visitor(b"".join(packed)))
    apart: list[int] = []
    reduce_apart = features._reduce_apart

    def noted(plan: features.Plan, taken: Any, places: Any, made: Any) -> None:
        apart.append(len(places))
        reduce_apart(plan, taken, places, made)

    monkeypatch.setattr(features, "_reduce_apart", noted)
    found = computed(plan, rows)
    assert bool(apart) == (every > 1)
    assert all(apart)
    assert_equal(spec, found, wanted(spec, rows))
    assert found.tobytes() == b"".join(computed(plan, [row]).tobytes() for row in rows)


def test_more_empty_rows_than_a_block_has_events_are_all_answered() -> None:
    spec = of_kind_a({"n": {"count": "a"}, "since": {"recency": "a"}})
    count = 2 * features.BLOCK_EVENTS + 3
    last = events.records([NOW_MS], [1], [1], [0], [1.0])
    starts = np.zeros(count + 1, np.int64)
    starts[-1] = 1
    found = features.matrix(features.compile(spec), last, starts, np.full(count, NOW_MS))
    assert not found[:-1, 0].any()
    assert np.isnan(found[:-1, 1]).all()
    assert found[-1].tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_big_rows_of_any_values_do_not_depend_on_order_or_company(seed: int) -> None:
    rng = random.Random(seed)
    spec = parse({**SHOP, "limits": {"history": "90d", "records": 2048}})
    plan = features.compile(spec)
    rows = []
    for length in (0, 7, 8, 9, 127, 128, 129, 1000, 2047, 2048, 2500):
        packed = [
            events.pack(
                NOW_MS - rng.randrange(10**10),
                1 + rng.randrange(3),
                place,
                1,
                rng.gauss(0, 1) * 10.0 ** rng.randrange(-9, 9),
            )
            for place in range(length)
        ]
        rows.append((packed, rng.sample(packed, len(packed)) + packed[:50]))
    found = computed(plan, [Visitor(b"".join(packed)) for packed, _ in rows])
    assert found.tobytes() == computed(plan, [Visitor(b"".join(other)) for _, other in rows]).tobytes()
    assert found.tobytes() == b"".join(computed(plan, [Visitor(b"".join(packed))]).tobytes() for packed, _ in rows)


# --- By hand: the numbers a person would work out ---


def at(age_ms: int, kind: int = 1, identifier: int = 0, attribute: int = 0, value: float = math.nan) -> bytes:
    return events.pack(NOW_MS - age_ms, kind, identifier, attribute, value)


def one(spec: FeatureSpec, *blobs: bytes, **row: Any) -> list[float]:
    """The features of one visitor, as Python numbers."""
    numbers: list[float] = computed(features.compile(spec), [Visitor(b"".join(blobs), **row)])[0].tolist()
    return numbers


def test_a_window_holds_now_and_not_its_own_age() -> None:
    spec = of_kind_a({"n": {"count": "a", "window": "1s"}}, limits={"history": "2s"})
    assert [one(spec, at(age)) for age in (-1, 0, 1, 999, 1000, 1001)] == [[0], [1], [1], [1], [0], [0]]


def test_history_ends_like_a_window_and_shortens_longer_windows() -> None:
    spec = of_kind_a({"n": {"count": "a", "window": "1d"}, "m": {"count": "a"}}, limits={"history": "2s"})
    assert [one(spec, at(age)) for age in (0, 1999, 2000)] == [[1, 1], [1, 1], [0, 0]]


def test_the_same_instant_holds_different_events_of_different_kind_or_id() -> None:
    spec = of_kind_a({"a": {"count": "a"}, "any": {"count": "any"}, "sum": {"sum": "any"}})
    blobs = [at(5, 1, 1, 0, 2.0), at(5, 1, 2, 0, 3.0), at(5, 2, 1, 0, 5.0), at(5, 1, 1, 0, 2.0)]
    assert one(spec, *blobs) == [2, 3, 10]


def test_of_two_records_of_one_event_the_smaller_content_counts() -> None:
    spec = of_kind_a({"sum": {"sum": "a"}, "kinds": {"distinct": "a"}})
    for blobs in ([at(5, 1, 1, 7, 2.0), at(5, 1, 1, 8, 1.0)], [at(5, 1, 1, 8, 1.0), at(5, 1, 1, 7, 2.0)]):
        assert one(spec, *blobs) == [2.0, 1]


def test_only_the_latest_records_count_after_repeats_are_dropped() -> None:
    spec = of_kind_a({"n": {"count": "any"}, "sum": {"sum": "any"}, "age": {"tenure": "any"}}, limits={"records": 2})
    blobs = [at(3000, 1, 1, 0, 1.0), at(2000, 2, 2, 0, 2.0), at(1000, 1, 3, 0, 4.0)]
    assert one(spec, *blobs, *blobs[1:] * 3, at(500, 9, 9)) == [2, 6, 2]


def test_nothing_known_is_zero_of_what_is_counted_and_nan_of_the_rest() -> None:
    counted = {"count": "a"}, {"sum": "a"}, {"distinct": "a"}, {"decay": "a", "half_life": "1d"}
    sessions = {"session": "count"}, {"session": "duration"}
    rest = [{operation: "a"} for operation in ("mean", "min", "max", "latest", "recency", "tenure")]
    outside = {"trait": "t"}, {"request": "r"}
    spec = of_kind_a({f"f{place}": made for place, made in enumerate([*counted, *sessions, *rest, *outside])})
    found = one(spec)
    assert found[:6] == [0] * 6
    assert np.isnan(found[6:]).all()


def test_an_event_without_a_value_counts_but_is_no_value() -> None:
    spec = of_kind_a({"n": {"count": "a"}, "mean": {"mean": "a"}, "last": {"latest": "a"}, "since": {"recency": "a"}})
    assert one(spec, at(3000, value=10.0), at(2000, value=20.0), at(1000)) == [3, 15, 20, 1]


def test_the_session_goes_back_from_now_to_the_first_gap() -> None:
    of = {
        "events": {"session": "count"},
        "length": {"session": "duration"},
        "a": {"count": "a", "window": "session"},
        "oldest": {"tenure": "b", "window": "session"},
    }
    spec = of_kind_a(of, limits={"session_gap": "1m"})
    blobs = [at(59_999), at(59_999 + 59_999, 2), at(119_998 + 60_000, 2), at(180_000)]
    assert one(spec, *blobs) == [2, float(np.float32(119.998)), 1, float(np.float32(119.998))]
    assert one(spec, *blobs, at(-1))[:2] == [2, float(np.float32(119.998))], "a later event does not reach back"
    ended = one(spec, at(60_000), at(60_001))
    assert ended[:3] == [0, 0, 0]
    assert math.isnan(ended[3])
    assert one(spec, at(0))[:2] == [1, 0]


def test_nothing_that_began_now_has_a_negative_age() -> None:
    spec = of_kind_a({"t": {"tenure": "a"}, "d": {"session": "duration"}, "r": {"recency": "a"}, "m": {"max": "a"}})
    found = one(spec, at(0, value=0.0))
    assert found == [0, 0, 0, 0]
    assert not np.signbit(found).any(), "-0.0 would be seen in JSON"


def test_decay_halves_with_every_half_life() -> None:
    spec = of_kind_a({"d": {"decay": "a", "half_life": "1d"}})
    day = 86_400_000
    assert one(spec, at(0), at(day), at(2 * day, identifier=1), at(2 * day, identifier=2)) == [2.0]


def test_a_ratio_is_of_the_two_columns_with_its_prior() -> None:
    of = {
        "of_ratios": {"ratio": ["plain", "smoothed"]},
        "smoothed": {"ratio": ["b", "a"], "prior": [1, 20]},
        "plain": {"ratio": ["b", "a"]},
        "a": {"count": "a"},
        "b": {"count": "b"},
    }
    spec = of_kind_a(of)
    found = one(spec, *(at(age, 1) for age in range(4)), at(9, 2))
    assert found[1:] == [float(np.float32(2 / 24)), 0.25, 4, 1]
    assert found[0] == float(np.float32(0.25 / float(np.float32(2 / 24))))
    nothing = one(spec)
    assert math.isnan(nothing[2])
    assert nothing[1] == float(np.float32(1 / 20))
    assert one(spec, at(1, 2))[2] == math.inf


@pytest.mark.parametrize(
    ("now_ms", "offset", "clock"),
    [
        (NOW_MS, "+00:00", [22, 1, 14, 11]),
        (NOW_MS, "+02:00", [0, 2, 15, 11]),
        (1_709_251_199_999, "+00:00", [23, 3, 29, 2]),
        (1_709_251_199_999, "+00:01", [0, 4, 1, 3]),
        (1_704_067_200_000, "-00:30", [23, 6, 31, 12]),
        (0, "+00:00", [0, 3, 1, 1]),
    ],
)
def test_the_clock_shows_the_local_hour_weekday_day_and_month(now_ms: int, offset: str, clock: list[int]) -> None:
    parts = ("hour", "weekday", "day", "month")
    spec = of_kind_a({part: {"clock": part, "offset": offset} for part in parts})
    assert one(spec, now_ms=now_ms) == clock


def trait(name: str, value: str | float, age_ms: int = 0) -> bytes:
    if isinstance(value, str):
        return events.pack(NOW_MS - age_ms, events.TRAIT_TEXT, events.hash32(name), events.hash32(value), math.nan)
    return events.pack(NOW_MS - age_ms, events.TRAIT_NUMBER, events.hash32(name), 0, value)


def test_the_latest_trait_up_to_now_wins() -> None:
    spec = of_kind_a({"tier": {"trait": "tier", "categories": ["none", "gold"]}, "age": {"trait": "age"}})
    traits = [trait("tier", "gold", 2), trait("tier", "none", 3), trait("tier", "none", -1), trait("age", 44.5, 10**11)]
    assert one(spec, traits=b"".join(traits)) == [1, 44.5]


def test_a_broken_trait_record_is_skipped() -> None:
    spec = of_kind_a({"age": {"trait": "age"}})
    later = trait("age", 45.0)
    for bit in range(192):
        assert one(spec, traits=trait("age", 44.5, 1) + _flip(later, bit)) == [44.5]


def test_of_two_values_of_a_trait_at_one_instant_the_same_one_wins_in_any_order_and_compacted() -> None:
    spec = of_kind_a({"tier": {"trait": "tier", "categories": ["none", "gold"]}, "age": {"trait": "age"}})
    traits = [trait("tier", "gold"), trait("tier", "none"), trait("age", 44.5), trait("age", -1.0)]
    smaller = [float(events.hash32("none") > events.hash32("gold")), 44.5]  # -1.0 has the larger bits
    for blob in (b"".join(traits), b"".join(reversed(traits))):
        assert one(spec, traits=blob) == smaller
        assert one(spec, traits=events.compact(blob, 2048)) == smaller


def test_a_trait_kept_as_text_still_has_its_number() -> None:
    spec = of_kind_a({"children": {"trait": "c"}, "many": {"trait": "c", "categories": [0, 1, 2, 3]}})
    both = events.pack(NOW_MS, events.TRAIT_TEXT, events.hash32("c"), events.hash32("2"), 2.0)
    assert one(spec, traits=both) == [2, 2]


def test_a_category_has_its_place_or_its_number_and_another_one_has_its_own() -> None:
    listed = {"categories": ["mobile", "desktop"]}
    numbered = {"categories": {"mobile": -2.5, "desktop": 8}}
    of = {"t": {"trait": "d", **listed}, "u": {"trait": "d", **numbered}, "v": {"trait": "d"}}
    of |= {"w": {"request": "d", **listed}, "x": {"request": "d", **numbered}, "y": {"request": "d"}}
    spec = of_kind_a(of)
    nan = math.nan
    for device, row in (("mobile", [0, -2.5, nan]), ("desktop", [1, 8, nan]), ("watch", [2, nan, nan])):
        found = one(spec, traits=trait("d", device), context={"d": device})
        np.testing.assert_array_equal(found, row + row)


def test_two_traits_share_a_category_without_sharing_its_code() -> None:
    of = {"a": {"trait": "a", "categories": ["yes", "no"]}, "b": {"trait": "b", "categories": ["no", "yes"]}}
    assert one(of_kind_a(of), traits=trait("a", "no") + trait("b", "no")) == [1, 0]


@pytest.mark.parametrize(
    ("value", "number", "coded"),
    [
        (True, 1.0, 0),
        (False, 0.0, 3),
        (1, 1.0, 1),
        (1.0, 1.0, 1),
        (2.5, 2.5, 2),
        ("1", math.nan, 1),
        ("2.5", math.nan, 2),
        (None, math.nan, math.nan),
        ([1], math.nan, math.nan),
        ({}, math.nan, math.nan),
        (1e39, math.nan, 3),
        (10**400, math.nan, 3),
        (math.nan, math.nan, math.nan),
    ],
)
def test_a_request_value_is_its_number_or_its_category_or_nan(value: object, number: float, coded: float) -> None:
    of = {"number": {"request": "r"}, "coded": {"request": "r", "categories": [True, 1.0, 2.5]}}
    np.testing.assert_array_equal(one(of_kind_a(of), context={"r": value}), [number, coded])


def test_without_traits_and_request_their_features_are_nan() -> None:
    spec = parse(SHOP)
    none = np.empty(0, events.RECORD)
    found = features.matrix(features.compile(spec), none, np.array([0, 0]), np.array([NOW_MS]))
    assert np.isnan(found[0, -2:]).all()


def test_a_sum_too_large_for_float32_is_infinite_without_a_warning() -> None:
    spec = of_kind_a({"s": {"sum": "a"}, "t": {"sum": "b"}, "r": {"ratio": ["m", "t"]}, "m": {"mean": "a"}})
    blobs = [at(1, 1, 1, 0, 3e38), at(1, 1, 2, 0, 3e38), at(1, 2, 1, 0, 1e-30)]
    assert one(spec, *blobs) == [math.inf, float(np.float32(1e-30)), math.inf, float(np.float32(3e38))]


def test_a_spec_without_events_has_features_of_the_moment_only() -> None:
    of = {"hour": {"clock": "hour"}, "n": {"count": "any"}, "last": {"latest": "any"}, "s": {"session": "count"}}
    spec = parse({"model": "m", "features": of})
    np.testing.assert_array_equal(one(spec, at(1)), [22, 0, math.nan, 0])


def test_the_largest_catalogue_is_told_apart() -> None:
    catalogue = {f"k{code}": {"code": code, "event": f"E{code}"} for code in range(1, 251)}
    of = {f"n{code}": {"count": f"k{code}"} for code in (1, 128, 249, 250)}
    spec = parse({"model": "m", "events": catalogue, "features": {**of, "any": {"count": "any"}}})
    blobs = [at(1, code, place) for code in (1, 128, 249, 250, 251, 506) for place in range(code % 5 + 1)]
    assert one(spec, *blobs) == [2, 4, 5, 1, 12]


def test_a_long_chain_of_ratios_compiles() -> None:
    chain = {f"r{place}": {"ratio": [f"r{place - 1}", "n"]} for place in range(1500, 0, -1)}
    spec = of_kind_a({**chain, "r0": {"ratio": ["n", "n"]}, "n": {"count": "a"}})
    assert one(spec, at(1))[0] == 1


def test_records_of_every_second_place_in_memory_give_the_same() -> None:
    plan = features.compile(parse(SHOP))
    rows, starts = _joined([visitor.blob for visitor in shoppers([40], seed=1)])
    now_ms = np.array([NOW_MS + 10**9])
    twice = np.repeat(rows, 2)[::2]
    assert (
        features.matrix(plan, twice, starts, now_ms).tobytes() == features.matrix(plan, rows, starts, now_ms).tobytes()
    )
