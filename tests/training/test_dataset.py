"""Training rows: the right moments, nothing of the future in a feature, nothing of one part's label in another part."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import ingest
from service.core import events, features, spec
from service.core.errors import PropensityError
from service.core.spec import FeatureSpec
from training import dataset, source
from training.dataset import Dataset, Split, TooLittleData, View
from training.partition import Partition
from training.source import EventLog

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS

DOCUMENT: dict[str, Any] = {
    "model": "shop",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "order": {"code": 2, "event": "Order Completed", "value": "revenue"},
    },
    "limits": {"history": "3d", "records": 8, "session_gap": "30m"},
    "label": {"event": "order", "horizon": "1d"},
    "rows": {"per_visitor": 1000},
    "features": {
        "views_1d": {"count": "view", "window": "1d"},
        "orders": {"count": "order"},
        "spend": {"sum": "order", "window": "2d"},
        "prices": {"mean": "view"},
        "categories": {"distinct": "view"},
        "since_view": {"recency": "view"},
        "tenure": {"tenure": "any"},
        "session": {"session": "count"},
        "decay": {"decay": "any", "half_life": "6h"},
        "rate": {"ratio": ["orders", "views_1d"], "prior": [1, 5]},
        "hour": {"clock": "hour"},
        "device": {"trait": "device", "categories": ["mobile", "desktop"]},
        "referrer": {"request": "referrer", "categories": ["ads", "mail"]},
    },
}

Rows = dict[tuple[int, int], tuple[bytes, bool]]


def shop(**changes: Any) -> FeatureSpec:
    return spec.parse({**DOCUMENT, **changes})


def event(visitor: str, at_ms: int, name: str = "Product Viewed", **members: Any) -> dict[str, Any]:
    return {"userId": visitor, "event": name, "timestamp": at_ms, **members}


def order(visitor: str, at_ms: int, **members: Any) -> dict[str, Any]:
    return event(visitor, at_ms, "Order Completed", **members)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., EventLog]:
    """A function that writes events to files, in as many as asked for, and reads them."""

    def read(spec: FeatureSpec, sent: Sequence[dict[str, Any]], files: int = 1) -> EventLog:
        directory = tmp_path / f"{random.getrandbits(64):x}"
        (directory / "work").mkdir(parents=True)
        for number in range(files):
            lines = "".join(json.dumps(item) + "\n" for item in sent[number::files])
            (directory / f"{number}.ndjson").write_text(lines)
        paths = [str(directory / f"{number}.ndjson") for number in range(files)]
        return source.read(paths, spec, directory / "work", now_ms=NOW_MS)

    return read


Read = Callable[..., EventLog]


def random_events(seed: int, visitors: int = 40, each: int = 30, days: int = 8) -> list[dict[str, Any]]:
    """Visits with ties, duplicates and late events, over `days`."""
    chance = random.Random(seed)
    sent: list[dict[str, Any]] = []
    for visitor in range(visitors):
        at_ms = NOW_MS - days * DAY_MS + chance.randrange(4 * DAY_MS)
        for _ in range(chance.randrange(1, each)):
            at_ms += chance.choice((0, 1, 1000, 60_000, HOUR_MS, DAY_MS // 2))
            item = event(f"v{visitor}", at_ms) if chance.random() < 0.8 else order(f"v{visitor}", at_ms)
            item["messageId"] = f"m{len(sent)}"
            item["properties"] = {"price": chance.randrange(1, 50), "category": chance.choice("abc"), "revenue": 9.5}
            item["context"] = {"device": chance.choice(("mobile", "desktop")), "referrer": chance.choice(("ads", "x"))}
            sent.append(item)
    sent = [item for item in sent if item["timestamp"] < NOW_MS]
    sent += chance.sample(sent, len(sent) // 20)
    chance.shuffle(sent)
    return sent


def visitor_hash(visitor: str) -> int:
    return int(duckdb.execute("SELECT hash(?::VARCHAR)", [visitor]).fetchall()[0][0])


def rows_of(made: Dataset) -> Rows:
    found = {
        (int(visitor), int(cutoff)): (vector.tobytes(), bool(label))
        for visitor, cutoff, vector, label in zip(made.visitor, made.cutoff_ms, made.matrix, made.label, strict=True)
    }
    assert len(found) == len(made), "a moment is taken once"
    return found


def brute_force(spec: FeatureSpec, sent: Sequence[dict[str, Any]], until_ms: int | None = None) -> Rows:
    """Every row there can be, made one at a time from what the service would have kept until its moment.

    Moments until the last that matured, or another.
    """
    plan, catalogue = features.compile(spec), ingest.catalogue([spec])
    label = spec.label
    assert label is not None
    assert label.horizon is not None
    matured = max(item["timestamp"] for item in sent) - label.horizon if until_ms is None else until_ms
    made: Rows = {}
    for visitor in {item["userId"] for item in sent}:
        own = sorted((item for item in sent if item["userId"] == visitor), key=lambda item: item["timestamp"])
        asked = {item["timestamp"]: item for item in own if spec_kind(spec, item) in asked_kinds(spec)}
        asked |= {own[0]["timestamp"] - 1: own[0]} if spec.rows.cold_start else {}
        for cutoff in filter(lambda cutoff: cutoff <= matured, asked):
            past = [ingest.parse(catalogue, item, NOW_MS) for item in own if item["timestamp"] <= cutoff]
            assert all(isinstance(kept, ingest.Accepted) for kept in past)
            records = events.from_bytes(b"".join(kept.events for kept in past if isinstance(kept, ingest.Accepted)))
            traits = events.from_bytes(b"".join(kept.traits for kept in past if isinstance(kept, ingest.Accepted)))
            vector = features.matrix(
                plan,
                records,
                np.array([0, len(records)]),
                np.array([cutoff]),
                traits,
                np.array([0, len(traits)]),
                np.array([plan.encode_request(asked[cutoff].get("context"))], np.float32),
            )
            bought = any(
                spec_kind(spec, item) == label.event and cutoff < item["timestamp"] <= cutoff + label.horizon
                for item in own
            )
            made[visitor_hash(visitor), cutoff] = (vector[0].tobytes(), bought)
    return made


def spec_kind(spec: FeatureSpec, item: dict[str, Any]) -> str:
    return next(name for name, kind in spec.events.items() if kind.event == item["event"])


def asked_kinds(spec: FeatureSpec) -> set[str]:
    return set(spec.events) if "any" in spec.rows.after else set(spec.rows.after)


def unique_contexts(sent: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, those of one visitor in one millisecond with one context, so that the moment's is certain."""
    known: dict[tuple[str, int], Any] = {}
    return [
        {**item, "context": known.setdefault((item["userId"], item["timestamp"]), item["context"])} for item in sent
    ]


