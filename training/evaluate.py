"""How good scores are: metrics of probabilities against labels, two baselines on the same rows, and the leakage check.

Pure: arrays in, numbers out; every random choice is seeded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import lightgbm
import numpy as np
import numpy.typing as npt
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from service.core.errors import PropensityError

Bools = npt.NDArray[np.bool_]
Labels = Bools | npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]

BINS: Final = 15
DECILES: Final = 10
BASELINE_ROWS: Final = 100_000
LEAK_ROWS: Final = 50_000
LEAK_BINS: Final = 32
# Measured on real data, see `leaks`.
LEAK_ROC_AUC: Final = 0.79
LEAK_SHARE_LOST: Final = 0.20
LEAK_CERTAIN_ROC_AUC: Final = 0.95
_COPY_CORRELATION: Final = 0.95
_MAX_SUSPECTS: Final = 10
_Z: Final = 1.959964  # 95 % of a normal distribution, both sides
_SEED: Final = 20_240_501


class OneClass(PropensityError):
    """Labels that are all positive or all negative, so that nothing can be ranked."""


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` measured; every field is JSON-able (`dataclasses.asdict`). Intervals hold 95 %."""

    rows: int
    positives: int
    base_rate: float  # share of positives
    roc_auc: float  # 0.5 is chance, 1 is perfect
    roc_auc_interval: tuple[float, float]
    average_precision: float  # base_rate is chance, 1 is perfect
    average_precision_interval: tuple[float, float]
    log_loss: float  # nats a row
    brier: float  # mean squared error
    calibration_error: float  # expected calibration error, see `calibration_error`
    calibration_slope: float | None  # 1 is perfect, below 1 is overconfident; None for constant scores
    calibration_intercept: float | None  # 0 is perfect
    lift: tuple[float, ...]  # by decile, best first: rate of positives in it / base_rate
    gains: tuple[float, ...]  # share of all positives in the best 10 %, 20 %, ... 100 % of rows


@dataclass(frozen=True)
class Leak:
    """A feature that alone almost gives the label away. `roc_auc` and `average_precision` are of this feature alone."""

    feature: str
    roc_auc: float
    average_precision: float
    message: str


@dataclass(frozen=True)
class Curve:
    """Rows and positives above each distinct score, best first: one point for each, tied rows together."""

    rows: Ints  # [k] cumulative, the last is n
    positives: Ints  # [k] cumulative


def evaluate(label: Labels, probability: Floats, visitor: Ints | None = None) -> Metrics:
    """Metrics of probabilities on one set of rows.

    label: bool or uint8[n], 1 for positive; probability: float64[n] in [0, 1]; visitor: int64[n], whose row it is.
    ROC-AUC counts a tie as half (Mann-Whitney). Average precision is the step sum of (recall_k - recall_{k-1}) *
    precision_k over distinct scores, without interpolation. Log loss takes probabilities no nearer than 1e-15 to 0
    and 1. Slope and intercept are Cox's (1958): the logistic regression of the label on the logit of the probability.
    Intervals are normal on the logit scale, with the variance of the infinitesimal jackknife (Efron 1982; for ROC-AUC
    this is DeLong, DeLong and Clarke-Pearson's 1988), summed by visitor where `visitor` is given, since rows of one
    visitor are not independent (Obuchowski 1997). They are narrow below some 30 positives.
    Raises OneClass where all labels are the same, ValueError for other shapes or probabilities outside [0, 1].
    """
    positive = _checked(label, probability)
    order = np.argsort(-probability, kind="stable")
    starts = _group_starts(probability[order])
    roc_auc, average_precision = _ranking(positive[order], starts)
    cluster = np.arange(len(order)) if visitor is None else np.unique(visitor[order], return_inverse=True)[1]
    auc_influence, precision_influence = _influence(positive[order], starts)
    slope, intercept = _cox(positive, probability)
    clipped = np.clip(probability, 1e-15, 1 - 1e-15)
    captured = gains(curve(label, probability), np.arange(DECILES + 1) / DECILES)
    return Metrics(
        rows=len(positive),
        positives=int(positive.sum()),
        base_rate=float(positive.mean()),
        roc_auc=roc_auc,
        roc_auc_interval=_interval(roc_auc, auc_influence, cluster),
        average_precision=average_precision,
        average_precision_interval=_interval(average_precision, precision_influence, cluster),
        log_loss=float(-np.mean(np.where(positive, np.log(clipped), np.log1p(-clipped)))),
        brier=float(np.mean((probability - positive) ** 2)),
        calibration_error=calibration_error(probability, positive.astype(np.float64)),
        calibration_slope=slope,
        calibration_intercept=intercept,
        lift=tuple(float(share) for share in np.diff(captured) * DECILES),
        gains=tuple(float(share) for share in captured[1:]),
    )


