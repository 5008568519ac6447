"""Expected conversions: the interval holds what comes as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from audiences import budget


def test_the_mean_is_the_sum_of_the_probabilities_and_its_variance_that_of_independent_draws() -> None:
    found = budget.expected(np.array([0.5] * 100 + [0.1] * 100, np.float32))
    assert found.people == 200
    assert found.conversions == pytest.approx(60, rel=1e-6)
    assert found.rate == pytest.approx(0.3)
    half = budget.Z95 * np.sqrt(100 * 0.25 + 100 * 0.09)
    assert found.low == pytest.approx(60 - half)
    assert found.high == pytest.approx(60 + half)


def test_what_cannot_be_is_cut_off() -> None:
    few = budget.expected(np.array([0.1, 0.1]), level_error=1.0)
    assert few.low == 0
    assert budget.expected(np.array([0.9])).high == 1
    nobody = budget.expected(np.array([]))
    assert (nobody.people, nobody.conversions, nobody.low, nobody.high) == (0, 0, 0, 0)


@pytest.mark.parametrize("level_error", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("people", [500, 20_000])
def test_the_interval_holds_what_comes_in_95_of_100_cases(people: int, level_error: float) -> None:
    random = np.random.default_rng(3)
    claimed = random.beta(1, 12, people)
    found = budget.expected(claimed, level_error)
    logit = np.log(claimed / (1 - claimed))
    outcomes = []
    for _ in range(2_000):
        truth = 1 / (1 + np.exp(-(logit + random.normal(0, level_error))))
        # The sum of independent draws, by its first two moments: exact enough at these sizes, and quick.
        outcomes.append(random.normal(truth.sum(), np.sqrt((truth * (1 - truth)).sum())))
    inside = np.mean([found.low <= count <= found.high for count in outcomes])
    assert 0.93 < inside < 0.97


def test_the_interval_holds_single_draws_too() -> None:
    random = np.random.default_rng(4)
    claimed = random.beta(1, 12, 500)
    found = budget.expected(claimed)
    counts = (random.random((2_000, 500)) < claimed).sum(axis=1)
    assert 0.93 < np.mean((counts >= found.low) & (counts <= found.high)) < 0.97


def test_the_error_of_the_level_is_what_training_says_of_the_rate() -> None:
    # 100 positives of 1,000 independent rows: the logit of the rate has the standard error sqrt(1/100 + 1/900).
    half = budget.Z95 * np.sqrt(1 / 100 + 1 / 900)
    low, high = (1 / (1 + np.exp(-(np.log(1 / 9) + side))) for side in (-half, half))
    metrics = {"class prior": {"average_precision_interval": [low, high]}}
    assert budget.level_error(metrics) == pytest.approx(np.sqrt(1 / 100 + 1 / 900))


@pytest.mark.parametrize("metrics", [{}, {"class prior": {}}, {"class prior": {"average_precision_interval": [0, 1]}}])
def test_a_model_that_does_not_say_has_an_error_of_zero(metrics: dict[str, dict[str, list[float]]]) -> None:
    assert budget.level_error(metrics) == 0
