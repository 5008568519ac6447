"""How far what is scored has moved away from the training population, and how far chance alone would have moved it.

docs/drift.md derives the formulas; deploy/prometheus/rules/recording.yml computes the same ones in PromQL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.core.bundle import Bins, Reference
from service.core.spec import Clock, FeatureSpec

SCORE: Final = "(score)"
UNSEEN: Final = 1e-4
"""Added to every reference share, so that a bin that nobody was in has one to compare with."""
MIXED: Final = 0.2
"""Part of the reference in what is compared with it, so that a bin that nobody is in now has a logarithm."""
FALSE_ALARMS: Final = 0.01
"""Chance that any feature of a model, or its score, exceeds its critical value when nothing has changed."""


class Window(NamedTuple):
    """What is put up with: a PSI that does not matter, and the least scores of a visitor that tell as much as one."""

    floor: float
    per_visitor: float


WINDOWS: Final[Mapping[str, Window]] = {"1h": Window(0.05, 5), "24h": Window(0.02, 15)}
MISSING_RISE: Final = 0.05
MISSING_DEVIATIONS: Final = 3.5
"""Floors, least scores of a visitor, rise and deviations are those of deploy/prometheus/rules/thresholds.yml."""

Shares = npt.NDArray[np.float64]


def smoothed(shares: npt.ArrayLike) -> Shares:
    """Reference shares float64[B] that are all above 0 and add up to 1, of shares float[B] in 0 ... 1."""
    raised = np.asarray(shares, np.float64) + UNSEEN
    adding_up: Shares = raised / raised.sum()
    return adding_up


def psi(counts: npt.ArrayLike, shares: npt.ArrayLike) -> float:
    """Population stability index of counts[B] against reference shares float[B]; at least 0 and finite, NaN of nobody.

    Sum over the bins of (p - q) ln(p / q), Kullback and Leibler's J (1951), known as PSI from Siddiqi, Credit Risk
    Scorecards (2006). Here q is the smoothed reference and p = 0.8 counts / n + 0.2 q, as in a skew divergence (Lee
    1999); the sum is divided by 0.8 squared, which makes it the textbook's for small shifts. Nothing but ratios of
    counts matters, so what `increase` extrapolates in Prometheus has no part in it.
    """
    seen = np.asarray(counts, np.float64)
    if not seen.sum() > 0:
        return math.nan
    reference = smoothed(shares)
    mixed = (1 - MIXED) * seen / seen.sum() + MIXED * reference
    return float(np.sum((mixed - reference) * np.log(mixed / reference))) / (1 - MIXED) ** 2


def counts_of(values: npt.NDArray[np.float32], bins: Bins) -> npt.NDArray[np.int64]:
    """int64[B]: how many of float32[n] fall into each bin of a reference; NaN into the first."""
    known = values[~np.isnan(values)].astype(np.float64)
    counts = np.bincount(np.searchsorted(bins.edges, known, "right"), minlength=len(bins.edges) + 1)
    return np.concatenate(([len(values) - len(known)], counts))


def described(spec: FeatureSpec, reference: Reference) -> dict[str, Bins]:
    """The bins of every feature in the order of the columns, and those of the score under "(score)"."""
    return {**{name: reference.features[name] for name in spec.names}, SCORE: reference.score}


def critical_values(spec: FeatureSpec, reference: Reference) -> dict[str, float]:
    """Critical value of every feature, and of the score under "(score)".

    Parts of the clock have none (infinity): an hour of traffic has one hour, and never looks like the training rows.
    """
    bins = described(spec, reference)
    return {
        name: math.inf if isinstance(spec.features.get(name), Clock) else critical_value(len(own.shares), len(bins))
        for name, own in bins.items()
    }


def critical_value(bins: int, tests: int) -> float:
    """What n times PSI of n values in `bins` bins stays below by chance, but for 0.01 / `tests` (Bonferroni).

    n times PSI of independent values from the reference is about chi-square distributed with bins - 1 degrees of
    freedom. With one bin there is nothing to compare, and the answer is 0.
    """
    return chi_square_quantile(FALSE_ALARMS / tests, bins - 1) if bins > 1 else 0.0


def chance_level(critical: float, population: float, reference_rows: float, per_visitor: float = 1.0) -> float:
    """PSI that chance alone stays below: critical (k / n + 1 / m), of n scores and m reference rows (0: not known).

    k scores of the same visitor tell as much as one: the design effect of Kish (1965), mean of squares over mean of the
    scores a visitor has in the window. The rows of the reference are independent: m is divided by their own.
    """
    return critical * (per_visitor / population + (1 / reference_rows if reference_rows > 0 else 0))


def missing_threshold(share: float, population: float, reference_rows: float, per_visitor: float = 1.0) -> float:
    """Share of missing values that chance and a reference share 0 ... 1 explain, and what does not matter on top.

    3.5 standard deviations of the difference of two binomial shares, of n scores and m rows; 1 / n is added to the
    reference's, since near 0 chance is lopsided.
    """
    variance = (share + 1 / population) * (1 - share)
    apart = variance * (per_visitor / population + (1 / reference_rows if reference_rows > 0 else 0))
    return share + MISSING_DEVIATIONS * math.sqrt(apart) + MISSING_RISE


def chi_square_quantile(above: float, freedom: int) -> float:
    """The x that a chi-square variable of `freedom` >= 1 degrees exceeds with chance `above`, 0 < above < 1.

    By bisection on `chi_square_above`; to 1e-9 relative, for chances from 1e-12.
    """
    low, high = 0.0, 1.0
    while chi_square_above(high, freedom) > above:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chi_square_above(middle, freedom) > above else (low, middle)
    return high


def chi_square_above(x: float, freedom: int) -> float:
    """Chance that a chi-square variable of `freedom` >= 1 degrees is above x >= 0.

    The finite sums for whole degrees of freedom: Abramowitz and Stegun (1964), 26.4.4 and 26.4.5.
    """
    half, odd = x / 2, freedom % 2
    first = math.erfc(math.sqrt(half)) if odd else 0.0
    if half == 0:
        return 1.0
    powers = (index + odd / 2 for index in range(freedom // 2))
    return first + sum(math.exp(power * math.log(half) - half - math.lgamma(power + 1)) for power in powers)
