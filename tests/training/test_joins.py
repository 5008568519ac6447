"""Anonymous visitors of files and who they turned out to be: what the service would have had, at every moment."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service import ingest, joining
from service.core import events, features, spec
from service.core.features import Plan
from service.core.spec import FeatureSpec
from service.ingest import Accepted
from tests.training import online
from tests.training.online import Held, Visitors
from training import dataset, joins, point_in_time, source
from training.joins import Login
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
    "limits": {"history": "4d", "records": 8, "session_gap": "30m"},
    "label": {"event": "order", "horizon": "1d"},
    "rows": {"per_visitor": 1000},
    "features": {
        "views": {"count": "view"},
        "spend": {"sum": "order", "window": "2d"},
        "prices": {"mean": "view"},
        "categories": {"distinct": "view"},
        "since_view": {"recency": "view"},
        "tenure": {"tenure": "any"},
        "session": {"session": "count"},
        "device": {"trait": "device", "categories": ["mobile", "desktop"]},
        "loyalty": {"trait": "loyalty"},
        "referrer": {"request": "referrer", "categories": ["ads", "mail"]},
    },
}

Sent = Sequence[dict[str, Any]]
Row = tuple[int, int, bytes, bool]


@pytest.fixture
def shop() -> FeatureSpec:
    return spec.parse(DOCUMENT)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., EventLog]:
    """A function that writes events to files and reads them."""

    def read(shop: FeatureSpec, sent: Sent, **given: Any) -> EventLog:
        directory = tmp_path / f"{random.getrandbits(64):x}"
        (directory / "work").mkdir(parents=True)
        path = write(directory / "events.ndjson", sent)
        return source.read([str(path)], shop, directory / "work", **{"now_ms": NOW_MS, **given})

    return read


Read = Callable[..., EventLog]


def write(path: Path, sent: Sent) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in sent))
    return path


def view(visitor: str, at_ms: int, **members: Any) -> dict[str, Any]:
    kind = "anonymousId" if visitor.startswith("a") else "userId"
    return {"event": "Product Viewed", kind: visitor, "timestamp": at_ms, **members}


def login(anonymous: str, known: str, at_ms: int, **members: Any) -> dict[str, Any]:
    return {"type": "identify", "anonymousId": anonymous, "userId": known, "timestamp": at_ms, **members}


def random_visits(seed: int, people: int = 12, each: int = 25) -> list[dict[str, Any]]:
    """Visits under two ids, logins, devices of two people, ids that are both, and events that were sent twice."""
    chance = random.Random(seed)
    sent: list[dict[str, Any]] = []
    for person in range(people):
        at_ms = NOW_MS - 9 * DAY_MS + chance.randrange(5 * DAY_MS)
        devices = [f"a{chance.randrange(people)}" for _ in range(2)]
        for _ in range(chance.randrange(3, each)):
            at_ms += 1 + chance.randrange(chance.choice((2, 60_000, HOUR_MS, DAY_MS // 2)))
            item: dict[str, Any] = {"timestamp": at_ms, "messageId": f"m{len(sent)}"}
            item["context"] = {"referrer": chance.choice(("ads", "x"))}
            item["context"] |= {"device": chance.choice(("mobile", "desktop"))} if chance.random() < 0.5 else {}
            item["traits"] = {"loyalty": chance.randrange(3)} if chance.random() < 0.3 else {}
            item["properties"] = {"price": chance.randrange(1, 50), "category": chance.choice("abc"), "revenue": 9.5}
            item["event"] = chance.choice(("Product Viewed", "Product Viewed", "Order Completed"))
            if chance.random() < 0.55:
                item["anonymousId"] = chance.choice(devices)
            else:
                item["userId"] = f"u{person}"
            if chance.random() < 0.12:
                known = f"u{person}" if chance.random() < 0.9 else chance.choice(devices)
                kind, key = chance.choice((("identify", "anonymousId"), ("alias", "previousId")))
                item |= {"type": kind, "userId": known, key: chance.choice(devices)}
            if chance.random() < 0.1:
                item |= {"userId": f"u{person}", "anonymousId": devices[0]}
            sent.append(item)
    sent = [item for item in sent if item["timestamp"] < NOW_MS]
    twice = [dict(item) for item in chance.sample(sent, len(sent) // 4) if "type" not in item]
    for item in twice:  # once under the one id and once under the other, not always saying the same
        item["userId"] = f"u{chance.randrange(people)}"
        item["properties"] = {**item["properties"], "price": chance.randrange(1, 50)}
    sent += twice
    chance.shuffle(sent)
    return sent


def visitor_hash(visitor: str) -> int:
    return int(duckdb.execute("SELECT hash(?::VARCHAR)", [visitor]).fetchall()[0][0])


def vector(plan: Plan, held: Sequence[Held], now_ms: int, context: Mapping[str, Any] | None) -> bytes:
    """What the service answers of somebody with this history."""
    outcomes = [one.outcome for one in held if isinstance(one.outcome, Accepted)]
    records = events.from_bytes(b"".join(outcome.events for outcome in outcomes))
    traits = events.from_bytes(b"".join(outcome.traits for outcome in outcomes))
    starts, trait_starts = np.array([0, len(records)]), np.array([0, len(traits)])
    request = np.array([plan.encode_request(context)], np.float32)
    return features.matrix(plan, records, starts, np.array([now_ms]), traits, trait_starts, request).tobytes()


def is_counted(one: Held) -> bool:
    return isinstance(one.outcome, Accepted) and bool(one.outcome.events)


def brute_force(shop: FeatureSpec, sent: Sent) -> Iterator[Row]:
    """Every row there can be, from what the service had at its moment; labels are of the person."""
    plan, catalogue = features.compile(shop), ingest.catalogue([shop])
    assert shop.label is not None
    assert shop.label.horizon is not None
    horizon = shop.label.horizon
    final = online.after(catalogue, sent, NOW_MS, NOW_MS)
    counted = [one.event["timestamp"] for held in final.held.values() for one in held if is_counted(one)]
    matured = max(counted) - horizon

    def row(visitors: Visitors, asked: str, cutoff: int, context: Mapping[str, Any] | None) -> Row:
        held = [one for one in visitors.held.get(asked, ()) if one.event["timestamp"] <= cutoff]
        logins = final.logins.get(asked)
        person = joining.owner_at(logins, cutoff) if logins else asked
        bought = any(
            is_counted(one)
            and one.event["event"] == "Order Completed"
            and cutoff < one.event["timestamp"] <= cutoff + horizon
            for one in final.held[person]
        )
        return visitor_hash(person), cutoff, vector(plan, held, cutoff, context), bought

    seen: set[str] = set()
    for at_ms, received, visitors in online.moments(catalogue, sent, NOW_MS):
        asked = {visitors.owner(one.sent_as): one for one in received if is_counted(one)}
        for visitor, one in asked.items():
            context = one.event.get("context")
            is_known = any(is_counted(other) and other.event["timestamp"] < at_ms for other in visitors.held[visitor])
            if visitor not in seen and not is_known and at_ms - 1 <= matured:
                nobody = [other for other in visitors.held[visitor] if other.event["timestamp"] < at_ms]
                before = Visitors()
                before.held[visitor] = nobody
                yield row(before, visitor, at_ms - 1, context)
            seen.add(visitor)
            if at_ms <= matured:
                yield row(visitors, visitor, at_ms, context)


def rows_of(made: dataset.Dataset) -> list[Row]:
    return sorted(
        (int(visitor), int(cutoff), vector.tobytes(), bool(label))
        for visitor, cutoff, vector, label in zip(made.visitor, made.cutoff_ms, made.matrix, made.label, strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_what_the_service_had_and_labels_are_of_the_person(shop: FeatureSpec, read: Read, seed: int) -> None:
    sent = random_visits(seed)
    log = read(shop, sent, partitions=1 + seed % 3)
    assert log.summary.joined > 3
    wanted = sorted(brute_force(shop, sent))
    found = rows_of(dataset.build(log, features.compile(shop)))
    assert len(found) > 100
    assert found == wanted


@pytest.mark.parametrize("seed", range(3))
def test_anybody_at_any_moment_has_the_features_that_the_service_gave(
    shop: FeatureSpec, tmp_path: Path, seed: int
) -> None:
    sent = random_visits(seed + 50)
    plan, catalogue = features.compile(shop), ingest.catalogue([shop])
    everybody = sorted({str(item[key]) for item in sent for key in ("userId", "anonymousId") if key in item})
    asked, wanted = [], []
    for at_ms, _, visitors in online.moments(catalogue, sent, NOW_MS):
        for visitor in (*random.Random(at_ms).sample(everybody, 6), "nobody"):
            asked.append({"visitor_id": visitor, "at": at_ms, "referrer": "mail"})
            held = visitors.held.get(visitors.owner(visitor), [])
            wanted.append(vector(plan, held, at_ms, {"referrer": "mail"}))
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "at.parquet")
    (tmp_path / "shop.yaml").write_text(json.dumps(DOCUMENT))
    files = [str(write(tmp_path / "events.ndjson", sent))]
    out = tmp_path / "features.parquet"
    point_in_time.write(files, tmp_path / "shop.yaml", tmp_path / "at.parquet", out)
    table = pq.read_table(out)
    assert table["visitor_id"].to_pylist() == [row["visitor_id"] for row in asked]
    found = np.stack([table[name].to_numpy() for name in shop.names], axis=1)
    assert len(found) > 500
    different = [place for place, row in enumerate(found) if row.tobytes() != wanted[place]]
    assert not different, [asked[place] for place in different[:3]]


@pytest.mark.parametrize("seed", range(3))
def test_at_a_moment_there_is_everybody_once_with_what_the_service_had(
    shop: FeatureSpec, read: Read, seed: int
) -> None:
    sent = random_visits(seed + 80)
    catalogue = ingest.catalogue([shop])
    log = read(shop, sent, partitions=2)
    for at_ms in (NOW_MS - 6 * DAY_MS, NOW_MS - 3 * DAY_MS, NOW_MS):
        wanted = online.after(catalogue, sent, at_ms, NOW_MS)
        found = {}
        for index in range(log.partitions):
            partition = log.partition(index, with_ids=True).at(at_ms)
            for place, visitor in enumerate(partition.visitor_ids or ()):
                assert visitor not in found
                records = partition.records[partition.starts[place] : partition.starts[place + 1]]
                found[visitor] = records[records["ts_ms"] <= at_ms].tobytes()
        assert not set(wanted.logins) & set(found), "who was joined has no row"
        assert set(wanted.held) - set(found) == set()
        for visitor, kept in found.items():
            outcomes = [one.outcome for one in wanted.held.get(visitor, ())]
            blob = b"".join(outcome.events for outcome in outcomes if isinstance(outcome, Accepted))
            assert kept == events.compact(blob, 10**9)


def test_a_grid_has_everybody_once_who_was_there(read: Read) -> None:
    every = {"every": "6h", "per_visitor": 1000}
    shop = spec.parse({**DOCUMENT, "limits": {"history": "1d", "records": 8}, "rows": every})
    plan, catalogue, sent = features.compile(shop), ingest.catalogue([shop]), random_visits(7)
    log = read(shop, sent)
    view = dataset.View(log.partition(0))
    found = dataset.moments(view, shop, log.summary.first_ms, NOW_MS)
    matrix = view.vectors(plan, found.owner, found.cutoff_ms, found.request)
    made = {
        (int(view.partition.visitor_hash[owner]), int(at_ms)): row.tobytes()
        for owner, at_ms, row in zip(found.owner, found.cutoff_ms, matrix, strict=True)
    }
    wanted = {}
    for at_ms in range(NOW_MS, log.summary.first_ms - 1, -6 * HOUR_MS):
        for visitor, held in online.after(catalogue, sent, at_ms, NOW_MS).held.items():
            if any(is_counted(one) and one.event["timestamp"] > at_ms - DAY_MS for one in held):
                wanted[visitor_hash(visitor), at_ms] = vector(plan, held, at_ms, None)
    assert len(made) == len(found.owner) > 100
    assert made == wanted


# --- whose logins count ---


def test_logins_are_resolved_as_the_service_resolves_them() -> None:
    assert joins.MOST_JOINED == joining.MOST_JOINED
    said = [
        Login(1, "a", "u"),
        Login(2, "u", "w"),  # somebody is joined into u
        Login(3, "b", "c"),
        Login(4, "c", "u"),
        Login(5, "d", "v"),
        Login(6, "e", "d"),  # d is v by now
        Login(7, "v", "d"),  # so d is v itself
        Login(8, "d", "u"),
        Login(9, "f", "d"),  # and u by now
    ]
    assert list(joins.resolved(said)) == [
        Login(1, "a", "u"),
        Login(3, "b", "c"),
        Login(5, "d", "v"),
        Login(6, "e", "v"),
        Login(8, "d", "u"),
        Login(9, "f", "u"),
    ]


def test_a_machine_on_which_everybody_logs_in_is_not_joined_without_end(shop: FeatureSpec, read: Read) -> None:
    visitors = joins.MOST_JOINED + 40
    sent = [view(f"a{number}", NOW_MS - DAY_MS) for number in range(visitors)]
    sent += [login(f"a{number}", "u", NOW_MS - HOUR_MS + number) for number in range(visitors)]
    log = read(shop, sent)
    assert (log.summary.joined, log.summary.visitors) == (joins.MOST_JOINED, 41)
    partition = log.partition(0, with_ids=True).at(NOW_MS)
    assert partition.visitor_ids is not None
    assert {*partition.visitor_ids} == {"u", *(f"a{number}" for number in range(joins.MOST_JOINED, visitors))}
    assert len(partition.records) == 41, "256 views at one millisecond, and those of 40 who are not joined"


def test_files_without_logins_are_read_as_before(shop: FeatureSpec, read: Read) -> None:
    log = read(shop, [view("a1", NOW_MS - 5), view("u1", NOW_MS - 4), {**view("u1", NOW_MS - 3), "anonymousId": "a1"}])
    assert log.summary.joined == 0
    assert log.partition(0).joins is None
    assert [path.name for path in log.directory.iterdir() if path.name != "spill"] == ["group0"]


def test_other_logins_make_another_fingerprint(shop: FeatureSpec, read: Read) -> None:
    sent = [view("a1", NOW_MS - 5), view("u1", NOW_MS - 4), view("u2", NOW_MS - 4)]
    one, other = ([*sent, login("a1", known, NOW_MS - 3), login("a2", "u2", NOW_MS - 3)] for known in ("u1", "u1"))
    other[-1] = login("a3", "u2", NOW_MS - 3)
    prints = {read(shop, events).summary.fingerprint for events in (one, other, one)}
    assert len(prints) == 2


TABLE = """\
cookie,customer,when,what
c1,,2025-12-30T10:00:00Z,view
c1,007,2025-12-30T11:00:00Z,view
c1,,2025-12-30T12:00:00Z,view
c2,,2025-12-30T12:00:00Z,view
"""


def mapped(**source: Any) -> FeatureSpec:
    event = {"column": "what", "names": {"view": "Product Viewed"}}
    return spec.parse({**DOCUMENT, "source": {"timestamp": "when", "event": event, **source}})


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"visitor_id": "customer", "anonymous_id": "cookie"}, {"007": 3, "c2": 1}),
        ({"visitor_id": "coalesce(customer, cookie)"}, {"c1": 2, "007": 1, "c2": 1}),
        ({"visitor_id": "customer", "anonymous_id": "CASE WHEN what = 'log' THEN cookie END"}, {"007": 1}),
    ],
)
def test_a_table_says_which_columns_hold_the_two_ids(
    tmp_path: Path, given: Mapping[str, str], counts: Mapping[str, int]
) -> None:
    (tmp_path / "hits.csv").write_text(TABLE)
    (tmp_path / "work").mkdir()
    log = source.read([str(tmp_path / "hits.csv")], mapped(**given), tmp_path / "work", now_ms=NOW_MS)
    partition = log.partition(0, with_ids=True).at(NOW_MS)
    assert dict(zip(partition.visitor_ids or (), np.diff(partition.starts).tolist(), strict=True)) == counts


def test_logins_may_be_in_another_file_than_visits(tmp_path: Path) -> None:
    source_of = [
        {
            "files": "logins*",
            "visitor_id": "customer",
            "anonymous_id": "cookie",
            "timestamp": "at",
            "event": {"constant": "Login"},
        },
        {"files": "hits*", "visitor_id": "cookie", "timestamp": "when", "event": {"constant": "Product Viewed"}},
    ]
    (tmp_path / "hits.csv").write_text(TABLE)
    (tmp_path / "logins.csv").write_text("customer,cookie,at\n007,c1,2025-12-30T11:30:00Z\n")
    (tmp_path / "work").mkdir()
    shop = spec.parse({**DOCUMENT, "source": source_of})
    log = source.read([str(tmp_path / "*.csv")], shop, tmp_path / "work", now_ms=NOW_MS)
    counts: list[dict[str, int]] = []
    for at in ("2025-12-30T11:29:59.999Z", "2025-12-30T11:30:00Z"):
        at_ms = ingest.timestamp_ms(at, NOW_MS)
        partition = log.partition(0, with_ids=True).at(at_ms)
        counts.append(dict(zip(partition.visitor_ids or (), np.diff(partition.starts).tolist(), strict=True)))
    assert counts == [{"c1": 2, "c2": 1, "007": 1}, {"c2": 1, "007": 3}]
