"""Populations: everyone of several snapshots in one order, and a clear word about what is no snapshot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiences import population
from audiences.definitions import categories
from audiences.population import Floats, Population, UnreadableScores
from service.core import spec
from tests.audiences.conftest import AT_MS, WriteScores
from tests.conftest import SHOP

SPECS = {"shop": spec.parse(SHOP), "churn": spec.parse({**SHOP, "model": "churn"})}


def load(*directories: Path, features: dict[str, Sequence[str]] | None = None) -> Population:
    return population.load([population.open_snapshot(path) for path in directories], SPECS, features or {})


def rounded(values: Floats) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def test_a_snapshot_says_what_it_is_of(write_scores: WriteScores) -> None:
    found = population.open_snapshot(write_scores("s", {"a": 0.1, "b": 0.2}, features={"views_1d": [1, 2]}))
    assert (found.model, found.version, found.at_ms, found.rows) == ("shop", "1", AT_MS, 2)
    assert found.features == ("views_1d",)
    assert len(found.found.parts) == 2


def test_visitors_of_several_models_are_joined(write_scores: WriteScores) -> None:
    shop = write_scores("shop", {"a": 0.1, "b": 0.2, "ü": 0.3}, last_event_ms=[5, 0, 7], features={"device": [0, 1, 2]})
    churn = write_scores("churn", {"z": 0.9, "ü": 0.8, "a": 0.7}, model="churn", last_event_ms=[1, 9, 4])
    everyone = load(shop, churn, features={"shop": ["device"]})
    assert everyone.ids.to_pylist() == ["a", "b", "ü", "z"]
    assert rounded(everyone.models["shop"].propensity) == [0.1, 0.2, 0.3, None]
    assert rounded(everyone.models["churn"].propensity) == [0.7, None, 0.8, 0.9]
    assert rounded(everyone.models["shop"].features["device"]) == [0, 1, 2, None]
    assert everyone.models["shop"].codes["device"] == {"mobile": 0, "desktop": 1, "(other)": 2}
    assert everyone.last_event_ms.tolist() == [5, 0, 9, 1]
    assert everyone.places(["z", "nobody", "b", "\ud800"]).tolist() == [3, -1, 1, -1]


def test_a_category_of_numbers_has_no_others() -> None:
    coded = spec.parse({**SHOP, "features": {"t": {"trait": "tier", "categories": {"gold": 3, "none": 1}}}})
    assert categories(coded, "t") == {"gold": 3.0, "none": 1.0}
    assert categories(SPECS["shop"], "loyalty") == {}


def test_nothing_but_a_snapshot_is_read(tmp_path: Path, write_scores: WriteScores) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UnreadableScores, match=r"empty: holds no part-\*.parquet; give a directory that propensity score"
    ):
        population.open_snapshot(tmp_path / "empty")
    (tmp_path / "empty" / "part-00000.parquet").write_bytes(b"rubbish")
    with pytest.raises(UnreadableScores, match="empty: cannot be read"):
        population.open_snapshot(tmp_path / "empty")
    pq.write_table(pa.table({"visitor_id": ["a"]}), tmp_path / "empty" / "part-00000.parquet")
    with pytest.raises(UnreadableScores, match="empty: has no column propensity"):
        population.open_snapshot(tmp_path / "empty")


def test_a_directory_that_mixes_moments_is_refused(write_scores: WriteScores) -> None:
    mixed, later = write_scores("s", {"a": 0.1}, parts=1), write_scores("t", {"b": 0.1}, parts=1, at_ms=AT_MS + 1)
    (later / "part-00000.parquet").rename(mixed / "part-00001.parquet")
    with pytest.raises(UnreadableScores, match="mixes models, versions or moments"):
        population.open_snapshot(mixed)


def test_a_visitor_who_is_there_twice_is_refused(write_scores: WriteScores) -> None:
    one, other = write_scores("s", {"a": 0.1}, parts=1), write_scores("t", {"a": 0.1}, parts=1)
    (other / "part-00000.parquet").rename(one / "part-00001.parquet")
    with pytest.raises(UnreadableScores, match="has a visitor twice"):
        load(one)


@pytest.mark.parametrize("score", [1.5, -0.1, math.nan])
def test_what_is_no_probability_is_refused(write_scores: WriteScores, score: float) -> None:
    with pytest.raises(UnreadableScores, match="no probability"):
        load(write_scores("s", {"a": 0.1, "b": score}))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("visitor_id", ["a", ""], "has a visitor twice, or one without id"),
        ("propensity", ["0.1", "much"], "propensity is no float"),
        ("at", ["soon", "soon"], r"at is no timestamp\[ms, tz=UTC\]"),
        ("at", [-5, -5], "is of a moment before 1970"),
        ("last_event_ms", ["x", "y"], "last_event_ms is no int64"),
        ("views_1d", ["many", "few"], "views_1d is no float"),
    ],
)
def test_a_column_that_something_else_wrote_is_named(
    write_scores: WriteScores, name: str, values: list[object], said: str
) -> None:
    path = write_scores("s", {"a": 0.1, "b": 0.2}, features={"views_1d": [1, 2]}, parts=1) / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array(values)), path)
    with pytest.raises(UnreadableScores, match=said):
        load(path.parent, features={"shop": ["views_1d"]})


def test_a_feature_that_is_not_there_is_named_with_the_command_that_writes_it(write_scores: WriteScores) -> None:
    with pytest.raises(UnreadableScores, match="no feature spend_7d.*--features device,spend_7d"):
        load(write_scores("s", {"a": 0.1}, features={"device": [0]}), features={"shop": ["device", "spend_7d"]})


def test_two_snapshots_of_one_model_are_refused(write_scores: WriteScores) -> None:
    both = [population.open_snapshot(write_scores(name, {"a": 0.1})) for name in ("s", "t")]
    with pytest.raises(UnreadableScores, match="are both of shop; give the newer one alone"):
        population.require_apart(both)


def test_a_version_without_its_bundle_is_named(write_scores: WriteScores, two_models: Path) -> None:
    found = population.open_snapshot(write_scores("s", {"a": 0.1}, version="9"))
    with pytest.raises(UnreadableScores, match=r"was scored by shop 9, and .*/shop/9 is not there; .*--artifacts"):
        population.bundles_of([found], two_models)


def test_numbers_of_visitors_are_spread_evenly() -> None:
    numbers = population.drawn([f"visitor-{place}" for place in range(100_000)])
    counts = np.histogram(numbers, np.linspace(0, 2.0**64, 11))[0]
    # Chi-square with 9 degrees of freedom exceeds 27.9 with chance 0.001.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
