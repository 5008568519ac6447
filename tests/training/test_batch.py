"""Batch scoring: what a snapshot of everybody holds, and that it is what the service would say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import snapshots
from service.core import bundle, events, features
from service.core.bundle import Bundle, Reference
from service.core.errors import PropensityError
from service.core.segments import SEGMENTS
from tests.conftest import Shop
from training import batch, source
from training.batch import Options
from training.engine import Here, Processes

DAY_MS = 86_400_000
IDS = ("anonymousId", "userId")


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a snapshot by visitor."""
    found = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_visitor = {row["visitor_id"]: row for row in found}
    assert len(by_visitor) == len(found), "a visitor twice"
    return by_visitor


def at_of(shop: Shop) -> int:
    """The last moment of the shop."""
    return int(
        pq.read_table(shop.events, columns=["timestamp"])["timestamp"].to_numpy().max().astype("M8[ms]").astype(int)
    )


@pytest.fixture(scope="module")
def snapshot(open_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everybody in the shop, scored here, with all features."""
    out = tmp_path_factory.mktemp("scores") / "now"
    batch.score(open_shop.files, open_shop.model, at_of(open_shop), out, Options(columns=("all",)), Here())
    return out


def test_a_snapshot_has_the_columns_that_its_readers_rely_on(open_shop: Shop, snapshot: Path) -> None:
    schema = pq.read_schema(snapshot / "part-00000.parquet")
    names = bundle.load(open_shop.model).spec.names
    assert schema.remove_metadata() == batch.schema(names)
    assert [f"{field.name} {field.type}" for field in batch.schema()] == [
        "visitor_id string",
        "propensity float",
        "percentile float",
        "segment string",
        "model string",
        "version string",
        "at timestamp[ms, tz=UTC]",
        "last_event_ms int64",
    ]


def test_everybody_is_in_it_once_in_one_segment(open_shop: Shop, snapshot: Path) -> None:
    table = pq.read_table(open_shop.events, columns=["userId", "anonymousId"]).to_pylist()
    assert set(rows_of(snapshot)) == {row["userId"] or row["anonymousId"] for row in table}
    loaded = bundle.load(open_shop.model)
    for row in rows_of(snapshot).values():
        assert row["segment"] == loaded.segment(row["propensity"])
        assert row["percentile"] == np.float32(loaded.percentile(row["propensity"]))
        assert (row["model"], row["version"]) == (loaded.name, loaded.version)


def test_who_logged_in_by_then_is_one_person_with_both_histories(open_shop: Shop, tmp_path: Path) -> None:
    """As if the files had named the person all along; and before the login as if nobody had ever logged in."""
    events = pq.read_table(open_shop.events)
    anonymous, known = (sorted(set(events[name].to_pylist()) - {None})[:60] for name in IDS)
    owners = dict(zip(anonymous, known, strict=True))
    begin_ms, end_ms = at_of(open_shop) - DAY_MS, at_of(open_shop) + 1
    logins = tmp_path / "logins.ndjson"
    with logins.open("w") as lines:
        for one, other in owners.items():
            said = {"type": "identify", "anonymousId": one, "userId": other, "timestamp": end_ms, "event": None}
            lines.write(json.dumps(said) + "\n")
    named = [
        owners.get(one, one) or other for one, other in zip(*(events[name].to_pylist() for name in IDS), strict=True)
    ]
    by_hand = events.drop_columns(list(IDS)).append_column("userId", pa.array(named, pa.string()))
    pq.write_table(by_hand, tmp_path / "by-hand.parquet")

    def scored(files: list[str], at_ms: int) -> dict[str, dict[str, Any]]:
        made = batch.score(files, open_shop.model, at_ms, tmp_path / "out", Options(columns=("all",)), Here())
        found = rows_of(tmp_path / "out")
        assert made.rows == len(found)
        return found

    both = [*open_shop.files, str(logins)]
    joined, alone = scored(both, end_ms), scored(open_shop.files, end_ms)
    assert set(alone) - set(joined) == set(owners)
    named_so = scored([str(tmp_path / "by-hand.parquet")], end_ms)
    assert repr({name: joined[name] for name in named_so}) == repr(named_so)
    assert set(joined) == set(named_so)
    assert sum(repr(joined[name]) != repr(alone[name]) for name in joined) > 30
    before, nobody = scored(both, begin_ms), scored(open_shop.files, begin_ms)
    assert repr({name: before[name] for name in nobody}) == repr(nobody)


def test_a_process_that_scores_imports_no_pandas(open_shop: Shop, tmp_path: Path) -> None:
    """pyarrow would, for a column of Python objects; every worker would wait for it."""
    given = f"{open_shop.files!r}, Path({str(open_shop.model)!r}), 1790000000000, Path({str(tmp_path / 'now')!r})"
    code = f"""
import sys
from pathlib import Path
from training import batch
from training.engine import Here
batch.score({given}, batch.Options(columns=("all",)), Here())
assert "pyarrow" in sys.modules
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_visitor_scores_as_alone(open_shop: Shop, snapshot: Path, tmp_path: Path) -> None:
    """One row at a time through kernel and model, as the service does it: the same bits."""
    loaded, at_ms = bundle.load(open_shop.model), at_of(open_shop)
    partition = source.read(open_shop.files, loaded.spec, tmp_path).partition(0, with_ids=True)
    found = rows_of(snapshot)
    assert len(found) > 1000
    unknown = np.array([loaded.plan.encode_request({})], np.float32)
    for place, visitor_id in enumerate(partition.visitor_ids or []):
        records = partition.records[partition.starts[place] : partition.starts[place + 1]]
        traits = partition.traits[partition.trait_starts[place] : partition.trait_starts[place + 1]]
        alone = features.evaluate(
            loaded.plan,
            *(records, np.array([0, len(records)]), np.array([at_ms])),
            *(traits, np.array([0, len(traits)]), unknown),
        )
        row = found[visitor_id]
        assert row["propensity"] == loaded.predict(alone.matrix)[0]
        values = np.array([row[name] for name in loaded.spec.names], np.float32)
        assert np.array_equal(values, alone.matrix[0], equal_nan=True)
        age_ms = int(alone.last_age_ms[0])
        assert row["last_event_ms"] == (at_ms - age_ms if age_ms >= 0 else 0)


def test_several_processes_write_the_same_scores(open_shop: Shop, snapshot: Path, tmp_path: Path) -> None:
    log = source.read(open_shop.files, bundle.load(open_shop.model).spec, tmp_path, partitions=3)
    assert log.partitions == 3
    job = batch.Job(open_shop.model, tmp_path, tmp_path / "out", at_of(open_shop), {}, ("views",), "1GB")
    job.out.mkdir()
    done = dict(Processes(2).run(batch.score_partition, job, log.partitions))
    assert sorted(done) == [0, 1, 2]
    wanted, found = rows_of(snapshot), rows_of(job.out)
    assert len(found) == len(wanted) == sum(int(counts.segments.sum()) for counts in done.values())
    assert all(row[name] == wanted[visitor][name] for visitor, row in found.items() for name in batch.COLUMNS)


# --- who is hardly known ---


def files_with(directory: Path, lines: Sequence[dict[str, Any]]) -> list[str]:
    path = directory / "more.ndjson"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [str(path)]


def test_who_is_hardly_known_is_scored_as_the_service_would_somebody_new(open_shop: Shop, tmp_path: Path) -> None:
    at_ms = at_of(open_shop)
    lines = [
        {"type": "identify", "userId": "told", "traits": {"device": "mobile"}, "timestamp": at_ms - DAY_MS},
        {"event": "Product Viewed", "userId": "later", "timestamp": at_ms + 1000, "properties": {"price": 9}},
        {"event": "Something Else", "userId": "ignored", "timestamp": at_ms - 1000},
        {"event": "Product Viewed", "userId": "long ago", "timestamp": at_ms - 91 * DAY_MS},
        {"event": "Product Viewed", "userId": "just now", "timestamp": at_ms},
    ]
    out = tmp_path / "out"
    batch.score(files_with(tmp_path, lines), open_shop.model, at_ms, out, Options(columns=("device", "views")), Here())
    found, loaded = rows_of(out), bundle.load(open_shop.model)
    assert set(found) == {"told", "later", "ignored", "long ago", "just now"}
    assert [found[name]["last_event_ms"] for name in ("told", "later", "ignored", "long ago", "just now")] == [
        *(0, 0, 0, 0),
        at_ms,
    ]
    nothing = np.empty(0, events.RECORD), np.zeros(2, np.int64)
    unknown = np.array([loaded.plan.encode_request({})], np.float32)
    stranger = loaded.predict(features.matrix(loaded.plan, *nothing, np.array([at_ms]), *nothing, unknown))[0]
    assert {found[name]["propensity"] for name in ("later", "ignored", "long ago")} == {stranger}
    assert found["told"]["device"] == 0.0
    assert math.isnan(found["later"]["device"])
    assert [found[name]["views"] for name in ("later", "just now")] == [0.0, 1.0]


def test_the_context_of_the_request_is_unknown_unless_it_is_given(open_shop: Shop, tmp_path: Path) -> None:
    files = files_with(tmp_path, [{"event": "Product Viewed", "userId": "a", "timestamp": 1_790_000_000_000}])
    given: list[dict[str, object]] = [{}, {"referrer": "email"}, {"referrer": "nonsense"}]
    codes = []
    for context in given:
        options = Options(columns=("referrer",), context=context)
        batch.score(files, open_shop.model, 1_790_000_000_000, tmp_path / "out", options, Here())
        codes.append(rows_of(tmp_path / "out")["a"]["referrer"])
    assert math.isnan(codes[0])
    assert codes[1] == 2.0
    assert codes[2] != 2.0


# --- the directory ---


def test_a_snapshot_takes_the_place_of_an_older_one_and_nothing_else(open_shop: Shop, tmp_path: Path) -> None:
    files = files_with(tmp_path, [{"event": "Product Viewed", "userId": "a", "timestamp": 1_790_000_000_000}])
    out = tmp_path / "scores"
    out.mkdir()
    (out / "part-00099.parquet").write_bytes(b"old")
    batch.score(files, open_shop.model, 1_790_000_000_000, out, Options(), Here())
    assert [file.name for file in out.iterdir()] == ["part-00000.parquet"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(PropensityError, match="is no directory of scores; name a new one with --out"):
        batch.score(files, open_shop.model, 1_790_000_000_000, out, Options(), Here())
    assert (out / "notes.txt").exists()


def test_what_fails_leaves_nothing_behind(open_shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(PropensityError, match="none.csv: no such file"):
        batch.score([str(tmp_path / "none.csv")], open_shop.model, 0, tmp_path / "out", Options(), Here())
    assert list(tmp_path.iterdir()) == []


def test_at_a_url_the_same_scores_are_found(open_shop: Shop, snapshot: Path) -> None:
    out = f"memory://{uuid.uuid4().hex}/scores"
    made = batch.score(open_shop.files, open_shop.model, at_of(open_shop), out, Options(columns=("all",)), Here())
    assert made.path == out
    found = snapshots.find(out)
    columns = ["visitor_id", "propensity", "segment", "at"]
    by_url = pq.ParquetDataset(list(found.parts), filesystem=found.filesystem).read(columns)
    assert by_url.equals(pq.ParquetDataset(snapshot).read(columns))


@pytest.mark.parametrize(
    ("columns", "said"),
    [(("views", "vews"), "--features vews: model purchase_5d has no such feature; there are views_1d, views, ")],
)
def test_an_unknown_feature_is_told(open_shop: Shop, tmp_path: Path, columns: tuple[str, ...], said: str) -> None:
    with pytest.raises(PropensityError, match=said):
        batch.score(open_shop.files, open_shop.model, 0, tmp_path / "out", Options(columns=columns), Here())


# --- percentiles and segments of many scores ---


def with_reference(loaded: Bundle, quantiles: Sequence[float]) -> Bundle:
    reference = Reference(features=loaded.reference.features, score=loaded.reference.score, quantiles=tuple(quantiles))
    return Bundle(loaded.path, loaded.manifest, loaded.spec, loaded.plan, reference, loaded.session)


@cache
def loaded_once(model: Path) -> Bundle:
    return bundle.load(model)


@given(st.data())
def test_percentiles_and_segments_of_many_scores_are_those_of_each(open_shop: Shop, data: st.DataObject) -> None:
    some = st.floats(0, 1, width=32)
    quantiles = sorted(data.draw(st.lists(some, min_size=2, max_size=12)))
    loaded = with_reference(loaded_once(open_shop.model), quantiles)
    near = st.sampled_from([*quantiles, *loaded.cutoffs])
    scores = np.array(data.draw(st.lists(some | near, min_size=1, max_size=50)), np.float32)
    assert loaded.percentiles(scores).tolist() == [loaded.percentile(score) for score in scores.tolist()]
    names = [SEGMENTS[place] for place in loaded.segment_places(scores)]
    assert names == [loaded.segment(score) for score in scores.tolist()]
