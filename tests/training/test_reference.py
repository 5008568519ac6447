"""The reference of a bundle: bins that together hold the training population, and quantiles of its scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import spec
from service.core.bundle import Bins
from training import reference

VALUES = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.5]), st.floats(-1e6, 1e6, width=32), st.just(np.nan)), max_size=80
)


def shares_by_hand(bins: Bins, values: npt.NDArray[np.float32]) -> list[float]:
    """Bin 0 holds what is missing, bin i + 1 what lies from edge i - 1 to below edge i."""
    counts = [0] * (len(bins.edges) + 2)
    for value in values:
        counts[0 if np.isnan(value) else 1 + sum(float(value) >= edge for edge in bins.edges)] += 1
    return [count / max(len(values), 1) for count in counts]


@given(VALUES)
def test_the_shares_are_those_of_the_values_in_each_bin(drawn: list[float]) -> None:
    values = np.array(drawn, np.float32)
    bins = reference.bins_of(values)
    assert list(bins.shares) == pytest.approx(shares_by_hand(bins, values))
    assert len(bins.edges) < reference.BINS
    assert not len(values) or sum(bins.shares) == pytest.approx(1)


def test_bins_of_many_different_values_hold_about_the_same() -> None:
    bins = reference.bins_of(np.random.default_rng(0).lognormal(size=10_000).astype(np.float32))
    assert len(bins.edges) == reference.BINS - 1
    assert bins.shares[0] == 0
    assert bins.shares[1:] == pytest.approx([0.1] * 10, abs=0.01)


def test_a_value_that_most_have_has_a_bin_whose_edges_ascend() -> None:
    values = np.concatenate((np.zeros(900), np.arange(1, 101))).astype(np.float32)
    bins = reference.bins_of(values)
    assert np.all(np.diff(bins.edges) > 0)
    assert max(bins.shares) == pytest.approx(0.9, abs=0.01)


def test_the_few_who_have_something_are_told_from_those_who_have_nothing() -> None:
    values = np.concatenate((np.zeros(970), np.arange(1, 31))).astype(np.float32)
    bins = reference.bins_of(values)
    assert bins.edges == (1.0,)
    assert bins.shares == pytest.approx((0, 0.97, 0.03))


@pytest.mark.parametrize("values", [[], [np.nan], [np.nan] * 5, [7.0] * 5, [np.inf, -np.inf, 0.0]])
def test_odd_populations_have_bins_too(values: list[float]) -> None:
    bins = reference.bins_of(np.array(values, np.float32))
    assert len(bins.shares) == len(bins.edges) + 2
    assert not np.isnan(bins.edges).any()


CODED = spec.parse(
    {
        "model": "m",
        "features": {
            "device": {"trait": "device", "categories": ["mobile", "desktop", "tablet"]},
            "grade": {"request": "grade", "categories": {"a": 1, "b": 5, "c": 2}},
            "age": {"trait": "age"},
            "hour": {"clock": "hour"},
        },
    }
)


def test_every_category_has_a_bin_of_its_own_even_one_that_nobody_has() -> None:
    matrix = np.array([[0, 1, 30, 5], [0, 5, 31, 6], [3, np.nan, np.nan, 7], [2, 2, 33, 8]], np.float32)
    described = reference.describe(CODED, matrix, np.array([0.1, 0.2], np.float32))
    device, grade = described.features["device"], described.features["grade"]
    assert device.edges == (0.5, 1.5, 2.5)
    assert device.shares == (0, 0.5, 0, 0.25, 0.25), "missing, mobile, desktop, tablet, other"
    assert grade.edges == (1.5, 3.5)
    assert grade.shares == (0.25, 0.25, 0.25, 0.25), "missing, a, c, b"
    assert list(described.features) == list(CODED.names)


def test_quantiles_are_a_thousand_steps_through_the_scores() -> None:
    scores = np.random.default_rng(0).random(5000).astype(np.float32)
    described = reference.describe(CODED, np.zeros((10, 4), np.float32), scores)
    assert len(described.quantiles) == reference.QUANTILES
    assert described.quantiles[0] == scores.min()
    assert described.quantiles[-1] == scores.max()
    assert described.quantiles[500] == pytest.approx(np.median(scores), abs=1e-6)
    assert np.all(np.diff(described.quantiles) >= 0)
    assert described.score.shares[1:] == pytest.approx([0.1] * 10, abs=0.001)


def test_scores_are_in_the_same_bin_before_and_after_they_are_rounded_for_the_answer() -> None:
    chance = np.random.default_rng(0)
    scores = np.where(chance.random(5000) < 0.4, 1 / 3, chance.beta(1, 20, 5000)).astype(np.float32)
    described = reference.describe(CODED, np.zeros((10, 4), np.float32), scores).score
    served = [float(f"{score:.6g}") for score in scores.tolist()]
    places, places_of_served = (np.searchsorted(described.edges, values, "right") for values in (scores, served))
    assert np.array_equal(places, places_of_served)
    assert max(described.shares) == pytest.approx(0.4, abs=0.11)
    assert 0 not in described.shares[1:]


@pytest.mark.parametrize("values", [[0.5], [0.5] * 7, [0.25, 0.5]])
def test_few_scores_have_bins_too(values: list[float]) -> None:
    described = reference.describe(CODED, np.zeros((1, 4), np.float32), np.array(values, np.float32)).score
    assert len(described.edges) == len(set(values)) - 1
    assert described.rows == len(values)


def test_a_reference_says_how_many_rows_its_shares_were_taken_from() -> None:
    described = reference.describe(CODED, np.zeros((10, 4), np.float32), np.array([0.1, 0.2], np.float32))
    assert {bins.rows for bins in described.features.values()} == {10}
    assert described.score.rows == 2


def test_rows_of_the_same_visitors_count_as_the_independent_ones_that_tell_as_much() -> None:
    often = np.array([7] * 9 + [8, 9], np.uint64)
    assert reference.scores_per_visitor(often) == pytest.approx((81 + 1 + 1) / 11)
    assert reference.scores_per_visitor(np.arange(5, dtype=np.uint64)) == 1
    assert reference.scores_per_visitor(np.empty(0, np.uint64)) == 1
    described = reference.describe(CODED, np.zeros((10, 4), np.float32), np.array([0.1, 0.2], np.float32), 2.5)
    assert {bins.rows for bins in described.features.values()} == {4}
    assert described.score.rows == 1