# --- whom the service scores ---


@pytest.mark.parametrize("rows", [{"per_visitor": 1}, {"per_visitor": 1, "after": ["view"], "cold_start": False}])
def test_the_population_is_every_moment_of_the_last_days_whatever_rows_are_kept(
    read: Read, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any]
) -> None:
    chosen = shop(rows=rows)
    sent = unique_contexts(random_events(5))
    monkeypatch.setattr(source, "_PARTITION_ROWS", 100)
    monkeypatch.setattr(dataset, "POPULATION_MS", 5 * DAY_MS)
    monkeypatch.setattr(dataset, "FEWEST_SCORED", 10)
    population = dataset.build(read(chosen, sent), features.compile(chosen)).population
    last_ms = max(item["timestamp"] for item in sent)
    wanted = [
        (visitor, vector)
        for (visitor, cutoff), (vector, _) in brute_force(chosen, sent, last_ms).items()
        if cutoff > last_ms - 5 * DAY_MS
    ]
    assert population is not None
    found = [(int(one), row.tobytes()) for one, row in zip(population.visitor, population.matrix, strict=True)]
    assert sorted(found) == sorted(wanted)
    assert len(found) > 50


def test_a_population_of_few_is_none(read: Read) -> None:
    chosen = shop(rows={"per_visitor": 1, "after": "order"})
    built = dataset.build(read(chosen, random_events(5)), features.compile(chosen))
    assert len(built) > 0
    assert built.population is None