def curve(label: Labels, probability: Floats) -> Curve:
    """Cumulative rows and positives by distinct score, best first; ROC, precision-recall and gains all follow from it.

    label: bool or uint8[n]; probability: float64[n].
    """
    order = np.argsort(-probability, kind="stable")
    ends = np.append(_group_starts(probability[order])[1:], len(order))
    return Curve(ends, np.cumsum(label[order].astype(np.int64))[ends - 1])


def gains(points: Curve, depths: Floats) -> Floats:
    """Share of all positives, float64[d] in [0, 1], within the best `depths` (float64[d] in [0, 1]) of the rows.

    Where a depth cuts through tied rows, it takes its part of their positives: what a random order gives on average.
    """
    rows, positives = np.append(0, points.rows), np.append(0, points.positives)
    shares: Floats = np.interp(depths * rows[-1], rows, positives) / positives[-1]
    return shares


def calibration_bins(probability: Floats, target: Floats, bins: int = BINS) -> tuple[Floats, Floats, Ints]:
    """Mean probability, mean target and rows of bins of about equal mass, lowest first; empty bins are left out.

    probability, target: float64[n] in [0, 1]. A row's bin is floor(bins * r / n), r its rank from 0 with ties at their
    middle: equal probabilities always share a bin, so a constant score has one bin.
    """
    _, inverse, counts = np.unique(probability, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    place = np.floor(bins * middle / len(probability)).astype(np.int64)[inverse]
    rows = np.bincount(place, minlength=bins)
    kept = rows > 0
    mean_probability = np.bincount(place, probability, bins)[kept] / rows[kept]
    mean_target = np.bincount(place, target, bins)[kept] / rows[kept]
    return mean_probability, mean_target, rows[kept]


def calibration_error(probability: Floats, target: Floats, bins: int = BINS) -> float:
    """Expected calibration error, in [0, 1]: sum over bins of (rows / n) * |mean probability - mean target|.

    probability: float64[n] in [0, 1]; target: float64[n], labels 0 and 1 or true propensities in [0, 1].
    Naeini, Cooper and Hauskrecht (2015), with bins of equal mass (Nguyen and O'Connor 2015) as in `calibration_bins`.
    Against labels it is never quite 0: see `calibration_error_by_chance`.
    """
    mean_probability, mean_target, rows = calibration_bins(probability, target, bins)
    return float(np.sum(rows * np.abs(mean_probability - mean_target)) / rows.sum())


def calibration_error_by_chance(probability: Floats, bins: int = BINS) -> float:
    """About what `calibration_error` would be, on average, if every probability were exactly right and labels drawn.

    probability: float64[n] in [0, 1]. Sum over bins of (rows / n) * sqrt(2 / pi) * the standard error of its rate.
    """
    mean, _, rows = calibration_bins(probability, probability, bins)
    return float(np.sum(np.sqrt(2 / np.pi * rows * mean * (1 - mean))) / rows.sum())


def wilson(positives: npt.NDArray[np.number], rows: npt.NDArray[np.number]) -> tuple[Floats, Floats]:
    """95 % interval (low, high) of rates positives / rows, elementwise, within [0, 1] (Wilson 1927); rows > 0."""
    rate = positives / rows
    centre = (rate + _Z**2 / (2 * rows)) / (1 + _Z**2 / rows)
    half = _Z * np.sqrt(rate * (1 - rate) / rows + _Z**2 / (4 * rows**2)) / (1 + _Z**2 / rows)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def class_prior(label: Labels, rows: int) -> Floats:
    """The baseline that knows nothing: float64[rows], all the share of positives in label[n] of the training rows."""
    return np.full(rows, label.mean(), np.float64)


def logistic_regression(matrix: Matrix, label: Labels, test: Matrix, categorical: Sequence[int] = ()) -> Floats:
    """The baseline of a careful hour: probabilities float64[m] of test rows, learned from training rows.

    matrix: float32[n, F]; label: bool or uint8[n]; test: float32[m, F]; categorical: columns that hold codes.
    Codes become one column each; numbers: median where missing plus an indicator of it, sign(x) * log(1 + |x|),
    standardised; ridge penalty 1. Learns from at most 100,000 rows, drawn with a fixed seed.
    Raises OneClass where all labels are the same.
    """
    _both_classes(label)
    rows = _sample(len(label), BASELINE_ROWS)
    codes = sorted(set(categorical))
    numbers = [column for column in range(matrix.shape[1]) if column not in set(codes)]
    columns = ColumnTransformer([("codes", _one_hot(), codes), ("numbers", _numeric(), numbers)])
    model = make_pipeline(FunctionTransformer(_finite), columns, LogisticRegression(max_iter=200))
    # One thread: where several programs share the cores, threads that wait for each other took five times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        # After 200 steps the fit has stopped moving in any digit that is shown.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(matrix[rows], label[rows])
    probabilities: Floats = model.predict_proba(test)[:, 1].astype(np.float64)
    return probabilities


def leaks(matrix: Matrix, names: Sequence[str], label: Labels) -> list[Leak]:
    """Features that alone almost give the label away, strongest first; empty where there is none.

    matrix: float32[n, F], training rows; names: F; label: bool or uint8[n]. Uses at most 50,000 rows (seeded).

    A feature alone is scored by the share of positives in its bin (up to 32 of equal mass and one for missing values),
    learned on one random half of the rows and measured on the other, both ways round: order and shape do not matter.
    It is named when its ROC-AUC is at least 0.95; or when it is at least 0.79 and at least 20 % of what a model of
    all features gains over chance (ROC-AUC - 0.5) goes when this feature and its copies are taken away (LightGBM, one
    half to learn, the other to measure; a copy's own score correlates by 0.95 or more).

    Strength alone does not tell a leak from a good feature; being irreplaceable as well does. Measured on real data
    (ROC-AUC alone, share lost):
        leaks              Online Shoppers PageValues 0.861, 37 %; Bank Marketing duration 0.816, 32 %;
                           Complete Journey redemptions during the campaign itself 0.983, 50 %
        strongest others   Bank Marketing euribor3m 0.772, 1 %; CDNOW decayed orders 0.771, 0 %, recency 0.757, 0 %;
                           Online Retail spend 0.706, 1 %; Online Shoppers ExitRates 0.694, 0 %
        least replaceable  Complete Journey earlier redemptions 0.661, 16 %; Hillstrom mail sent 0.567, 15 %
    A model of very few features loses much with any of them: there the ROC-AUC alone decides.
    Raises OneClass where all labels are the same.
    """
    _both_classes(label)
    rows = _sample(len(label), LEAK_ROWS)
    values, positive = matrix[rows], label[rows].astype(np.bool_)
    half = np.random.default_rng(_SEED).permutation(len(rows)) % 2 == 1
    if not positive[half].any() or not positive[~half].any():
        return []
    alone = np.stack([_alone(column, positive, half) for column in values.T], axis=1)
    strength = np.array([_halves(positive, score, half) for score in alone.T])
    suspects = [int(column) for column in np.argsort(-strength[:, 0], kind="stable")]
    suspects = [column for column in suspects if strength[column, 0] >= LEAK_ROC_AUC][:_MAX_SUSPECTS]
    if not suspects:
        return []
    whole = _model_roc_auc(values, positive, half)
    found = []
    for column in suspects:
        rest = _model_roc_auc(values[:, ~_copies(alone, column)], positive, half)
        roc_auc, average_precision = (float(value) for value in strength[column])
        if roc_auc >= LEAK_CERTAIN_ROC_AUC or whole - rest >= LEAK_SHARE_LOST * (whole - 0.5):
            message = _leak_message(names[column], roc_auc, whole, rest)
            found.append(Leak(names[column], roc_auc, average_precision, message))
    return found


def _leak_message(name: str, roc_auc: float, whole: float, rest: float) -> str:
    return (
        f"{name!r} alone reaches a ROC-AUC of {roc_auc:.3f}; all features together reach {whole:.3f}, without it "
        f"{rest:.3f}. Check that its value is known when a visitor is scored and not written by the outcome itself; "
        f"if it is, remove {name!r} from the features and train again"
    )


def _checked(label: Labels, probability: Floats) -> Bools:
    if label.shape != probability.shape or label.ndim != 1:
        raise ValueError(f"label {label.shape} and probability {probability.shape} must be vectors of equal length")
    if not np.all((probability >= 0) & (probability <= 1)):
        raise ValueError("probabilities must be finite and within [0, 1]")
    _both_classes(label)
    return label.astype(np.bool_)


def _both_classes(label: Labels) -> None:
    positives = int(np.count_nonzero(label))
    if positives in (0, len(label)):
        raise OneClass(
            f"{positives} of {len(label)} rows are positive, both kinds are needed to measure anything; "
            "use a longer period, a longer horizon or another label"
        )


def _sample(rows: int, most: int) -> Ints:
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(_SEED).choice(rows, most, replace=False))


