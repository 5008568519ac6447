"""Fitting: LightGBM with early stopping, and a calibration that is part of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

from training.dataset import Dataset, Split
from training.export import Calibration

DEFAULTS: Final[Mapping[str, Any]] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 40,
    "lambda_l2": 1.0,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "zero_as_missing": False,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
MAX_ROUNDS: Final = 1000
PATIENCE: Final = 50


@dataclass(frozen=True)
class Fitted:
    """A booster, its calibration, and the log loss of each round on the fitting and the stopping rows."""

    booster: lgb.Booster
    calibration: Calibration
    learning_curve: Mapping[str, Sequence[float]]

    def predict(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities float64[n] by LightGBM itself, the reference of the exported model."""
        margin = np.asarray(self.booster.predict(matrix, raw_score=True), np.float64)
        return np.asarray(expit(self.calibration.slope * margin + self.calibration.intercept))


def fit(
    dataset: Dataset,
    split: Split,
    names: Sequence[str],
    *,
    seed: int = 0,
    threads: int = 1,
    parameters: Mapping[str, Any] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit on split.train, stop on split.stop, calibrate on split.calibrate. Classes are not re-weighted."""
    settings = {**DEFAULTS, "seed": seed, "num_threads": threads, **(parameters or {})}
    train = lgb.Dataset(
        dataset.matrix[split.train], dataset.label[split.train], feature_name=list(names), params=settings
    )
    stop = lgb.Dataset(dataset.matrix[split.stop], dataset.label[split.stop], reference=train)
    curve: dict[str, dict[str, list[float]]] = {}
    callbacks: list[Any] = [
        lgb.early_stopping(PATIENCE, first_metric_only=True, verbose=False),
        lgb.record_evaluation(curve),
    ]
    if on_round is not None:
        callbacks.append(lambda environment: on_round(environment.iteration + 1, MAX_ROUNDS))
    booster = lgb.train(
        {**settings, "metric": "binary_logloss"},
        train,
        num_boost_round=MAX_ROUNDS,
        valid_sets=[train, stop],
        valid_names=["train", "stop"],
        callbacks=callbacks,
    )
    margin = np.asarray(booster.predict(dataset.matrix[split.calibrate], raw_score=True), np.float64)
    learning = {name: values["binary_logloss"] for name, values in curve.items()}
    return Fitted(booster, calibrate(margin, dataset.label[split.calibrate]), learning)


def calibrate(margin: npt.NDArray[np.float64], label: npt.NDArray[np.bool_]) -> Calibration:
    """Platt scaling of least log loss, with a slope above 0, which keeps the ranking.

    margin: float64[n], raw scores; label: bool[n]; both of rows that the trees never saw. Targets are smoothed as
    Platt (1999, section 2.2) proposes.
    """
    positives, negatives = float(label.sum()), float((~label).sum())
    target = np.where(label, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        slope = np.exp(parameters[0])
        score = slope * margin + parameters[1]
        error = expit(score) - target
        value = float(np.mean(np.logaddexp(0, score) - target * score))
        return value, np.array([np.mean(error * margin) * slope, np.mean(error)])

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return Calibration(float(np.exp(found.x[0])), float(found.x[1]))
