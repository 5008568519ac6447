"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lightgbm import Booster

from training.evaluate import Floats, Ints, Labels, Leak, Matrix, Metrics


@dataclass(frozen=True)
class Span:
    """One split of the rows; the times are those of its first and last cutoff, None for a table without times."""

    name: str
    start_ms: int | None
    end_ms: int | None
    rows: int
    positives: int


@dataclass(frozen=True)
class Scored:
    """Probabilities float64[n] in [0, 1] of the rows of the last split, and how good they are."""

    probability: Floats
    metrics: Metrics


@dataclass(frozen=True)
class Importance:
    """What the model uses: `gain` of the booster, and how much each feature contributed to the scores of s rows.

    gain: float64[F]; shap: float64[s, F] in log-odds before calibration; matrix: float32[s, F], the same rows.
    """

    names: Sequence[str]
    gain: Floats
    shap: Floats
    matrix: Matrix

    @classmethod
    def measure(cls, booster: Booster, matrix: Matrix, names: Sequence[str]) -> Importance:
        """On at most 1,000 evenly spaced rows of `matrix`, float32[n, F]: contributions cost more than scores."""
        rows = spaced(len(matrix), 1_000)
        contributions = np.asarray(booster.predict(matrix[rows], pred_contrib=True), np.float64)
        gain = np.asarray(booster.feature_importance("gain"), np.float64)
        return cls(names, gain, contributions[:, :-1], matrix[rows])


@dataclass(frozen=True)
class ReportData:
    """Everything that is shown.

    label: what is predicted, as it would follow "the share of": "Order Completed within 7 days".
    data: facts about the data, shown as they are; `from` and `to` become the header's data range.
    test_label, scored, baselines: the n rows of the last split, as the model and each baseline score them.
    segments: lowest score of each segment but the last, best first (a cut-off of the last is not looked at).
    sample, sample_label: float32[m, F] and [m], rows for the feature distributions; up to 20,000 of them are used.
    learning_curve: log loss by round, a list for each set of rows; best_round counts from 1.
    categories: names of the codes of a feature, {feature: {name: code}}.
    """

    model: str
    version: str
    created_at: str
    spec_hash: str
    label: str
    data: Mapping[str, object]
    splits: Sequence[Span]
    test_label: Labels
    scored: Scored
    baselines: Mapping[str, Scored]
    segments: Mapping[str, float]
    importance: Importance
    sample: Matrix
    sample_label: Labels
    learning_curve: Mapping[str, Sequence[float]]
    best_round: int
    leaks: Sequence[Leak] = ()
    warnings: Sequence[str] = ()
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def spaced(rows: int, most: int) -> Ints:
    """At most `most` places among `rows`, evenly spaced."""
    return np.linspace(0, rows - 1, min(most, rows)).astype(np.int64)