def _group_starts(ordered: Floats) -> Ints:
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _ranking(positive: Bools, starts: Ints) -> tuple[float, float]:
    """ROC-AUC and average precision of rows in descending order of score; `starts` of tied groups."""
    hits, above, total = _tallies(positive, starts)
    positives, negatives = above[-1], total[-1] - above[-1]
    misses = np.diff(total - above, prepend=0)
    roc_auc = np.sum(misses * (above - hits / 2)) / (positives * negatives)
    return float(roc_auc), float(np.sum(hits * above / total) / positives)


def _tallies(positive: Bools, starts: Ints) -> tuple[Floats, Floats, Floats]:
    """By tied group, best first: positives in it, positives and rows down to it."""
    hits = np.add.reduceat(positive.astype(np.float64), starts)
    return hits, np.cumsum(hits), np.append(starts[1:], len(positive)).astype(np.float64)


def _influence(positive: Bools, starts: Ints) -> tuple[Floats, Floats]:
    """What one more of each row would add to ROC-AUC and to average precision, float64[n] each."""
    roc_auc, average_precision = _ranking(positive, starts)
    hits, above, total = _tallies(positive, starts)
    positives, negatives = above[-1], total[-1] - above[-1]
    misses = np.diff(total - above, prepend=0)
    outranked = (negatives - (total - above) + misses / 2) / negatives
    outranking = (above - hits / 2) / positives
    precision = above / total
    # A row changes the precision at its own score and at every lower one.
    gained = np.cumsum((hits / total)[::-1])[::-1]
    diluted = np.cumsum((hits * precision / total)[::-1])[::-1]
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(positive))))
    by_positive = (outranked - roc_auc) / positives, (precision - average_precision + gained - diluted) / positives
    by_negative = (outranking - roc_auc) / negatives, -diluted / positives
    first, second = (
        np.where(positive, up[group], down[group]) for up, down in zip(by_positive, by_negative, strict=True)
    )
    return first, second


