"""Tables: one row a visitor, read as the service reads a visitor's traits and a request."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service import ingest
from service.core import events, features, spec
from service.core.spec import FeatureSpec
from training import dataset, table
from training.dataset import TooLittleData
from training.eventfiles import UnreadableEvents
from training.table import Table

DOCUMENT: dict[str, Any] = {
    "model": "deposit",
    "label": {"column": "bought", "positive": "yes"},
    "features": {
        "age": {"trait": "age"},
        "job": {"trait": "job", "categories": ["clerk", "cook"]},
        "flag": {"trait": "flag"},
        "code": {"trait": "code", "categories": {"007": 7, "8": 8}},
        "channel": {"request": "channel", "categories": ["web", "shop"]},
        "minutes": {"request": "minutes"},
        "month": {"clock": "month"},
    },
}
ROWS = (
    "age,job,flag,code,channel,minutes,bought\n"
    "31,clerk,true,007,web,1.5,yes\n"
    "45.5,cook,false,8,shop,,no\n"
    ",pilot,,9,phone,3,YES\n"
    ",,,,,,no\n"
)
EXPECTED = [
    [31, 0, 1, 7, 0, 1.5, 1],
    [45.5, 1, 0, 8, 1, None, 1],
    [None, 2, None, None, 2, 3, 1],
    [None, None, None, None, None, None, 1],
]


def deposit(**changes: Any) -> FeatureSpec:
    return spec.parse({**DOCUMENT, **changes})


def write(path: Path, text: str = ROWS) -> str:
    path.write_text(text)
    return str(path)


def built(path: str, chosen: FeatureSpec) -> dataset.Dataset:
    return table.build(Table(path, chosen), features.compile(chosen))


def plain(matrix: Any) -> list[list[float | None]]:
    return [[None if math.isnan(value) else float(value) for value in row] for row in matrix]


def test_numbers_categories_request_fields_and_missing_values_are_read(tmp_path: Path) -> None:
    made = built(write(tmp_path / "table.csv"), deposit())
    assert plain(made.matrix) == EXPECTED
    assert list(made.label) == [True, False, True, False]
    assert len(set(made.visitor)) == 4


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"age": 31.0, "job": "clerk", "flag": True, "code": "007", "channel": "web", "minutes": 1.5, "bought": "yes"},
        {"age": 45.5, "job": "cook", "flag": False, "code": "8", "channel": "shop", "minutes": None, "bought": "no"},
        {"age": None, "job": "pilot", "flag": None, "code": "9", "channel": "phone", "minutes": 3.0, "bought": "YES"},
        {"age": None, "job": None, "flag": None, "code": None, "channel": None, "minutes": None, "bought": "no"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    write(tmp_path / "table.ndjson", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "table.tsv", ROWS.replace(",", "\t"))
    write(tmp_path / "semicolons.csv", ROWS.replace(",", ";"))
    for name in ("table.parquet", "table.ndjson", "table.tsv", "semicolons.csv"):
        made = built(str(tmp_path / name), deposit())
        assert plain(made.matrix) == EXPECTED, name
        assert list(made.label) == [True, False, True, False]


def test_a_row_gives_the_features_of_a_visitor_with_these_traits_and_this_request(tmp_path: Path) -> None:
    chosen = deposit()
    plan, catalogue = features.compile(chosen), ingest.catalogue([chosen])
    made = built(write(tmp_path / "table.csv"), chosen)
    traits = [{"age": 31, "job": "clerk", "flag": True, "code": "007"}, {"age": "45.5", "job": "cook", "flag": False}]
    requests: list[dict[str, Any]] = [{"channel": "web", "minutes": 1.5}, {"channel": "shop"}]
    traits[1]["code"] = 8
    for row in range(2):
        identify = {"type": "identify", "userId": "u", "timestamp": 0, "traits": traits[row]}
        accepted = ingest.parse(catalogue, identify, 0)
        assert isinstance(accepted, ingest.Accepted)
        records = events.from_bytes(accepted.traits)
        nothing = np.empty(0, events.RECORD), np.zeros(2, np.int64)
        request = np.array([plan.encode_request(requests[row])], np.float32)
        starts = np.array([0, len(records)])
        vector = features.matrix(plan, *nothing, np.zeros(1, np.int64), records, starts, request)
        np.testing.assert_array_equal(vector[0], made.matrix[row])


def test_a_trait_may_be_a_number_for_one_feature_and_a_category_for_another(tmp_path: Path) -> None:
    both = {"number": {"trait": "age"}, "group": {"trait": "age", "categories": ["31", "45.5"]}}
    made = built(write(tmp_path / "table.csv"), deposit(features=both))
    assert plain(made.matrix) == [[31, 0], [45.5, 1], [None, None], [None, None]]


@pytest.mark.parametrize(
    ("positive", "values", "expected"),
    [
        ("yes", ["yes", "no", " Yes ", "y"], [True, False, True, False]),
        (1, ["1", "0", "1", "2"], [True, False, True, False]),
        (1, ["1.0", "0.0", "1.0", ""], [True, False, True]),
        (True, ["True", "False", "true", "false"], [True, False, True, False]),
        (["a", "b"], ["a", "b", "c", "A"], [True, True, False, True]),
        (None, ["1", "true", "yes", "no"], [True, True, True, False]),
        ("yes", ["yes", "no", "yes", "no"], [True, False, True, False]),
        ("t", ["t", "f", "t", "f"], [True, False, True, False]),
    ],
)
def test_labels_are_compared_as_text_without_regard_to_case(
    tmp_path: Path, positive: Any, values: list[str], expected: list[bool]
) -> None:
    label = {"column": "bought"} if positive is None else {"column": "bought", "positive": positive}
    text = "age,bought\n" + "".join(f"{place},{value}\n" for place, value in enumerate(values))
    made = built(write(tmp_path / "table.csv", text), deposit(label=label, features={"age": {"trait": "age"}}))
    assert list(made.label) == expected


def test_a_label_may_be_a_number_or_a_boolean_of_parquet(tmp_path: Path) -> None:
    for number, values in enumerate((pa.array([1.0, 0.0]), pa.array([1, 0]), pa.array([True, False]))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"age": [1, 2], "bought": values}), path)
        label = {"column": "bought", "positive": [1, True]}
        assert list(built(str(path), deposit(label=label, features={"age": {"trait": "age"}})).label) == [True, False]


def test_columns_are_mapped_and_rows_chosen_by_the_source(tmp_path: Path) -> None:
    text = "id,years,date,y\n01,30,2025-06-30,1\n02,40,2025-07-01,0\n03,50,2025-07-02,1\n"
    source = {"visitor_id": "id", "timestamp": "date", "where": "years < 50", "traits": {"age": "years * 2"}}
    kinds = {"age": {"trait": "age"}, "month": {"clock": "month"}, "day": {"clock": "day"}}
    chosen = deposit(label={"column": "y", "positive": 1}, source=source, features=kinds)
    made = built(write(tmp_path / "table.csv", text), chosen)
    assert plain(made.matrix) == [[60, 6, 30], [80, 7, 1]]
    chunks = list(Table(str(tmp_path / "table.csv"), chosen).chunks(labelled=True))
    assert [chunk.visitor_ids for chunk in chunks] == [("01", "02")]


def test_many_rows_come_in_their_order_and_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK_ROWS", 2048)
    text = "age,bought\n" + "".join(f"{age},{'yes' if age % 3 == 0 else 'no'}\n" for age in range(10_000))
    chosen = deposit(features={"age": {"trait": "age"}})
    read = Table(write(tmp_path / "table.csv", text), chosen)
    assert len(list(read.chunks(labelled=True))) > 3
    made = table.build(read, features.compile(chosen))
    np.testing.assert_array_equal(made.matrix[:, 0], np.arange(10_000))
    np.testing.assert_array_equal(made.label, np.arange(10_000) % 3 == 0)


def test_golden_rows_give_the_vectors_of_their_rows(tmp_path: Path) -> None:
    chosen = deposit()
    text = ROWS + ROWS.partition("\n")[2] * 30
    made = built(write(tmp_path / "table.csv", text), chosen)
    assert len(made.golden) == dataset.GOLDEN_CASES
    vectors = {row.tobytes() for row in made.matrix}
    plan = features.compile(chosen)
    for golden in made.golden:
        nothing = np.empty(0, events.RECORD), np.zeros(2, np.int64)
        starts = np.array([0, len(golden.traits)])
        moment = np.array([golden.now_ms])
        vector = features.matrix(plan, *nothing, moment, golden.traits, starts, golden.request[None])
        assert vector[0].tobytes() in vectors


def test_strangers_are_added_to_every_part_but_the_last(tmp_path: Path) -> None:
    text = "age,bought\n" + "".join(f"{age},{'yes' if age % 4 == 0 else 'no'}\n" for age in range(2000))
    chosen = deposit(features={"age": {"trait": "age"}, "minutes": {"request": "minutes"}, "hour": {"clock": "hour"}})
    made = built(write(tmp_path / "table.csv", text), chosen)
    split = dataset.split(made, None)
    grown, parts = table.with_strangers(made, split, features.compile(chosen))
    np.testing.assert_array_equal(parts.test, split.test)
    for name in ("train", "stop", "calibrate"):
        before, after = getattr(split, name), getattr(parts, name)
        np.testing.assert_array_equal(after[: len(before)], before)
        added = after[len(before) :]
        assert len(added) == math.ceil(len(before) / table.STRANGERS)
        assert np.isnan(grown.matrix[added][:, :2]).all()
        np.testing.assert_array_equal(grown.label[added], made.label[before[:: table.STRANGERS]])
    np.testing.assert_array_equal(grown.matrix[: len(made)], made.matrix)


# --- replaying a table ---


def test_what_a_table_says_without_a_time_was_known_when_the_file_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv")
    os.utime(path, (1_700_000_000, 1_700_000_000.5))
    chosen = deposit()
    [chunk] = Table(path, chosen).chunks(labelled=False)
    assert set(chunk.traits["ts_ms"]) == {1_700_000_000_500}
    write(tmp_path / "table.csv", ROWS.replace("clerk", "cook"))
    os.utime(path, (1_700_000_100, 1_700_000_100))
    [later] = Table(path, chosen).chunks(labelled=False)
    plan = features.compile(chosen)
    both = np.concatenate((later.traits[: later.trait_starts[1]], chunk.traits[: chunk.trait_starts[1]]))
    nothing = np.empty(0, events.RECORD), np.zeros(2, np.int64)
    vector = features.matrix(plan, *nothing, np.array([1_800_000_000_000]), both, np.array([0, len(both)]))
    assert vector[0, chosen.names.index("job")] == 1, "a table that is replayed again with news replaces the old"


def test_without_labels_the_column_need_not_be_there(tmp_path: Path) -> None:
    text = "\n".join(line.rpartition(",")[0] for line in ROWS.splitlines()) + "\n"
    [chunk] = Table(write(tmp_path / "table.csv", text), deposit()).chunks(labelled=False)
    assert chunk.visitor_ids == ("1", "2", "3", "4")
    assert list(np.diff(chunk.trait_starts)) == [4, 4, 2, 0]
    assert events.valid(chunk.traits).all()


# --- what is refused ---


def refused(path: str, chosen: FeatureSpec) -> str:
    with pytest.raises((UnreadableEvents, TooLittleData)) as caught:
        built(path, chosen)
    told = str(caught.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize("feature", [{"count": "any"}, {"recency": "any"}, {"session": "count"}])
def test_features_of_events_are_refused_by_name(tmp_path: Path, feature: dict[str, Any]) -> None:
    chosen = deposit(features={"age": {"trait": "age"}, "busy": feature})
    told = refused(write(tmp_path / "table.csv"), chosen)
    assert told == "--table has no events for the feature 'busy'; train it with --events"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": {"column": "sold"}}, "label.column: sold is no column and no expression over the columns"),
        ({"label": None}, "the spec has no label column; write label: {column: NAME, positive: VALUE}"),
        ({"source": {"visitor_id": "client"}}, "source.visitor_id: client is no column"),
        ({"source": {"traits": {"age": "years"}}}, "source.traits.age: years is no column"),
        ({"source": {"where": "years > 3"}}, "source.where: years > 3 is no column"),
        ({"source": {"timestamp": "day"}}, "source.timestamp: day is no column"),
    ],
)
def test_what_the_file_cannot_give_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    told = refused(write(tmp_path / "table.csv"), deposit(**change))
    assert said in told
    assert "is no column" not in told or told.endswith("the file has age, job, flag, code, channel, minutes, bought")


def test_a_trait_that_no_column_has_is_reported(tmp_path: Path) -> None:
    read = Table(write(tmp_path / "table.csv", "age,bought\n1,yes\n"), deposit())
    table.build(read, features.compile(deposit()))
    missing = {"traits.job", "traits.flag", "traits.code", "context.channel", "context.minutes"}
    assert read.relation.missing == missing


@pytest.mark.parametrize("text", ["age,bought\n", "age,bought\n1,\n"])
def test_a_table_without_a_labelled_row_is_refused(tmp_path: Path, text: str) -> None:
    told = refused(write(tmp_path / "table.csv", text), deposit(features={"age": {"trait": "age"}}))
    assert "holds no rows" in told


def test_rows_without_label_visitor_or_time_are_left_out_and_counted_and_bounded(tmp_path: Path) -> None:
    rows = [f"{n},{n},2025-06-01,{'yes' if n % 2 else 'no'}" for n in range(100)]
    rows += ["101,7,2025-06-01,", ",7,2025-06-01,yes", "102,7,someday,yes", "103,7", "104,7,2025-06-01,yes,more"]
    source = {"visitor_id": "id", "timestamp": "date"}
    chosen = deposit(source=source, features={"age": {"trait": "age"}})
    read = Table(write(tmp_path / "table.csv", "id,age,date,bought\n" + "\n".join(rows) + "\n"), chosen)
    assert len(table.build(read, features.compile(chosen))) == 100
    count, examples = read.bad(5, labelled=True)
    assert count == 5
    assert examples[:3] == ["a row without a label", "a row without a readable timestamp", "a row without a visitor"]
    assert examples[3].startswith("table.csv line 105: ")
    with pytest.raises(
        UnreadableEvents, match=r"5 rows are bad, more than --max-bad-rows 4; for example a row without"
    ):
        read.bad(4, labelled=True)


def test_files_of_several_layouts_are_no_table(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "age,bought\n1,yes\n")
    write(tmp_path / "b.csv", "years,bought\n1,yes\n")
    told = refused(str(tmp_path), deposit(features={"age": {"trait": "age"}}))
    assert told == f"{tmp_path}: holds files of 2 layouts; a table has one, give its files alone"
