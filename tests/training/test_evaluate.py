"""Holds `training.evaluate` to slow oracles, to what others compute, and to real data with known leaks."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sklearn

from training import evaluate
from training.evaluate import Bools, Floats, Matrix, OneClass

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SHOPPERS = DATA / "online_shoppers_intention.csv.gz"
BANK = DATA / "bank_additional_full.csv.gz"
RETAIL = DATA / "online_retail_2009_2010.parquet"
Labelled = tuple[Bools, Floats]


@st.composite
def labelled(draw: st.DrawFn) -> Labelled:
    """Rows of both classes with many tied probabilities."""
    rows = draw(st.integers(2, 40))
    label = draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(lambda drawn: len(set(drawn)) == 2))
    levels = draw(st.lists(st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.7, 1.0]), min_size=rows, max_size=rows))
    return np.array(label), np.array(levels)


def drawn(rows: int, seed: int = 0) -> Labelled:
    """Labels that are drawn from their own probabilities: a perfectly calibrated model."""
    random = np.random.default_rng(seed)
    probability = random.beta(0.6, 6, rows)
    return random.random(rows) < probability, probability


@given(labelled())
def test_metrics_equal_those_of_scikit_learn(case: Labelled) -> None:
    label, probability = case
    metrics = evaluate.evaluate(label, probability)
    clipped = np.clip(probability, 1e-15, 1 - 1e-15)
    assert metrics.roc_auc == pytest.approx(sklearn.roc_auc_score(label, probability))
    assert metrics.average_precision == pytest.approx(sklearn.average_precision_score(label, probability))
    assert metrics.log_loss == pytest.approx(sklearn.log_loss(label, clipped))
    assert metrics.brier == pytest.approx(sklearn.brier_score_loss(label, probability))
    assert (metrics.rows, metrics.positives) == (len(label), label.sum())


@given(labelled())
def test_the_order_of_rows_does_not_matter(case: Labelled) -> None:
    label, probability = case
    order = np.random.default_rng(len(label)).permutation(len(label))
    one, other = evaluate.evaluate(label, probability), evaluate.evaluate(label[order], probability[order])
    assert np.allclose(one.gains, other.gains)
    assert one.roc_auc == other.roc_auc
    assert one.roc_auc_interval == pytest.approx(other.roc_auc_interval)
    assert one.average_precision_interval == pytest.approx(other.average_precision_interval)
    assert one.calibration_error == pytest.approx(other.calibration_error)


def test_metrics_are_json() -> None:
    label, probability = drawn(500)
    for scores in (probability, np.full(500, 0.1), label.astype(np.float64)):
        text = json.dumps(dataclasses.asdict(evaluate.evaluate(label, scores)), allow_nan=False)
        assert json.loads(text)["rows"] == 500


def test_perfect_scores_are_perfect() -> None:
    label = np.arange(100) % 4 == 0
    metrics = evaluate.evaluate(label, label.astype(np.float64))
    assert (metrics.roc_auc, metrics.average_precision, metrics.brier) == (1, 1, 0)
    assert metrics.roc_auc_interval == (1, 1)
    assert metrics.calibration_error == 0
    assert metrics.lift[:3] == pytest.approx((4, 4, 2))
    assert metrics.gains[2:] == (1,) * 8


def test_constant_scores_are_chance_whatever_the_order_of_rows() -> None:
    label = np.arange(1000) < 50
    metrics = evaluate.evaluate(label, np.full(1000, 0.05))
    assert metrics.roc_auc == 0.5
    assert metrics.average_precision == pytest.approx(0.05)
    assert metrics.lift == pytest.approx((1,) * 10)
    assert metrics.calibration_error == pytest.approx(0)
    assert metrics.calibration_slope is None


def test_a_decile_takes_its_part_of_tied_rows() -> None:
    label = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0], np.uint8)
    probability = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    metrics = evaluate.evaluate(label, probability)
    assert metrics.gains == pytest.approx((1 / 3, 1 / 2, 2 / 3, 5 / 6, 1, 1, 1, 1, 1, 1))
    assert sum(metrics.lift) == pytest.approx(10)


def resampled(label: Bools, probability: Floats, visitor: npt.NDArray[np.int64]) -> Floats:
    """Standard deviations of ROC-AUC and average precision over bootstrap samples of visitors: the slow oracle."""
    random = np.random.default_rng(5)
    rows_of = [np.flatnonzero(visitor == one) for one in range(visitor.max() + 1)]
    values = []
    for _ in range(200):
        rows = np.concatenate([rows_of[one] for one in random.integers(0, len(rows_of), len(rows_of))])
        values.append(
            (
                sklearn.roc_auc_score(label[rows], probability[rows]),
                sklearn.average_precision_score(label[rows], probability[rows]),
            )
        )
    return np.asarray(np.std(values, axis=0), np.float64)


@pytest.mark.parametrize("rows_each", [1, 8])
def test_intervals_are_as_wide_as_a_bootstrap_of_visitors_says(rows_each: int) -> None:
    random = np.random.default_rng(rows_each)
    visitor = np.repeat(np.arange(2400 // rows_each), rows_each)
    margin = np.repeat(random.normal(-2, 1, 2400 // rows_each), rows_each)
    whim = np.repeat(random.normal(0, 1.5, 2400 // rows_each), rows_each)
    label = random.random(2400) < 1 / (1 + np.exp(-margin - whim))
    probability = np.round(1 / (1 + np.exp(-margin)), 2)
    metrics = evaluate.evaluate(label, probability, visitor)
    intervals = np.array([metrics.roc_auc_interval, metrics.average_precision_interval])
    widths = np.diff(intervals, axis=1)[:, 0] / (2 * 1.96)
    assert widths == pytest.approx(resampled(label, probability, visitor), rel=0.15)


def test_rows_of_one_visitor_do_not_count_as_independent() -> None:
    label, probability = drawn(400)
    visitor = np.arange(400)
    tenfold = np.tile(label, 10), np.tile(probability, 10)
    once = evaluate.evaluate(label, probability, visitor)
    assert evaluate.evaluate(*tenfold, np.tile(visitor, 10)).roc_auc_interval == pytest.approx(once.roc_auc_interval)
    low, high = evaluate.evaluate(*tenfold).roc_auc_interval
    assert high - low < 0.5 * (once.roc_auc_interval[1] - once.roc_auc_interval[0])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = evaluate.evaluate(*drawn(500_000, seed=99))
    held = np.zeros(2)
    for seed in range(200):
        metrics = evaluate.evaluate(*drawn(2000, seed))
        held += (
            metrics.roc_auc_interval[0] <= truth.roc_auc <= metrics.roc_auc_interval[1],
            metrics.average_precision_interval[0] <= truth.average_precision <= metrics.average_precision_interval[1],
        )
    assert np.all((held / 200 > 0.9) & (held / 200 < 0.99))


def test_the_calibration_error_is_the_mean_gap_weighted_by_rows() -> None:
    probability = np.array([0.1, 0.1, 0.2, 0.2, 0.9, 0.9])
    target = np.array([0, 0, 1, 0, 1, 1])
    error = evaluate.calibration_error(probability, target.astype(np.float64), bins=3)
    assert error == pytest.approx((2 * 0.1 + 2 * 0.3 + 2 * 0.1) / 6)


def test_equal_probabilities_share_a_calibration_bin() -> None:
    probability = np.repeat([0.1, 0.3], [70, 30])
    mean, _, rows = evaluate.calibration_bins(probability, probability, 10)
    assert mean == pytest.approx([0.1, 0.3])
    assert rows.tolist() == [70, 30]


@given(labelled(), st.integers(1, 20))
def test_calibration_bins_lose_no_row_and_rise(case: Labelled, bins: int) -> None:
    label, probability = case
    mean, rate, rows = evaluate.calibration_bins(probability, label.astype(np.float64), bins)
    assert rows.sum() == len(label) and rows.min() > 0 and len(rows) <= bins
    assert np.sum(mean * rows) == pytest.approx(probability.sum())
    assert np.sum(rate * rows) == pytest.approx(label.sum())
    assert np.all(np.diff(mean) > 0)


def test_calibration_can_be_checked_against_true_propensities() -> None:
    _, truth = drawn(20_000)
    assert evaluate.calibration_error(truth, truth) == 0
    assert evaluate.calibration_error(np.minimum(truth + 0.03, 1), truth) == pytest.approx(0.03, abs=1e-3)


def test_the_calibration_error_by_chance_is_that_of_perfect_probabilities() -> None:
    _, probability = drawn(5000)
    random = np.random.default_rng(1)
    errors = [
        evaluate.calibration_error(probability, (random.random(5000) < probability).astype(np.float64))
        for _ in range(100)
    ]
    assert evaluate.calibration_error_by_chance(probability) == pytest.approx(np.mean(errors), rel=0.05)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -0.3), (2.0, 0.4)])
def test_slope_and_intercept_undo_a_distortion_of_the_log_odds(slope: float, intercept: float) -> None:
    label, probability = drawn(200_000)
    margin = np.log(probability / (1 - probability))
    distorted = 1 / (1 + np.exp(-np.clip((margin - intercept) / slope, -30, 30)))
    metrics = evaluate.evaluate(label, distorted)
    assert metrics.calibration_slope == pytest.approx(slope, rel=0.05)
    assert metrics.calibration_intercept == pytest.approx(intercept, abs=0.1)


@pytest.mark.parametrize(("positives", "rows"), [(0, 10), (1, 8), (30, 100), (50, 50)])
def test_wilson_equals_scipy(positives: int, rows: int) -> None:
    low, high = evaluate.wilson(np.array([positives]), np.array([rows]))
    expected = binomtest(positives, rows).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize("value", [False, True])
def test_one_class_is_refused_with_what_to_do(value: bool) -> None:
    with pytest.raises(OneClass, match="use a longer period"):
        evaluate.evaluate(np.full(20, value), np.full(20, 0.5))
    with pytest.raises(OneClass):
        evaluate.leaks(np.zeros((20, 1), np.float32), ["a"], np.full(20, value))


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.1, np.inf])
def test_what_is_not_a_probability_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="within"):
        evaluate.evaluate(np.array([True, False]), np.array([0.5, wrong]))


def test_the_class_prior_is_the_rate_of_the_training_rows() -> None:
    assert evaluate.class_prior(np.array([1, 0, 0, 0], np.uint8), 3).tolist() == [0.25] * 3


def messy(rows: int, seed: int) -> tuple[Matrix, Bools]:
    """Skewed, missing, infinite, constant and coded columns; the label follows the first and the last."""
    random = np.random.default_rng(seed)
    amount, code = random.lognormal(2, 1.5, rows), random.integers(0, 5, rows)
    label = random.random(rows) < 1 / (1 + np.exp(3.5 - np.log(amount) - 1.5 * np.isin(code, [1, 3])))
    columns = [amount, np.where(random.random(rows) < 0.3, np.nan, amount), np.full(rows, 7.0), np.full(rows, np.nan)]
    matrix = np.stack([*columns, code], axis=1).astype(np.float32)
    matrix[:3, 1] = np.inf, -np.inf, 3e38
    return matrix, label


def test_logistic_regression_copes_with_messy_features() -> None:
    (train, label), (test, truth) = messy(6000, 0), messy(6000, 1)
    test[0] = np.nan
    test[1, 4] = 77
    plain = evaluate.logistic_regression(train, label, test)
    coded = evaluate.logistic_regression(train, label, test, categorical=[4])
    assert plain.dtype == np.float64 and np.all((plain > 0) & (plain < 1))
    assert sklearn.roc_auc_score(truth, coded) > sklearn.roc_auc_score(truth, plain) + 0.02
    assert evaluate.calibration_error(coded, truth.astype(np.float64)) < 0.03
    assert np.array_equal(coded, evaluate.logistic_regression(train, label, test, categorical=[4]))


def shop(rows: int = 6000, seed: int = 0) -> tuple[Matrix, list[str], Bools]:
    """Honest features: one strong intent seen through several of them, and noise."""
    random = np.random.default_rng(seed)
    intent = random.normal(size=rows)
    label = random.random(rows) < 1 / (1 + np.exp(2.5 - 2 * intent))
    views = [random.poisson(np.exp(0.5 + intent)) for _ in range(4)]
    noise = [random.normal(size=rows) for _ in range(6)]
    names = [*(f"views_{number}" for number in range(4)), *(f"noise_{number}" for number in range(6))]
    return np.stack([*views, *noise], axis=1).astype(np.float32), names, label


def leaking(**columns: npt.NDArray[np.floating]) -> list[str]:
    matrix, names, label = shop()
    wider = np.column_stack([matrix, *columns.values()]).astype(np.float32)
    return [leak.feature for leak in evaluate.leaks(wider, [*names, *columns], label)]


def test_strong_features_that_others_replace_are_not_leaks() -> None:
    matrix, names, label = shop()
    alone = max(sklearn.roc_auc_score(label, column) for column in matrix.T)
    assert alone > 0.79
    assert evaluate.leaks(matrix, names, label) == []


def test_a_leak_is_named_whatever_its_shape() -> None:
    label = shop()[2]
    random = np.random.default_rng(3)
    noise = random.normal(size=len(label))
    assert leaking(late=np.where(label, 3.0, 0) + noise) == ["late"]
    assert leaking(far_out=np.where(label, np.sign(noise) * 3, 0) + noise / 2) == ["far_out"]
    assert leaking(filled_after=np.where(label, noise, np.nan)) == ["filled_after"]


def test_copies_of_a_leak_do_not_hide_each_other() -> None:
    label = shop()[2]
    late = np.where(label, 2.0, 0) + np.random.default_rng(4).normal(size=len(label))
    assert sorted(leaking(seconds=60 * late, minutes=late)) == ["minutes", "seconds"]


def test_a_leak_says_how_strong_it_is_and_what_to_do() -> None:
    matrix, names, label = shop()
    wider = np.column_stack([matrix, label * 5.0]).astype(np.float32)
    (leak,) = evaluate.leaks(wider, [*names, "refund"], label)
    assert leak.roc_auc > 0.99 and leak.average_precision > 0.99
    assert leak.message.startswith("'refund' alone reaches a ROC-AUC of 1.000")
    assert "remove 'refund' from the features" in leak.message


def read(path: Path, separator: str, label: str, positive: str) -> tuple[Matrix, list[str], Bools]:
    """A real table; texts become the places of their sorted values."""
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout")
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file, delimiter=separator))
    names = [name for name in rows[0] if name != label]
    matrix = np.empty((len(rows), len(names)), np.float32)
    for place, name in enumerate(names):
        values = [row[name] for row in rows]
        try:
            matrix[:, place] = [float(value) for value in values]
        except ValueError:
            matrix[:, place] = np.unique(values, return_inverse=True)[1]
    return matrix, names, np.array([row[label] == positive for row in rows])


@pytest.mark.parametrize(
    ("path", "separator", "label", "positive", "culprit"),
    [(SHOPPERS, ",", "Revenue", "TRUE", "PageValues"), (BANK, ";", "y", "yes", "duration")],
)
def test_the_known_leak_of_real_data_is_named_and_nothing_else(
    path: Path, separator: str, label: str, positive: str, culprit: str
) -> None:
    matrix, names, truth = read(path, separator, label, positive)
    assert [leak.feature for leak in evaluate.leaks(matrix, names, truth)] == [culprit]
    honest = [place for place, name in enumerate(names) if name != culprit]
    assert evaluate.leaks(matrix[:, honest], [names[place] for place in honest], truth) == []


def test_recency_frequency_and_value_of_a_real_shop_are_no_leaks() -> None:
    if not RETAIL.exists():
        pytest.skip(f"{RETAIL.name} is not beside the checkout")
    query = f"""
        WITH orders AS (
            SELECT CustomerID AS customer, epoch(InvoiceDate) / 86400 AS day, sum(Quantity * UnitPrice) AS spend
            FROM '{RETAIL}' WHERE CustomerID IS NOT NULL AND Quantity > 0 GROUP BY ALL),
        cutoffs AS (SELECT max(day) - 30 - 30 * unnest(range(6)) AS cutoff FROM orders)
        SELECT
            cutoff - max(day) FILTER (day <= cutoff) AS recency,
            count(*) FILTER (day <= cutoff) AS orders,
            count(*) FILTER (day <= cutoff AND day > cutoff - 30) AS orders_30d,
            sum(spend) FILTER (day <= cutoff) AS spend,
            cutoff - min(day) FILTER (day <= cutoff) AS tenure,
            count(*) FILTER (day > cutoff AND day <= cutoff + 30) > 0 AS again
        FROM orders, cutoffs GROUP BY customer, cutoff HAVING recency IS NOT NULL ORDER BY customer, cutoff"""
    columns = duckdb.execute(query).fetchnumpy()
    label = np.asarray(columns.pop("again"), np.bool_)
    matrix = np.stack([np.asarray(column, np.float32) for column in columns.values()], axis=1)
    assert len(label) > 10_000
    assert evaluate.leaks(matrix, list(columns), label) == []