def _interval(value: float, influence: Floats, cluster: Ints) -> tuple[float, float]:
    if not 0 < value < 1:
        return value, value
    error = np.sqrt(np.sum(np.bincount(cluster, influence) ** 2)) / (value * (1 - value))
    middle = np.log(value / (1 - value))
    low, high = 1 / (1 + np.exp(-(middle + _Z * error * np.array([-1.0, 1.0]))))
    return float(low), float(high)


def _cox(positive: Bools, probability: Floats) -> tuple[float | None, float | None]:
    """Slope and intercept by damped Newton steps; None where scores hardly differ or separate the classes."""
    clipped = np.clip(probability, 1e-15, 1 - 1e-15)
    margin = np.log(clipped) - np.log1p(-clipped)
    centre, spread = float(margin.mean()), float(margin.std())
    if spread < 1e-3:
        return None, None
    design = np.stack([(margin - centre) / spread, np.ones(len(margin))], axis=1)
    rate = positive.mean()
    weights = np.array([0.0, np.log(rate / (1 - rate))])
    loss = _log_loss(positive, design @ weights)
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-np.clip(design @ weights, -40, 40)))
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design
        if np.linalg.cond(curvature) > 1e10:
            return None, None
        step = np.linalg.solve(curvature, design.T @ (positive - fitted))
        if np.max(np.abs(step)) < 1e-8:
            slope = float(weights[0] / spread)
            return slope, float(weights[1] - slope * centre)
        while (tried := _log_loss(positive, design @ (weights + step))) > loss:
            step /= 2
        weights, loss = weights + step, tried
    return None, None