def test_a_large_population_is_drawn_from_evenly(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [event("busy", NOW_MS - place * 1000) for place in range(3_000)]
    sent += [event(f"v{place}", NOW_MS - place * 1000) for place in range(1_000)]
    sent += [order(f"buyer {place}", NOW_MS - 3 * DAY_MS) for place in range(5)]
    monkeypatch.setattr(dataset, "POPULATION_ROWS", 1_000)
    chosen = shop(rows={"per_visitor": 1, "cold_start": False})
    population = dataset.build(read(chosen, sent), features.compile(chosen)).population
    assert population is not None
    assert len(population.matrix) == len(population.visitor) == 1_000
    assert np.mean(population.visitor == visitor_hash("busy")) == pytest.approx(0.75, abs=0.05)


# --- which moments, features and labels ---


@pytest.mark.parametrize(
    "rows",
    [
        {"per_visitor": 1000},
        {"per_visitor": 1000, "cold_start": False},
        {"per_visitor": 1000, "after": "order"},
        {"per_visitor": 1000, "after": ["view"]},
    ],
    ids=lambda rows: " ".join(f"{name} {value}" for name, value in rows.items() if name != "per_visitor") or "any",
)
def test_rows_equal_those_of_a_builder_that_looks_at_one_moment_at_a_time(
    read: Read, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any]
) -> None:
    chosen = shop(rows=rows)
    sent = unique_contexts(random_events(1))
    monkeypatch.setattr(source, "_PARTITION_ROWS", 100)
    monkeypatch.setattr(dataset, "GATHERED_RECORDS", 200)
    log = read(chosen, sent)
    assert log.partitions > 3
    made = rows_of(dataset.build(log, features.compile(chosen)))
    wanted = brute_force(chosen, sent)
    assert len(wanted) > 50
    assert made == wanted
    assert len({label for _, label in made.values()}) == 2


def test_the_label_window_opens_after_the_cutoff_and_closes_with_the_horizon(read: Read) -> None:
    start = NOW_MS - 10 * DAY_MS
    gaps = {"at once": 0, "a ms later": 1, "just inside": DAY_MS - 1, "at the end": DAY_MS, "too late": DAY_MS + 1}
    sent = [event(visitor, start) for visitor in gaps]
    sent += [order(visitor, start + gap) for visitor, gap in gaps.items()]
    sent += [event("last", NOW_MS - DAY_MS)]
    chosen = shop(rows={"per_visitor": 1000, "after": "view", "cold_start": False})
    made = rows_of(dataset.build(read(chosen, sent), features.compile(chosen)))
    labels = {visitor: made[visitor_hash(visitor), start][1] for visitor in gaps}
    expected = {"at once": False, "a ms later": True, "just inside": True, "at the end": True, "too late": False}
    assert labels == expected


def test_who_stays_away_is_positive_where_that_is_the_label(read: Read) -> None:
    start = NOW_MS - 10 * DAY_MS
    gaps = {"at once": 0, "a ms later": 1, "at the end": DAY_MS, "too late": DAY_MS + 1}
    sent = [event(visitor, start) for visitor in (*gaps, "never")]
    sent += [order(visitor, start + gap) for visitor, gap in gaps.items()]
    sent += [event("last", NOW_MS - DAY_MS)]
    chosen = shop(
        rows={"per_visitor": 1000, "after": "view", "cold_start": False}, label={"absent": "order", "horizon": "1d"}
    )
    made = rows_of(dataset.build(read(chosen, sent), features.compile(chosen)))
    labels = {visitor: made[visitor_hash(visitor), start][1] for visitor in (*gaps, "never")}
    assert labels == {"at once": True, "a ms later": False, "at the end": False, "too late": True, "never": True}


