"""Movement: everybody in exactly one segment, and nobody out of one for a trembling score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import segments
from service.core.movement import State, move, nowhere, places, widened
from service.core.segments import SEGMENTS

NOW = 1_790_000_000_000
DAY = 86_400_000
CUTS = (0.2, 0.1, 0.05, 0.03, 0.02)

scores = st.floats(0, 1, width=32)
falling = st.lists(st.floats(0, 1), min_size=5, max_size=5).map(lambda cuts: tuple(sorted(cuts, reverse=True)))


def after(score: float, place: int, *, stayed: int = 10 * DAY, margin: float = 0.5, min_stay: int = DAY) -> str:
    state = State(np.array([place], np.int8), np.array([NOW - stayed]))
    moved = move(np.array([score]), CUTS, state, NOW, margin=margin, min_stay_ms=min_stay)
    return SEGMENTS[moved.place[0]]


@given(st.lists(st.tuples(scores, st.integers(-1, 5), st.integers(0, 2 * DAY))), falling, st.floats(0, 10))
def test_everybody_is_in_exactly_one_segment_always(
    visitors: list[tuple[float, int, int]], cuts: tuple[float, ...], margin: float
) -> None:
    values = np.array([score for score, _, _ in visitors], np.float32)
    state = State(
        np.array([place for _, place, _ in visitors], np.int8),
        np.array([NOW - ago if place >= 0 else 0 for _, place, ago in visitors], np.int64),
    )
    moved = move(values, cuts, state, NOW, margin=margin, min_stay_ms=DAY)
    assert moved.place.shape == values.shape
    assert ((moved.place >= 0) & (moved.place < len(SEGMENTS))).all()
    again = move(values, cuts, moved, NOW, margin=margin, min_stay_ms=DAY)
    assert (again.place == moved.place).all(), "the same again changes nothing"
    assert (again.since_ms == moved.since_ms).all()


@given(scores, falling)
def test_somebody_new_goes_where_the_cut_offs_say(score: float, cuts: tuple[float, ...]) -> None:
    value = np.array([score], np.float32)
    moved = move(value, cuts, nowhere(1), NOW, margin=0.5, min_stay_ms=DAY)
    assert SEGMENTS[moved.place[0]] == segments.assign(float(value[0]), cuts)
    assert moved.since_ms[0] == NOW
    assert SEGMENTS[places(value, cuts)[0]] == segments.assign(float(value[0]), cuts)


@given(scores, falling, st.integers(0, 5), st.floats(0, 10))
def test_who_moves_was_beyond_the_bounds_and_who_stays_was_not(
    score: float, cuts: tuple[float, ...], place: int, margin: float
) -> None:
    value = float(np.float32(score))
    state = State(np.array([place], np.int8), np.array([NOW - DAY]))
    moved = move(np.array([value]), cuts, state, NOW, margin=margin, min_stay_ms=DAY)
    lower = widened(cuts[place], margin)[0] if place < 5 else -1.0
    upper = widened(cuts[place - 1], margin)[1] if place > 0 else 2.0
    wanted = SEGMENTS.index(segments.assign(value, cuts))
    assert moved.place[0] == (wanted if not lower <= value < upper else place)


@pytest.mark.parametrize(
    ("score", "segment"),
    [
        (0.1, "high_intent"),
        (0.07, "high_intent"),
        (0.0689, "potential_buyers"),
        (0.27, "high_intent"),
        (0.28, "champions"),
    ],
)
def test_a_score_near_the_cut_off_moves_nobody(score: float, segment: str) -> None:
    assert after(score, SEGMENTS.index("high_intent")) == segment


def test_a_visitor_stays_for_a_while_whatever_the_score_is() -> None:
    assert after(0.9, 5, stayed=DAY - 1) == "low_priority"
    assert after(0.9, 5, stayed=DAY) == "champions"


def test_without_a_margin_and_a_stay_segments_are_the_cut_offs_alone() -> None:
    values = np.linspace(0, 1, 1001)
    state = State(np.full(1001, 3, np.int8), np.full(1001, NOW))
    moved = move(values, CUTS, state, NOW, margin=0, min_stay_ms=0)
    assert [SEGMENTS[place] for place in moved.place] == [segments.assign(float(value), CUTS) for value in values]


@given(st.floats(0, 1), st.floats(0, 10))
def test_a_widened_cut_off_stays_a_probability_around_it(cut: float, margin: float) -> None:
    low, high = widened(cut, margin)
    assert 0 <= low <= cut * (1 + 1e-12) + 1e-300
    assert cut * (1 - 1e-12) <= high <= 1


def test_a_score_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        places(np.array([np.nan]), CUTS)