def _log_loss(positive: Bools, margin: Floats) -> float:
    return float(np.mean(np.logaddexp(0, np.where(positive, -margin, margin))))


def _one_hot() -> OneHotEncoder:
    return OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=20, max_categories=50, sparse_output=False)


def _numeric() -> object:
    return make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        FunctionTransformer(_signed_log),
        StandardScaler(),
    )


def _finite(matrix: Matrix) -> Floats:
    return np.where(np.isinf(matrix), np.copysign(1e30, matrix), matrix).astype(np.float64)


def _signed_log(matrix: Floats) -> Floats:
    return np.sign(matrix) * np.log1p(np.abs(matrix))


def _alone(column: Matrix, positive: Bools, half: Bools) -> Floats:
    """Share of positives in the bin of each value, learned on the other half; two rows at the prior temper it."""
    scores = np.empty(len(column), np.float64)
    for learn in (half, ~half):
        present = np.sort(column[learn & ~np.isnan(column)])
        cuts = np.unique(present[len(present) * np.arange(1, LEAK_BINS) // LEAK_BINS]) if len(present) else present
        place = np.where(np.isnan(column), len(cuts) + 1, np.searchsorted(cuts, column, "right"))
        rows = np.bincount(place[learn], minlength=len(cuts) + 2)
        hits = np.bincount(place[learn], positive[learn], len(cuts) + 2)
        scores[~learn] = ((hits + 2 * positive[learn].mean()) / (rows + 2))[place[~learn]]
    return scores


def _halves(positive: Bools, score: Floats, half: Bools) -> tuple[float, float]:
    """ROC-AUC and average precision, the mean over both halves: scores learned on different rows are not comparable."""
    parts = [_rank(positive[side], score[side]) for side in (half, ~half)]
    return (parts[0][0] + parts[1][0]) / 2, (parts[0][1] + parts[1][1]) / 2


def _rank(positive: Bools, score: Floats) -> tuple[float, float]:
    order = np.argsort(-score, kind="stable")
    return _ranking(positive[order], _group_starts(score[order]))


def _copies(alone: Floats, column: int) -> Bools:
    """Columns, bool[F], that say the same as `column`, itself among them."""
    centred = alone - alone.mean(axis=0)
    norms = np.sqrt(np.sum(centred**2, axis=0))
    correlation = centred.T @ centred[:, column] / np.maximum(norms * norms[column], 1e-300)
    copies: Bools = correlation >= _COPY_CORRELATION
    copies[column] = True
    return copies


def _model_roc_auc(matrix: Matrix, positive: Bools, half: Bools) -> float:
    if matrix.shape[1] == 0:
        return 0.5
    settings = {"objective": "binary", "learning_rate": 0.1, "seed": _SEED, "verbose": -1}
    settings |= {"deterministic": True, "force_col_wise": True, "num_threads": 1}
    data = lightgbm.Dataset(matrix[half], positive[half].astype(np.float32))
    booster = lightgbm.train(settings, data, num_boost_round=50)
    return _rank(positive[~half], np.asarray(booster.predict(matrix[~half], raw_score=True), np.float64))[0]