@pytest.mark.parametrize("key", ["event", "absent"])
def test_any_as_a_label_stands_for_every_kind(read: Read, key: str) -> None:
    start = NOW_MS - 10 * DAY_MS
    sent = [event(visitor, start) for visitor in ("viewed", "ordered", "never")]
    sent += [event("viewed", start + DAY_MS), order("ordered", start + DAY_MS), event("last", NOW_MS - DAY_MS)]
    chosen = shop(rows={"per_visitor": 1000, "cold_start": False}, label={key: "any", "horizon": "1d"})
    made = rows_of(dataset.build(read(chosen, sent), features.compile(chosen)))
    labels = {visitor: made[visitor_hash(visitor), start][1] for visitor in ("viewed", "ordered", "never")}
    came = key == "event"
    assert labels == {"viewed": came, "ordered": came, "never": not came}


def test_a_cutoff_whose_horizon_reaches_beyond_the_data_gives_no_row(read: Read) -> None:
    last = NOW_MS - DAY_MS
    moments = {"old": last - 5 * DAY_MS, "matured": last - DAY_MS, "a ms short": last - DAY_MS + 1, "last": last}
    chosen = shop(rows={"per_visitor": 1000, "cold_start": False})
    made = dataset.build(read(chosen, [event(name, at) for name, at in moments.items()]), features.compile(chosen))
    assert sorted(made.cutoff_ms) == [moments["old"], moments["matured"]]


def test_a_cold_start_knows_nothing_but_the_request_and_the_clock(read: Read) -> None:
    first = NOW_MS - 9 * DAY_MS
    context = {"referrer": "mail", "device": "mobile"}
    chosen = shop()
    log = read(chosen, [event("a", first, context=context), event("b", NOW_MS - DAY_MS)])
    made = dataset.build(log, features.compile(chosen))
    [row] = np.flatnonzero(made.cutoff_ms == first - 1)
    vector = dict(zip(chosen.names, made.matrix[row], strict=True))
    assert (vector["referrer"], vector["views_1d"], vector["tenure"] == vector["tenure"]) == (1, 0, False)
    assert np.isnan(vector["device"])


def test_a_first_event_at_the_beginning_of_time_has_no_moment_before_it(read: Read) -> None:
    chosen = shop()
    log = read(chosen, [event("a", 0), event("a", DAY_MS), event("b", 9 * DAY_MS)])
    assert min(dataset.build(log, features.compile(chosen)).cutoff_ms) == 0


def test_events_in_one_millisecond_make_one_row_whichever_of_them_is_asked_after(read: Read) -> None:
    at = NOW_MS - 9 * DAY_MS
    sent = [order("a", at), event("a", at), event("a", at, messageId="m"), event("b", NOW_MS - DAY_MS)]
    for after in ("order", "view", "any"):
        chosen = shop(rows={"after": after, "cold_start": False})
        made = dataset.build(read(chosen, sent), features.compile(chosen))
        assert list(made.cutoff_ms) == [at]
        vector = dict(zip(chosen.names, made.matrix[0], strict=True))
        assert (vector["orders"], vector["views_1d"]) == (1, 2), "all events of the moment are known"


