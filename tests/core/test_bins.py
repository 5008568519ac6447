"""Bins of a reference: their texts, and counts that are those of a slow and obvious search."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import bins, bundle, spec
from service.core.bundle import Bins, Bundle
from tests.conftest import WriteBundle

EDGES = st.lists(st.floats(allow_nan=False, allow_infinity=False), unique=True, max_size=12).map(sorted)
VALUES = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 1.5, math.nan, math.inf, -math.inf]))


def bins_of(edges: list[float]) -> Bins:
    return Bins(edges=tuple(edges), shares=(1.0,) * (len(edges) + 2))


def by_hand(edges: list[float], values: list[float]) -> list[int]:
    """Bin 0 holds what is missing, bin i + 1 what lies from edge i - 1 to below edge i."""
    counts = [0] * (len(edges) + 2)
    for value in values:
        counts[0 if math.isnan(value) else 1 + sum(value >= edge for edge in edges)] += 1
    return counts


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> Bundle:
    return bundle.load(write_bundle(tmp_path_factory.mktemp("bins")))


def laid_out(loaded: Bundle, edges: list[list[float]]) -> bins.Layout:
    """The bins of a bundle whose features and, last, score have these edges."""
    names = [*loaded.spec.names, "score"]
    given = dict(zip(names, map(bins_of, edges), strict=True))
    score = given.pop("score")
    reference = loaded.reference.model_copy(update={"features": given, "score": score})
    changed = Bundle(loaded.path, loaded.manifest, loaded.spec, loaded.plan, reference, loaded.session)
    return bins.layout(changed)


@given(data=st.data())
def test_values_are_counted_as_a_slow_search_counts_them(loaded: Bundle, data: st.DataObject) -> None:
    width = len(loaded.spec.names) + 1
    edges = data.draw(st.lists(EDGES, min_size=width, max_size=width))
    near = [float(np.float32(edge)) for own in edges for edge in own if abs(edge) < 3e38]
    value = st.one_of(VALUES, st.sampled_from([*near, 0.0]))
    rows = data.draw(st.lists(st.lists(value, min_size=width, max_size=width), max_size=20))
    matrix = np.array(rows, np.float32).reshape(len(rows), width)
    counts = laid_out(loaded, edges).count(matrix[:, :-1], matrix[:, -1])
    wanted = [by_hand(own, matrix[:, column].astype(float).tolist()) for column, own in enumerate(edges)]
    assert counts.tolist() == [count for own in wanted for count in own]


def test_counting_leaves_what_it_is_given_as_it_is(loaded: Bundle) -> None:
    matrix = np.full((3, len(loaded.spec.names)), np.nan, np.float32)
    before = matrix.copy()
    matrix.flags.writeable = False
    bins.layout(loaded).count(matrix, np.zeros(3, np.float32))
    assert np.array_equal(matrix, before, equal_nan=True)


def test_the_bins_of_features_in_their_order_and_of_the_score_have_the_shares_of_the_reference(loaded: Bundle) -> None:
    layout = bins.layout(loaded)
    assert list(dict.fromkeys(layout.features)) == [*loaded.spec.names, bins.SCORE]
    assert layout.shares == (0.2, 0.3, 0.5) * (len(loaded.spec.names) + 1)
    assert layout.texts[:3] == ("missing", "below 1", "from 1")


@pytest.mark.parametrize(
    ("edges", "wanted"),
    [
        ([], ["any value"]),
        ([3.0], ["below 3", "from 3"]),
        ([3.0, 7.5, 40.0], ["below 3", "3 to 7.5", "7.5 to 40", "from 40"]),
        ([86_400.0, 604_800.0], ["below 86400", "86400 to 604800", "from 604800"]),
        ([-0.5, 0.0], ["below -0.5", "-0.5 to 0", "from 0"]),
        ([0.123456789, 0.987654321], ["below 0.1235", "0.1235 to 0.9877", "from 0.9877"]),
        ([0.1234561, 0.1234569], ["below 0.123456", "0.123456 to 0.123457", "from 0.123457"]),
        ([1e-9], ["below 1e-09", "from 1e-09"]),
        ([1e20], ["below 1e+20", "from 1e+20"]),
        ([123456.78], ["below 123500", "from 123500"]),
    ],
)
def test_ranges_are_written_for_people(edges: list[float], wanted: list[str]) -> None:
    assert list(bins.texts(bins_of(edges))) == ["missing", *wanted]


@given(EDGES)
def test_different_bins_have_different_texts(edges: list[float]) -> None:
    found = bins.texts(bins_of(edges))
    assert len(set(found)) == len(found) == len(edges) + 2
    assert all(len(text) < 60 for text in found)


def feature(document: dict[str, Any]) -> spec.Feature:
    return spec.parse({"model": "m", "features": {"f": document}}).features["f"]


@pytest.mark.parametrize(
    ("categories", "edges", "wanted"),
    [
        (["mobile", "desktop"], [0.5, 1.5], ["mobile", "desktop", "other"]),
        ([1, 2.5, True], [0.5, 1.5, 2.5], ["1", "2.5", "true", "other"]),
        ({"a": 1, "b": 5, "c": 2}, [1.5, 3.5], ["a", "c", "b"]),
        ({"a": 1, "b": 5, "c": 1}, [3.0], ["a, c", "b"]),
        (dict.fromkeys("abcdef", 1), [], ["a, b, c ..."]),
        (["missing", "other"], [0.5, 1.5], ["category missing", "category other", "other"]),
        (["category other", "other"], [0.5, 1.5], ["category other", "category category other", "other"]),
        # A reference that was not made by codes.
        (["mobile", "desktop"], [1.0], ["below 1", "from 1"]),
        (["mobile", "desktop"], [0.2, 0.5, 1.5], ["below 0.2", "0.2 to 0.5", "0.5 to 1.5", "from 1.5"]),
    ],
)
def test_categories_have_their_names(categories: Any, edges: list[float], wanted: list[str]) -> None:
    for source in ("trait", "request"):
        found = bins.texts(bins_of(edges), feature({source: "x", "categories": categories}))
        assert list(found) == ["missing", *wanted]
        assert len(set(found)) == len(found)


def test_no_feature_can_have_the_name_of_the_score() -> None:
    with pytest.raises(spec.InvalidSpec):
        spec.parse({"model": "m", "features": {bins.SCORE: {"count": "any"}}})
    assert re.fullmatch(r"\(\w+\)", bins.SCORE)


def test_a_reference_that_does_not_say_its_rows_has_none(tmp_path: Path, write_bundle: WriteBundle) -> None:
    assert bundle.load(write_bundle(tmp_path)).reference.score.rows == 0
