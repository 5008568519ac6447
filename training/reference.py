"""What the population looked like that is scored: the bins that drift is counted in, and the quantiles of the score."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from service.core.bundle import Bins, Reference
from service.core.spec import FeatureSpec, Request, Trait

BINS: Final = 10
QUANTILES: Final = 1001


def describe(
    spec: FeatureSpec,
    matrix: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    per_visitor: float = 1,
) -> Reference:
    """Reference of feature rows float32[n, F] and of their scores float32[m], so many of which tell as much as one."""
    bins = {
        name: bins_of(matrix[:, column], _category_edges(spec, name), per_visitor)
        for column, name in enumerate(spec.names)
    }
    score = bins_of(scores, _score_edges(scores), per_visitor)
    quantiles = np.quantile(scores, np.linspace(0, 1, QUANTILES))
    return Reference(features=bins, score=score, quantiles=tuple(map(float, quantiles)))


def scores_per_visitor(visitor: npt.NDArray[np.uint64]) -> float:
    """How many rows tell as much as one, 1 or more, of the visitors uint64[n] whose rows they are.

    The design effect of Kish (1965): the mean of the squares over the mean of the rows a visitor has.
    """
    _, rows = np.unique(visitor, return_counts=True)
    return float(np.mean(rows**2) / np.mean(rows)) if len(rows) else 1.0


def bins_of(
    values: npt.NDArray[np.float32], edges: npt.NDArray[np.float64] | None = None, per_visitor: float = 1
) -> Bins:
    """Bins of about equal share (edges None), or between given edges; values: float32[n], NaN counted apart.

    Their `rows` is n over the rows that tell as much as one.
    """
    known = values[~np.isnan(values)].astype(np.float64)
    if edges is None:
        edges = _quantile_edges(known[np.isfinite(known)])  # a ratio may be infinite, an edge may not
    counts = np.bincount(np.searchsorted(edges, known, "right"), minlength=len(edges) + 1)
    shares = np.concatenate(([len(values) - len(known)], counts)) / max(len(values), 1)
    return Bins(edges=tuple(map(float, edges)), shares=tuple(map(float, shares)), rows=round(len(values) / per_visitor))


def _score_edges(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Edges between bins of about equal share, each half-way between two scores that occur.

    Many visitors have the very same score, the one of nobody's history. On an edge, the six digits that are served of
    it would fall to one side or the other.
    """
    exact = scores.astype(np.float64)
    distinct = np.unique(exact)
    above = np.searchsorted(distinct, np.quantile(exact, np.linspace(0, 1, BINS + 1)[1:-1]))
    above = np.unique(above[above > 0])
    return np.asarray((distinct[above - 1] + distinct[above]) / 2)


def _category_edges(spec: FeatureSpec, name: str) -> npt.NDArray[np.float64] | None:
    """Edges half-way between the codes of a feature with categories, so that each has its bin."""
    feature = spec.features[name]
    if not isinstance(feature, (Trait, Request)) or feature.categories is None:
        return None
    codes = np.unique([*feature.codes.values(), *([] if np.isnan(feature.other) else [feature.other])])
    return np.asarray((codes[1:] + codes[:-1]) / 2)


def _quantile_edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges between bins of about equal share; a value that a tenth or more have has a bin of its own.

    Without that, a count that is 0 for nine of ten visitors would have one bin, and its drift would not be seen.
    """
    if not len(values):
        return np.empty(0)
    inner, times = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]), return_counts=True)
    above = [values[values > tied].min() for tied in inner[times > 1] if values.max() > tied]
    edges = np.unique(np.concatenate((inner, above)))
    told_apart: npt.NDArray[np.float64] = edges[edges > values.min()]
    return told_apart
