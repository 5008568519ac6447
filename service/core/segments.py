"""Segments: the name of the band that a propensity falls into, with a model and without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

SEGMENTS: Final = ("champions", "high_intent", "potential_buyers", "warm_prospects", "nurture", "low_priority")
SHARES: Final[Mapping[str, float]] = {
    "champions": 0.05,
    "high_intent": 0.10,
    "potential_buyers": 0.15,
    "warm_prospects": 0.20,
    "nurture": 0.25,
}


def cutoffs(scores: npt.NDArray[np.floating], shares: Mapping[str, float]) -> tuple[float, ...]:
    """Lowest score of each segment but the last, best first, so that each holds about its share of `scores`.

    scores: float[n] in [0, 1]; shares: segment -> share in (0, 1), adding up to less than 1. Segments that are left
    out divide the rest as `SHARES` and a last one of what is left there would.
    """
    others = {name: share for name, share in SHARES.items() if name not in shares}
    rest = (1 - sum(shares.values())) / (1 - sum(SHARES.values()) + sum(others.values()))
    wanted = [shares[name] if name in shares else rest * SHARES[name] for name in SEGMENTS[:-1]]
    return tuple(float(cut) for cut in np.quantile(scores, 1 - np.cumsum(wanted)))


def assign(score: float, cuts: Sequence[float]) -> str:
    """The segment of one score: the first whose cut-off it reaches, else the last."""
    for name, cut in zip(SEGMENTS, cuts, strict=False):
        if score >= cut:
            return name
    return SEGMENTS[-1]


def by_rule(events_1d: int, events_30d: int, last_event_age_s: float | None) -> str:
    """The segment when no model can be asked: by how lately and how often the visitor was here."""
    if last_event_age_s is None or last_event_age_s > 30 * 86_400:
        return "low_priority"
    if events_1d >= 20:
        return "champions"
    if events_1d >= 8:
        return "high_intent"
    if events_1d >= 1 and events_30d >= 5:
        return "potential_buyers"
    if events_1d >= 1:
        return "warm_prospects"
    return "nurture"
