"""Movement between segments: every visitor is in exactly one, and leaves it only when its score clearly does.

A score that trembles around a cut-off would move a visitor every day. So a visitor who is in a segment stays until the
score is beyond its bounds by a margin, and until the visitor was in it for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.core.segments import SEGMENTS


class State(NamedTuple):
    """Where visitors are: places in `SEGMENTS` int8[n], -1 for who was in none yet, and since when, int64[n]."""

    place: npt.NDArray[np.int8]
    since_ms: npt.NDArray[np.int64]


def nowhere(count: int) -> State:
    """The state of visitors that nobody has put into a segment."""
    return State(np.full(count, -1, np.int8), np.zeros(count, np.int64))


def places(scores: npt.NDArray[np.floating], cuts: Sequence[float]) -> npt.NDArray[np.int8]:
    """Places int8[n] in `SEGMENTS` by the cut-offs alone: what `segments.assign` says of each score.

    scores: float[n] in [0, 1]; cuts: the lowest score of each segment but the last, falling.
    Raises ValueError for NaN, which is in no segment.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is NaN; score every visitor before segments are given")
    rising = np.asarray(cuts[::-1], np.float64)
    reached = np.searchsorted(rising, np.asarray(scores, np.float64), side="right")
    return (len(SEGMENTS) - 1 - reached).astype(np.int8)


def widened(cut: float, margin: float) -> tuple[float, float]:
    """The scores around a cut-off between which nobody moves: where the odds are 1 + margin times lower and higher.

    cut: in [0, 1]; margin: 0 or more. Odds, so that a bound above 1 cannot arise: 0.1 with a margin of 0.25 gives
    0.082 and 0.122, and 0.9 gives 0.878 and 0.918.
    """
    if margin == 0:
        return cut, cut
    factor = 1 + margin
    return cut / (cut + (1 - cut) * factor), cut * factor / (cut * factor + (1 - cut))


def move(
    scores: npt.NDArray[np.floating],
    cuts: Sequence[float],
    state: State,
    now_ms: int,
    *,
    margin: float,
    min_stay_ms: int,
) -> State:
    """Where visitors are now, by their scores and where they were.

    scores: float[n] in [0, 1]; cuts: as `places` takes them; margin: as `widened` takes it. Who was nowhere goes where
    the cut-offs say. Who is in a segment stays in it while the score is within its widened bounds, or while
    `now_ms - since_ms < min_stay_ms`; beyond them, it goes where the cut-offs say. The same again changes nothing.
    """
    wanted = places(scores, cuts)
    lower = np.array([*(widened(cut, margin)[0] for cut in cuts), -np.inf])
    upper = np.array([np.inf, *(widened(cut, margin)[1] for cut in cuts)])
    known = state.place >= 0
    place = np.where(known, state.place, 0)
    values = np.asarray(scores, np.float64)
    beyond = (values < lower[place]) | (values >= upper[place])
    rested = now_ms - state.since_ms >= min_stay_ms
    moves = ~known | ((wanted != state.place) & beyond & rested)
    return State(np.where(moves, wanted, state.place).astype(np.int8), np.where(moves, now_ms, state.since_ms))