def test_a_grid_asks_for_every_visitor_with_an_event_in_the_history(read: Read) -> None:
    chosen = shop(rows={"every": "12h", "per_visitor": 1000})
    sent = random_events(2)
    made = dataset.build(read(chosen, sent), features.compile(chosen))
    times = [item["timestamp"] for item in sent]
    matured, history = max(times) - DAY_MS, chosen.limits.history
    points = range(matured, min(times) - 1, -DAY_MS // 2)
    wanted = {
        (visitor_hash(visitor), point)
        for visitor in {item["userId"] for item in sent}
        for point in points
        if any(item["userId"] == visitor and point - history < item["timestamp"] <= point for item in sent)
    }
    assert set(rows_of(made)) == wanted
    assert len(wanted) > 100


# --- sampling ---


def sampled(**rows: Any) -> FeatureSpec:
    return shop(rows={"per_visitor": 2, **rows})


def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another(read: Read) -> None:
    chosen, sent = sampled(), random_events(3)
    plan, log = features.compile(chosen), read(sampled(), sent)
    first, again, other = (rows_of(dataset.build(log, plan, seed=seed)) for seed in (0, 0, 1))
    every = rows_of(dataset.build(read(shop(), sent), features.compile(shop())))
    assert first == again
    assert set(first) != set(other)
    assert len(first) < len(every)
    assert first.items() <= every.items()


def test_a_sample_does_not_depend_on_partitions_or_on_the_order_of_files(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, sent = sampled(), unique_contexts(random_events(4))
    plan = features.compile(chosen)
    made = []
    for share, files, order in ((10**6, 1, sent), (50, 1, sent), (20, 3, sent[::-1])):
        monkeypatch.setattr(source, "_PARTITION_ROWS", share)
        made.append(dataset.build(read(chosen, order, files), plan, max_rows=60))
    for other in made[1:]:
        assert rows_of(other) == rows_of(made[0])
        for column in ("matrix", "label", "visitor", "cutoff_ms"):
            np.testing.assert_array_equal(getattr(other, column), getattr(made[0], column))


def test_whether_a_moment_is_chosen_depends_on_its_past_alone(read: Read) -> None:
    chosen, sent = sampled(), random_events(5, days=12)
    plan = features.compile(chosen)
    end = NOW_MS - 7 * DAY_MS
    until_then = [item for item in sent if item["timestamp"] <= end]
    before, after = (dataset.build(read(chosen, known), plan) for known in (until_then, sent))
    matured = max(item["timestamp"] for item in until_then) - DAY_MS
    early = {key: row for key, row in rows_of(after).items() if key[1] <= matured}
    assert 30 < len(early) < len(after)
    assert rows_of(before) == early


def test_the_first_moments_of_a_visitor_are_always_taken_and_later_ones_ever_more_rarely(read: Read) -> None:
    chosen = sampled(cold_start=False, per_visitor=3)
    start = NOW_MS - 300 * DAY_MS
    sent = [event(f"v{visitor}", start + place * DAY_MS) for visitor in range(150) for place in range(40)]
    made = dataset.build(read(chosen, sent), features.compile(chosen))
    place = (made.cutoff_ms - start) // DAY_MS
    counts = np.bincount(place, minlength=39)
    assert list(counts[:3]) == [150] * 3
    wanted = 150 * 3 / np.arange(4, 40)
    assert np.all(np.abs(counts[3:39] - wanted) < 5 * np.sqrt(wanted) + 1)


def test_rows_beyond_the_limit_are_left_out_at_random_and_the_same_ones_every_time(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, sent = shop(), random_events(6, visitors=60)
    plan = features.compile(chosen)
    monkeypatch.setattr(source, "_PARTITION_ROWS", 60)
    log = read(chosen, sent)
    every = dataset.build(log, plan)
    assert len(every) > 300
    smaller: Rows = {}
    for limit in (50, 100, 299, len(every), len(every) + 1):
        made = rows_of(dataset.build(log, plan, max_rows=limit))
        assert len(made) == min(limit, len(every))
        assert smaller.items() <= made.items(), "a larger sample holds the smaller one"
        assert made.items() <= rows_of(every).items()
        smaller = made


def test_progress_is_told_for_every_partition(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_PARTITION_ROWS", 100)
    log = read(shop(), random_events(7))
    told: list[tuple[int, int]] = []
    dataset.build(log, features.compile(shop()), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(number + 1, log.partitions) for number in range(log.partitions)]


def test_golden_rows_are_kept_also_of_visitors_with_very_long_histories(read: Read) -> None:
    chosen = shop(rows={"after": "order", "cold_start": False, "per_visitor": 1000})
    start = NOW_MS - 9 * DAY_MS
    sent = [event("a", start + n, messageId=f"m{n}") for n in range(1000)]
    sent += [order("a", start + 2000 + n, messageId=f"o{n}") for n in range(9)] + [event("b", NOW_MS - DAY_MS)]
    made = dataset.build(read(chosen, sent), features.compile(chosen))
    assert len(made.golden) == 9
    assert all(0 < len(row.records) <= dataset.GOLDEN_RECORDS for row in made.golden)
    assert all(row.records["ts_ms"].max() <= row.now_ms for row in made.golden)


# --- finding a visitor's events ---


def partition(visitors: int, at_ms: npt.NDArray[np.int64]) -> Partition:
    """Visitors with one event each."""
    nothing = np.empty(0, events.RECORD)
    records = events.records(at_ms, 1, np.arange(1, visitors + 1), 0, 1.0)
    starts = np.arange(visitors + 1)
    zeros = np.zeros(visitors + 1, np.int64)
    return Partition(
        np.arange(visitors, dtype=np.uint64), None, records, starts, np.empty((visitors, 1), np.float32), nothing, zeros
    )


def test_two_million_visitors_of_two_years_are_told_apart() -> None:
    visitors = 2_000_000
    at_ms = NOW_MS - np.random.default_rng(0).integers(0, 730 * DAY_MS, visitors)
    view = View(partition(visitors, at_ms))
    assert np.all(np.diff(view.keys) > 0)
    some = np.random.default_rng(1).integers(0, visitors, 1000)
    plan = features.compile(shop())
    unknown = np.full((1000, 1), np.nan, np.float32)
    column = shop().names.index("views_1d")
    for moved, count in ((-1, 0), (0, 1), (DAY_MS - 1, 1), (DAY_MS, 0)):
        assert np.all(view.vectors(plan, some, at_ms[some] + moved, unknown)[:, column] == count)


def test_visitors_over_more_time_than_can_be_sorted_are_refused() -> None:
    with pytest.raises(PropensityError, match=r"2 visitors over \d+ years are too many .* leave out wrong timestamps"):
        View(partition(2, np.array([0, 2**61])))


# --- splitting ---


def labelled(cutoff_ms: npt.ArrayLike, label: npt.ArrayLike, visitor: npt.ArrayLike) -> Dataset:
    return Dataset(
        np.zeros((np.size(label), 1), np.float32),
        np.array(label, np.bool_),
        np.array(visitor, np.uint64),
        np.array(cutoff_ms, np.int64),
    )


def random_rows(seed: int, days: float, rows: int = 3000, visitors: int = 500, rate: float = 0.2) -> Dataset:
    chance = np.random.default_rng(seed)
    cutoff = np.sort(NOW_MS - (chance.random(rows) * days * DAY_MS).astype(np.int64))
    return labelled(cutoff, chance.random(rows) < rate, chance.integers(0, visitors, rows))


def parts(split: Split) -> dict[str, npt.NDArray[np.int64]]:
    return {"train": split.train, "stop": split.stop, "calibrate": split.calibrate, "test": split.test}


@given(
    seed=st.integers(0, 10**6),
    days=st.floats(8, 400),
    horizon_days=st.floats(0.1, 60),
    grid=st.booleans(),
)
def test_no_label_window_of_one_part_reaches_into_the_next(
    seed: int, days: float, horizon_days: float, grid: bool
) -> None:
    horizon_ms = int(horizon_days * DAY_MS)
    rows = random_rows(seed, days)
    if grid:
        rows = labelled(rows.cutoff_ms // DAY_MS * DAY_MS, rows.label, rows.visitor)
    split = dataset.split(rows, horizon_ms, seed)
    chosen = parts(split)
    every = np.concatenate(list(chosen.values()))
    assert len(np.unique(every)) == len(every)
    assert all(rows.label[part].any() and not rows.label[part].all() for part in chosen.values())
    if split.how.startswith("by time"):
        valid = np.concatenate((split.stop, split.calibrate))
        assert rows.cutoff_ms[split.train].max() + horizon_ms < rows.cutoff_ms[valid].min()
        assert rows.cutoff_ms[valid].max() + horizon_ms < rows.cutoff_ms[split.test].min()
        assert not set(rows.visitor[split.stop]) & set(rows.visitor[split.calibrate])
        assert split.notes == ()
    else:
        assert split.how == "by visitor"
        assert "too short to split by time" in split.notes[0]
        owners = [set(rows.visitor[part]) for part in chosen.values()]
        assert sum(map(len, owners)) == len(set(rows.visitor)) == len(set().union(*owners))
        assert len(every) == len(rows)


def test_a_long_history_is_split_by_time_into_three_fifths_one_and_one() -> None:
    rows = random_rows(0, days=100)
    split = dataset.split(rows, DAY_MS)
    assert split.how == "by time, with gaps of one horizon"
    shares = [len(part) / len(rows) for part in (split.train, [*split.stop, *split.calibrate], split.test)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert len(split.stop) == pytest.approx(len(split.calibrate), rel=0.2)


def test_a_short_history_is_split_by_visitor_with_a_note() -> None:
    split = dataset.split(random_rows(0, days=10), 6 * DAY_MS)
    assert split.how == "by visitor"
    assert split.notes == (
        "The history is too short to split by time with gaps of one horizon; rows were split by visitor.",
    )


def test_rows_of_a_table_are_split_at_random_and_by_the_seed() -> None:
    rows = labelled([0] * 1000, [place % 3 == 0 for place in range(1000)], range(1000))
    first, again, other = (dataset.split(rows, None, seed) for seed in (0, 0, 1))
    assert (first.how, first.notes) == ("at random", ())
    assert [len(part) for part in parts(first).values()] == pytest.approx([700, 50, 50, 200], abs=60)
    np.testing.assert_array_equal(first.test, again.test)
    assert set(first.test) != set(other.test)


def test_positives_of_a_few_visitors_alone_are_refused() -> None:
    visitor = np.arange(2000)
    label = np.zeros(2000, np.bool_)
    label[:200] = True
    visitor[:200] = 0
    with pytest.raises(TooLittleData, match="the positive rows are of 1 visitors, too few to fit, stop, calibrate"):
        dataset.split(labelled(range(2000), label, visitor), DAY_MS)


# --- too little data ---


@pytest.mark.parametrize(
    ("positives", "negatives", "horizon_ms", "advice"),
    [
        (99, 5000, DAY_MS, "give more history or more visitors, a longer label.horizon, or check label.event"),
        (5000, 99, DAY_MS, "give more history or more visitors, a longer label.horizon, or check label.event"),
        (0, 500, None, "give more rows, or check label.column and label.positive"),
    ],
)
def test_fewer_than_100_of_a_class_are_refused_with_what_is_missing(
    positives: int, negatives: int, horizon_ms: int | None, advice: str
) -> None:
    label = [True] * positives + [False] * negatives
    rows = labelled(range(len(label)), label, range(len(label)))
    with pytest.raises(TooLittleData) as caught:
        dataset.split(rows, horizon_ms)
    count = f"{positives} positive and {negatives} negative rows; at least 100 of each are needed: "
    assert str(caught.value) == count + advice


def test_exactly_100_of_each_class_are_enough() -> None:
    label = [place % 2 == 0 for place in range(200)]
    assert len(dataset.split(labelled(range(200), label, range(200)), None).train) > 100


def test_less_than_one_and_a_half_horizons_are_refused_with_what_is_missing(read: Read) -> None:
    chosen = shop(label={"event": "order", "horizon": "7d"})
    sent = [event("a", NOW_MS - 12 * DAY_MS), event("b", NOW_MS - 2 * DAY_MS)]
    with pytest.raises(TooLittleData) as caught:
        dataset.build(read(chosen, sent), features.compile(chosen))
    assert "the events span 10.00 days, less than 1.5 horizons of 7" in str(caught.value)
    assert "give at least 10.50 days of history or a shorter label.horizon" in str(caught.value)
    longer = [event("a", NOW_MS - 12 * DAY_MS - DAY_MS // 2), event("b", NOW_MS - 2 * DAY_MS)]
    assert len(dataset.build(read(chosen, longer), features.compile(chosen)))


def test_no_moment_to_learn_from_is_refused(read: Read) -> None:
    chosen = shop(rows={"after": "order", "cold_start": False})
    with pytest.raises(TooLittleData, match=r"no event of rows\.after has a full horizon after it"):
        dataset.build(read(chosen, [event("a", NOW_MS - 9 * DAY_MS), event("a", NOW_MS)]), features.compile(chosen))


@pytest.mark.parametrize("label", [None, {"column": "bought"}])
def test_a_spec_without_an_event_to_predict_is_refused(read: Read, label: Any) -> None:
    chosen = shop(label=label)
    with pytest.raises(TooLittleData, match=r"write label: \{event: KIND, horizon: 7d\}"):
        dataset.build(read(chosen, [event("a", NOW_MS - DAY_MS)]), features.compile(chosen))
