"""Features at moments of the past: what the service would have seen of these visitors then."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service import ingest
from service.core import events, features
from service.core.errors import PropensityError
from service.core.spec import FeatureSpec
from training import point_in_time, source, specfile

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
START_MS = 1_764_547_200_000  # 2025-12-01
SPEC = """
model: shop
events:
  view: {code: 1, event: Product Viewed, value: price, attribute: category}
  order: {code: 2, event: Order Completed, value: revenue}
limits: {history: 2d, records: 10}
features:
  views_6h: {count: view, window: 6h}
  spend: {sum: order}
  categories: {distinct: view}
  since_view: {recency: view}
  session: {session: count}
  rate: {ratio: [spend, views_6h], prior: [1, 2]}
  hour: {clock: hour}
  device: {trait: device, categories: [mobile, desktop]}
  loyalty: {trait: loyalty}
  referrer: {request: referrer, categories: [ads, mail]}
  amount: {request: amount}
"""

Moment = tuple[str, int, dict[str, Any]]


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def history() -> list[dict[str, Any]]:
    chance = random.Random(0)
    return [
        {
            "type": chance.choice(("track", "track", "track", "identify")),
            "event": chance.choice(("Product Viewed", "Order Completed", "Something Else")),
            "userId": f"0{chance.randrange(30)}",
            "messageId": f"m{place}",
            "timestamp": START_MS + chance.randrange(100) * HOUR_MS + chance.choice((0, 1, 777)),
            "properties": {"price": chance.randrange(1, 90), "category": chance.choice("abcd"), "revenue": 7.25},
            "context": {"device": chance.choice(("mobile", "desktop", "tv"))} if place % 3 else {},
            "traits": {"loyalty": chance.randrange(4)} if place % 5 == 0 else {},
        }
        for place in range(1500)
    ]


@pytest.fixture(scope="module")
def moments(history: list[dict[str, Any]]) -> list[Moment]:
    """Visitors known and unknown at random moments, before and after everything, and at the edges of events."""
    chance = random.Random(1)
    edges = [item["timestamp"] + chance.choice((-1, 0, 1, 6 * HOUR_MS, 2 * DAY_MS)) for item in history[:400]]
    edges += [START_MS - DAY_MS, START_MS + 400 * DAY_MS]
    return [
        (
            f"0{chance.randrange(34)}",
            moment,
            {"referrer": chance.choice(("ads", "mail", "tv", None)), "amount": chance.choice((1.5, 2.0, None))},
        )
        for moment in edges
    ]


def write_events(path: Path, sent: Sequence[dict[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(item) + "\n" for item in sent))
    return [str(path)]


def brute_force(spec: FeatureSpec, sent: Sequence[dict[str, Any]], asked: Sequence[Moment]) -> npt.NDArray[np.float32]:
    """Each row from all records that its visitor ever left: the kernel looks away from the future by itself."""
    plan, catalogue = features.compile(spec), ingest.catalogue([spec])
    made = []
    for visitor, at_ms, request in asked:
        kept = [ingest.parse(catalogue, item, START_MS + 500 * DAY_MS) for item in sent if item["userId"] == visitor]
        accepted = [item for item in kept if isinstance(item, ingest.Accepted)]
        records = events.from_bytes(b"".join(item.events for item in accepted))
        traits = events.from_bytes(b"".join(item.traits for item in accepted))
        vector = features.matrix(
            plan,
            records,
            np.array([0, len(records)]),
            np.array([at_ms]),
            traits,
            np.array([0, len(traits)]),
            np.array([plan.encode_request(request)], np.float32),
        )
        made.append(vector[0])
    return np.array(made)


def matrix_of(path: Path, names: Sequence[str]) -> npt.NDArray[np.float32]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        assert all(table.schema.field(name).type == pa.float32() for name in names)
        return np.stack([table.column(name).to_numpy() for name in names], axis=1)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[name] or "nan") for name in names] for row in rows], np.float32)


def as_csv(asked: Sequence[Moment], at: Sequence[Any] | None = None) -> str:
    cells = zip(asked, at or [at_ms for _, at_ms, _ in asked], strict=True)
    lines = [f"{visitor},{at_ms},{c['referrer'] or ''},{c['amount'] or ''}" for (visitor, _, c), at_ms in cells]
    return "\n".join(["visitor_id,at,referrer,amount", *lines]) + "\n"


@pytest.mark.parametrize("share", [10**6, 200, 40])
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_every_row_equals_what_the_visitors_own_records_give_at_that_moment(
    tmp_path: Path,
    spec_path: Path,
    history: list[dict[str, Any]],
    moments: list[Moment],
    monkeypatch: pytest.MonkeyPatch,
    share: int,
    ending: str,
) -> None:
    monkeypatch.setattr(source, "_PARTITION_ROWS", share)
    spec = specfile.load(spec_path)
    at = tmp_path / "at.csv"
    at.write_text(as_csv(moments))
    out = tmp_path / "new" / f"out.{ending}"
    rows = point_in_time.write(write_events(tmp_path / "events.ndjson", history), spec_path, at, out)
    assert rows == len(moments)
    found, wanted = matrix_of(out, spec.names), brute_force(spec, history, moments)
    assert not np.isnan(wanted).all(axis=0).any(), "every feature is known of somebody"
    np.testing.assert_array_equal(found, wanted)
    visitors, at_ms = columns_of(out)
    assert visitors == [visitor for visitor, _, _ in moments], "rows keep their order"
    assert at_ms == [moment for _, moment, _ in moments]
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def columns_of(path: Path) -> tuple[list[str], list[int]]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.column("visitor_id").to_pylist(), table.column("at").to_pylist()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["visitor_id"] for row in rows], [int(row["at"]) for row in rows]


def test_moments_may_be_written_in_every_way(
    tmp_path: Path, spec_path: Path, history: list[dict[str, Any]], moments: list[Moment]
) -> None:
    spec, paths = specfile.load(spec_path), write_events(tmp_path / "events.ndjson", history)
    some = [(visitor, at_ms // 1000 * 1000, request) for visitor, at_ms, request in moments[:60]]
    dates = [datetime.fromtimestamp(at_ms / 1000, UTC) for _, at_ms, _ in some]
    wanted = brute_force(spec, history, some)
    requests = {name: [request[name] for _, _, request in some] for name in ("referrer", "amount")}
    visitors = [visitor for visitor, _, _ in some]
    table = pa.table({"at": pa.array(dates, pa.timestamp("us", "UTC")), "visitor_id": visitors, **requests})
    pq.write_table(table, tmp_path / "datetimes.parquet")
    (tmp_path / "seconds.csv").write_text(as_csv(some, [at_ms // 1000 for _, at_ms, _ in some]))
    (tmp_path / "iso.csv").write_text(as_csv(some, [date.isoformat() for date in dates]))
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(as_csv(some).encode()))
    lines = [{"visitor_id": visitor, "at": at_ms, **request} for visitor, at_ms, request in some]
    (tmp_path / "lines.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("datetimes.parquet", "seconds.csv", "iso.csv", "packed.csv.gz", "lines.ndjson"):
        point_in_time.write(paths, spec_path, tmp_path / name, tmp_path / "out.parquet")
        np.testing.assert_array_equal(matrix_of(tmp_path / "out.parquet", spec.names), wanted, err_msg=name)


def test_a_visitor_that_nobody_knows_has_the_features_of_a_stranger(tmp_path: Path, spec_path: Path) -> None:
    sent = [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}]
    asked = [(name, START_MS + HOUR_MS, {"referrer": "ads", "amount": 2.0}) for name in ("b", "a", "it's", "ü", "c")]
    (tmp_path / "at.csv").write_text(as_csv(asked))
    point_in_time.write(
        write_events(tmp_path / "e.ndjson", sent), spec_path, tmp_path / "at.csv", tmp_path / "o.parquet"
    )
    names = specfile.load(spec_path).names
    found = matrix_of(tmp_path / "o.parquet", names)
    assert list(found[:, 0]) == [0, 1, 0, 0, 0]
    assert np.isnan(found[[0, 2, 3, 4], names.index("since_view")]).all()
    assert list(found[:, names.index("referrer")]) == [0] * 5


def test_request_fields_that_the_file_has_not_are_missing(tmp_path: Path, spec_path: Path) -> None:
    sent = [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS, "context": {"referrer": "ads"}}]
    (tmp_path / "at.csv").write_text(f"visitor_id,at\na,{START_MS}\n")
    point_in_time.write(
        write_events(tmp_path / "e.ndjson", sent), spec_path, tmp_path / "at.csv", tmp_path / "o.parquet"
    )
    names = specfile.load(spec_path).names
    assert math.isnan(matrix_of(tmp_path / "o.parquet", names)[0, names.index("referrer")])


def test_a_file_of_moments_without_rows_gives_a_file_without_rows(tmp_path: Path, spec_path: Path) -> None:
    sent = [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}]
    paths = write_events(tmp_path / "e.ndjson", sent)
    (tmp_path / "at.csv").write_text("visitor_id,at\n")
    assert point_in_time.write(paths, spec_path, tmp_path / "at.csv", tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("visitor,at\na,1\n", "has no column visitor_id; it has visitor, at"),
        ("visitor_id,when\na,1\n", "has no column at; it has visitor_id, when"),
        (
            "visitor_id,at\na,1764547200\nb,soon\nc,\n",
            "2 rows have no visitor_id or no readable at, the first is row 2",
        ),
        (
            "visitor_id,at\na,1764547200\n,1764547200\n",
            "1 rows have no visitor_id or no readable at, the first is row 2",
        ),
        (
            "visitor_id,at\n" + "a,1764547200\n" * 50 + "b,1764547200,more\n",
            "1 lines do not fit the others: at.csv line 52",
        ),
    ],
)
def test_a_file_of_moments_that_cannot_be_used_is_refused(
    tmp_path: Path, spec_path: Path, content: str, said: str
) -> None:
    paths = write_events(tmp_path / "e.ndjson", [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}])
    (tmp_path / "at.csv").write_text(content)
    with pytest.raises(PropensityError) as caught:
        point_in_time.write(paths, spec_path, tmp_path / "at.csv", tmp_path / "out.parquet")
    assert said in str(caught.value)
    assert str(tmp_path / "at.csv") in str(caught.value)
    assert not (tmp_path / "out.parquet").exists()


def test_a_place_to_write_to_that_cannot_be_used_is_refused_at_once(tmp_path: Path, spec_path: Path) -> None:
    (tmp_path / "at.csv").write_text("visitor_id,at\na,1\n")
    with pytest.raises(PropensityError, match=r"out\.xlsx: cannot write this kind of file; name it \.parquet or \.csv"):
        point_in_time.write(["nothing.csv"], spec_path, tmp_path / "at.csv", tmp_path / "out.xlsx")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.csv").write_text("visitor_id,at\na,1\n")
    paths = write_events(tmp_path / "e.ndjson", [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}])
    with pytest.raises(PropensityError, match=r"holds 2 files; give one with the columns visitor_id and at"):
        point_in_time.write(paths, spec_path, tmp_path / "two", tmp_path / "out.csv")


def test_what_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path: Path, spec_path: Path) -> None:
    (tmp_path / "at.csv").write_text("visitor_id,at\na,1\n")
    paths = write_events(tmp_path / "e.ndjson", [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}])
    (tmp_path / "out" / "out.csv").mkdir(parents=True)
    with pytest.raises(PropensityError, match=r"cannot write .*/out/out\.csv: Is a directory"):
        point_in_time.write(paths, spec_path, tmp_path / "at.csv", tmp_path / "out" / "out.csv")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["out.csv"]


@pytest.mark.parametrize("name", ["number", "row", "part", "x"])
def test_a_feature_may_have_any_name_that_the_output_does_not_use(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"{SPEC}  {name}: {{count: view}}\n")
    sent = [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS}]
    (tmp_path / "at.csv").write_text("visitor_id,at\n" + "".join(f"{visitor},{START_MS}\n" for visitor in "bacad"))
    out = tmp_path / "out.parquet"
    point_in_time.write(write_events(tmp_path / "e.ndjson", sent), path, tmp_path / "at.csv", out)
    assert pq.read_table(out).column(name).to_pylist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["at", "visitor_id"])
def test_a_feature_with_the_name_of_another_column_of_the_output_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"{SPEC}  {name}: {{count: view}}\n")
    (tmp_path / "at.csv").write_text("visitor_id,at\na,1\n")
    with pytest.raises(
        PropensityError, match=rf"features\.{name}: the output has a column of this name; choose another"
    ):
        point_in_time.write(["e.csv"], path, tmp_path / "at.csv", tmp_path / "out.parquet")


def test_features_that_differ_in_case_alone_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"{SPEC}  views: {{count: view}}\n  Views: {{sum: view}}\n")
    sent = [{"userId": "a", "event": "Product Viewed", "timestamp": START_MS, "properties": {"price": 5}}]
    (tmp_path / "at.csv").write_text(f"visitor_id,at\na,{START_MS}\n")
    out = tmp_path / "out.parquet"
    point_in_time.write(write_events(tmp_path / "e.ndjson", sent), path, tmp_path / "at.csv", out)
    table = pq.read_table(out)
    assert (table.column("views").to_pylist(), table.column("Views").to_pylist()) == ([1], [5])
