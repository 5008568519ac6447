"""Fitting: trees that stop when they should, and probabilities that mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from training import dataset, fit
from training.dataset import Dataset, Split
from training.fit import Fitted

NAMES = ("signal", "noise", "rarely known")


def rows(count: int = 4000, seed: int = 0, base: float = -2.0) -> Dataset:
    """Labels drawn from a known function of the first feature."""
    chance = np.random.default_rng(seed)
    matrix = chance.normal(size=(count, 3)).astype(np.float32)
    matrix[chance.random(count) < 0.7, 2] = np.nan
    label = chance.random(count) < expit(base + 1.5 * matrix[:, 0])
    return Dataset(matrix, label, np.arange(count, dtype=np.uint64), np.zeros(count, np.int64))


def fitted(made: Dataset, split: Split | None = None, **given: Any) -> Fitted:
    return fit.fit(made, split or dataset.split(made, None), NAMES, **given)


def test_the_model_finds_the_signal_and_its_probabilities_are_right() -> None:
    made = rows(20_000)
    split = dataset.split(made, None)
    model = fitted(made, split)
    truth = expit(-2 + 1.5 * made.matrix[split.test, 0].astype(np.float64))
    found = model.predict(made.matrix[split.test])
    assert np.corrcoef(found, truth)[0, 1] > 0.97
    assert found.mean() == pytest.approx(truth.mean(), rel=0.1)
    assert model.booster.feature_importance("gain").argmax() == 0


def test_classes_are_not_weighted_so_a_rare_class_keeps_its_rate() -> None:
    made = rows(20_000, base=-5)
    split = dataset.split(made, None)
    assert 0.005 < made.label.mean() < 0.03
    assert fitted(made, split).predict(made.matrix).mean() == pytest.approx(made.label.mean(), rel=0.25)


def test_a_probability_is_the_calibrated_margin_of_the_booster() -> None:
    made = rows()
    model = fitted(made)
    margin = np.asarray(model.booster.predict(made.matrix, raw_score=True))
    wanted = expit(model.calibration.slope * margin + model.calibration.intercept)
    np.testing.assert_array_equal(model.predict(made.matrix), wanted)


def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    made = rows()
    first, again, other = (fitted(made, seed=seed) for seed in (3, 3, 4))
    assert first.booster.model_to_string() == again.booster.model_to_string()
    assert first.calibration == again.calibration
    assert first.booster.model_to_string() != other.booster.model_to_string()


def test_trees_calibration_and_judgement_see_each_their_own_rows() -> None:
    made = rows()
    split = dataset.split(made, None)
    model = fitted(made, split)

    def changed(part: npt.NDArray[np.int64]) -> Fitted:
        label = made.label.copy()
        label[part] = ~label[part]
        return fitted(Dataset(made.matrix, label, made.visitor, made.cutoff_ms), split)

    unseen = changed(split.test)
    assert unseen.booster.model_to_string() == model.booster.model_to_string()
    assert unseen.calibration == model.calibration
    recalibrated = changed(split.calibrate)
    assert recalibrated.booster.model_to_string() == model.booster.model_to_string()
    assert recalibrated.calibration != model.calibration
    assert changed(split.stop).booster.best_iteration < model.booster.best_iteration


def test_fitting_stops_when_the_stopping_rows_get_no_better() -> None:
    made = rows()
    model = fitted(made)
    rounds = len(model.learning_curve["stop"])
    assert len(model.learning_curve["train"]) == rounds < fit.MAX_ROUNDS
    assert rounds == model.booster.best_iteration + fit.PATIENCE
    assert int(np.argmin(model.learning_curve["stop"])) == model.booster.best_iteration - 1


def test_progress_is_told_every_round() -> None:
    told: list[tuple[int, int]] = []
    model = fitted(rows(), on_round=lambda done, most: told.append((done, most)))
    rounds = len(model.learning_curve["stop"])
    assert told == [(number, fit.MAX_ROUNDS) for number in range(1, rounds + 1)]


def test_parameters_of_the_spec_go_before_the_defaults() -> None:
    model = fitted(rows(), parameters={"num_leaves": 2, "learning_rate": 0.3})
    trees = model.booster.dump_model()["tree_info"]
    assert max(tree["num_leaves"] for tree in trees) == 2
    assert "[learning_rate: 0.3]" in model.booster.model_to_string()


def test_features_that_say_nothing_give_everyone_the_base_rate() -> None:
    made = rows()
    silent = Dataset(np.full_like(made.matrix, np.nan), made.label, made.visitor, made.cutoff_ms)
    found = fitted(silent).predict(silent.matrix)
    assert np.ptp(found) == 0
    assert found[0] == pytest.approx(made.label.mean(), abs=0.03)


# --- calibration ---


def drawn(slope: float, intercept: float, count: int = 50_000) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Margins, and labels that are true with the probability of the recalibrated margin."""
    chance = np.random.default_rng(1)
    margin = chance.normal(-1, 2, count)
    return margin, chance.random(count) < expit(slope * margin + intercept)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.4, -1.5), (2.5, 0.7), (0.05, -3)])
def test_calibration_finds_what_the_margins_mean(slope: float, intercept: float) -> None:
    margin, label = drawn(slope, intercept)
    found = fit.calibrate(margin, label)
    assert found.slope == pytest.approx(slope, abs=0.05)
    assert found.intercept == pytest.approx(intercept, abs=0.07)


def test_calibration_is_logistic_regression_but_for_the_smoothed_targets() -> None:
    margin, label = drawn(0.7, -0.5)
    found = fit.calibrate(margin, label)
    other = LogisticRegression(C=np.inf, tol=1e-10).fit(margin[:, None], label)
    assert found.slope == pytest.approx(float(other.coef_[0, 0]), rel=1e-3)
    assert found.intercept == pytest.approx(float(other.intercept_[0]), rel=1e-3)


def test_calibration_keeps_the_ranking_even_where_the_margins_mislead() -> None:
    margin, label = drawn(-1, 0)
    found = fit.calibrate(margin, label)
    assert 0 < found.slope < 0.05
    probability = expit(found.slope * margin + found.intercept)
    assert np.all(np.diff(probability[np.argsort(margin)]) >= 0)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_perfect_separation_is_not_believed_without_limit(count: int) -> None:
    margin = np.linspace(-3, 3, count)
    found = fit.calibrate(margin, margin > 0)
    assert np.isfinite([found.slope, found.intercept]).all()
    probability = expit(found.slope * margin + found.intercept)
    smoothed = 1 / (count / 2 + 2)
    assert probability[0] == pytest.approx(smoothed, abs=0.5 * smoothed + 0.01)


@pytest.mark.parametrize("level", [0.0, -7.5, 40.0])
def test_margins_that_are_all_the_same_give_the_base_rate(level: float) -> None:
    label = np.arange(1000) < 150
    found = fit.calibrate(np.full(1000, level), label)
    assert expit(found.slope * level + found.intercept) == pytest.approx(0.15, abs=0.005)


def test_margins_far_from_zero_are_calibrated_as_well() -> None:
    margin, label = drawn(1, 0)
    shifted = fit.calibrate(margin * 50 + 300, label)
    probability = expit(shifted.slope * (margin * 50 + 300) + shifted.intercept)
    wanted = expit(margin)
    assert np.max(np.abs(logit(np.clip(probability, 1e-6, 1 - 1e-6)) - logit(np.clip(wanted, 1e-6, 1 - 1e-6)))) < 0.3
