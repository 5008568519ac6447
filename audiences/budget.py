"""What an audience is worth: how many conversions to expect of it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Z95: Final = 1.959963984540054  # the 0.975 quantile of the normal distribution


class Expectation(NamedTuple):
    """Conversions to expect of n people, and an interval that holds what comes in 95 of 100 cases."""

    people: int
    conversions: float
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Conversions a person; NaN of nobody."""
        return self.conversions / self.people if self.people else math.nan


def expected(propensity: npt.NDArray[np.floating], level_error: float = 0.0) -> Expectation:
    """Conversions of people with calibrated probabilities float[n] in [0, 1], within the horizon of the model's label.

    The mean is the sum of p. The variance has two parts. Chance: if people decide independently, the number is
    Poisson-binomial, with variance sum p (1 - p). Calibration: if the logits of all p are off by one unknown amount
    with standard error `level_error`, the sum is off by that times its derivative, which is sum p (1 - p) again; so the
    variance grows by (level_error sum p (1 - p))^2 (the delta method). The interval is normal, cut off at 0 and n; with
    fewer than some ten conversions it is too symmetric.
    """
    p = np.asarray(propensity, np.float64)
    mean, chance = float(p.sum()), float((p * (1 - p)).sum())
    half = Z95 * math.sqrt(chance + (level_error * chance) ** 2)
    return Expectation(len(p), mean, max(0.0, mean - half), min(float(len(p)), mean + half))


def level_error(metrics: Mapping[str, Any]) -> float:
    """Standard error of the level of a model's probabilities, on the scale of logits, by its manifest's `metrics`.

    The level is as sure as the rate of positives that it was judged on. Training writes an interval of 95 % for that
    rate, with rows of one visitor taken together: it is the average precision of the baseline that gives everybody the
    same score. 0 where a manifest has none.
    """
    low, high = metrics.get("class prior", {}).get("average_precision_interval", (0.0, 0.0))
    if not 0 < low < high < 1:
        return 0.0
    return (_logit(high) - _logit(low)) / (2 * Z95)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
