"""PSI and what chance gives: checked by hand, against scipy, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from service.core import drift, spec
from service.core.bundle import Bins, Reference

SHARES = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 10, 11, 40, 301])
@pytest.mark.parametrize("above", [0.5, 0.05, 0.01, 0.01 / 25, 1e-9])
def test_the_quantile_is_that_of_the_chi_square_distribution(freedom: int, above: float) -> None:
    assert drift.chi_square_quantile(above, freedom) == pytest.approx(stats.chi2.isf(above, freedom), rel=1e-8)


def test_nothing_exceeds_0_by_less_than_chance_1() -> None:
    assert drift.chi_square_above(0, 1) == drift.chi_square_above(0, 2) == 1


def psi_by_hand(counts: list[int], shares: list[float]) -> float:
    reference = [(share + 1e-4) / (sum(shares) + 1e-4 * len(shares)) for share in shares]
    total = 0.0
    for count, expected in zip(counts, reference, strict=True):
        seen = 0.8 * count / sum(counts) + 0.2 * expected
        total += (seen - expected) * math.log(seen / expected)
    return total / 0.64


@given(SHARES, st.data())
def test_psi_is_the_sum_over_bins_finite_and_not_below_0(weights: list[int], data: st.DataObject) -> None:
    size = len(weights)
    counts = data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size).filter(any))
    shares = [weight / sum(weights) for weight in weights]
    value = drift.psi(counts, shares)
    assert value == pytest.approx(psi_by_hand(counts, shares), abs=1e-12)
    assert 0 <= value + 1e-12 < math.inf


def test_psi_of_nobody_is_unknown() -> None:
    assert math.isnan(drift.psi([0, 0], [0.5, 0.5]))


def test_psi_depends_on_ratios_of_counts_alone() -> None:
    counts, shares = np.array([3, 0, 50, 7]), [0.1, 0.1, 0.7, 0.1]
    assert drift.psi(counts * 1.0041, shares) == pytest.approx(drift.psi(counts, shares), abs=1e-14)


def test_for_a_small_shift_psi_is_the_textbooks() -> None:
    shares, seen = np.full(10, 0.1), np.full(10, 0.1) + 0.005 * np.array([1, -1] * 5)
    textbook = float(np.sum((seen - shares) * np.log(seen / shares)))
    assert drift.psi(seen * 1e6, shares) == pytest.approx(textbook, rel=0.01)


@pytest.mark.parametrize(("scores", "rows"), [(300, 10**9), (1000, 10**9), (10_000, 10**9), (1000, 1000)])
def test_scaled_psi_of_the_same_population_is_about_chi_square(scores: int, rows: int) -> None:
    shares, random = np.array([0.02, *[0.098] * 10]), np.random.default_rng(5)
    references = random.multinomial(rows, shares, 4000) / rows
    seen = random.multinomial(scores, shares, 4000)
    scaled = [drift.psi(one, other) / (1 / scores + 1 / rows) for one, other in zip(seen, references, strict=True)]
    for above in (0.5, 0.1, 0.01):
        exceeded = np.mean(np.array(scaled) > drift.chi_square_quantile(above, 10))
        assert exceeded == pytest.approx(above, abs=4 * math.sqrt(above / 4000) + 0.15 * above)


CLOCKED = spec.parse(
    {
        "model": "m",
        "features": {"age": {"trait": "age"}, "grade": {"request": "grade"}, "hour": {"clock": "hour"}},
    }
)


def test_every_feature_and_the_score_has_a_critical_value_but_the_clock() -> None:
    wide = Bins(edges=tuple(range(9)), shares=(0.0, *[0.1] * 10))
    narrow = Bins(edges=(), shares=(0.25, 0.75))
    reference = Reference(features={"age": wide, "grade": narrow, "hour": wide}, score=wide, quantiles=(0.0, 1.0))
    critical = drift.critical_values(CLOCKED, reference)
    assert critical == {
        "age": pytest.approx(stats.chi2.isf(0.01 / 4, 10)),
        "grade": pytest.approx(stats.chi2.isf(0.01 / 4, 1)),
        "hour": math.inf,
        "(score)": pytest.approx(stats.chi2.isf(0.01 / 4, 10)),
    }


def test_a_reference_of_few_rows_raises_what_chance_gives() -> None:
    assert drift.chance_level(30.0, 1000, 0) == pytest.approx(0.03)
    assert drift.chance_level(30.0, 1000, 1000) == pytest.approx(0.06)
    assert drift.critical_value(1, 25) == 0


def test_scores_of_the_same_visitors_raise_what_chance_gives() -> None:
    """400 visitors, scored five times each, vary as 400 scores do and not as 2,000."""
    shares, random = np.full(10, 0.1), np.random.default_rng(6)
    critical = drift.chi_square_quantile(0.01, 9)
    values = [drift.psi(5 * random.multinomial(400, shares), shares) for _ in range(4000)]
    assert np.mean(np.array(values) > drift.chance_level(critical, 2000, 0)) > 0.3
    assert np.mean(np.array(values) > drift.chance_level(critical, 2000, 0, 5)) == pytest.approx(0.01, abs=0.007)
