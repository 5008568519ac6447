"""Segments: every score has exactly one, in the order of the names, about as many as the shares say."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import segments
from service.core.segments import SEGMENTS, SHARES

scores = st.floats(0, 1, width=32)
shares = st.dictionaries(st.sampled_from(SEGMENTS[:-1]), st.floats(0.01, 0.19), max_size=5)


def test_the_names_and_their_order_are_fixed() -> None:
    assert SEGMENTS == ("champions", "high_intent", "potential_buyers", "warm_prospects", "nurture", "low_priority")
    assert tuple(SHARES) == SEGMENTS[:-1]
    assert 0 < sum(SHARES.values()) < 1


def held(values: np.ndarray[tuple[int], np.dtype[np.float32]], of: Mapping[str, float]) -> dict[str, float]:
    """Share of the scores that each segment holds."""
    cuts = segments.cutoffs(values, of)
    names = [segments.assign(float(value), cuts) for value in values]
    return {name: names.count(name) / len(names) for name in SEGMENTS}


@pytest.mark.parametrize("of", [{}, {"champions": 0.01}, {"nurture": 0.4, "high_intent": 0.02}])
def test_each_segment_holds_its_share_and_those_left_out_divide_the_rest(of: dict[str, float]) -> None:
    found = held(np.random.default_rng(1).beta(1, 20, 20_000).astype(np.float32), of)
    rest = {name: SHARES.get(name, 1 - sum(SHARES.values())) for name in SEGMENTS if name not in of}
    room = (1 - sum(of.values())) / sum(rest.values())
    for name in SEGMENTS:
        assert found[name] == pytest.approx(of.get(name, room * rest.get(name, 0)), abs=1e-3)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("of", [{"champions": 0.6}, {"champions": 0.3, "nurture": 0.5}, {"warm_prospects": 0.97}])
def test_a_share_that_is_asked_for_is_kept_and_the_others_make_room(of: dict[str, float]) -> None:
    found = held(np.random.default_rng(2).random(20_000).astype(np.float32), of)
    for name, share in of.items():
        assert found[name] == pytest.approx(share, abs=1e-3)
    assert all(share > 0 for share in found.values())


@settings(max_examples=200)
@given(st.lists(scores, min_size=1, max_size=50), shares)
def test_cut_offs_fall_from_the_best_segment_to_the_last(values: list[float], of: dict[str, float]) -> None:
    cuts = segments.cutoffs(np.array(values, np.float32), of)
    assert len(cuts) == len(SEGMENTS) - 1
    assert list(cuts) == sorted(cuts, reverse=True)
    assert min(values) - 1e-7 <= cuts[-1] <= cuts[0] <= max(values) + 1e-7


@settings(max_examples=200)
@given(st.lists(scores, min_size=1, max_size=50), shares, scores, scores)
def test_a_higher_score_never_has_a_lower_segment(
    values: list[float], of: dict[str, float], one: float, other: float
) -> None:
    cuts = segments.cutoffs(np.array(values, np.float32), of)
    places = [SEGMENTS.index(segments.assign(score, cuts)) for score in (max(one, other), min(one, other))]
    assert places == sorted(places)


def test_a_score_at_a_cut_off_reaches_the_segment() -> None:
    cuts = (0.9, 0.7, 0.5, 0.3, 0.1)
    for name, cut in zip(SEGMENTS, cuts, strict=False):
        assert segments.assign(cut, cuts) == name
        assert segments.assign(math.nextafter(cut, 0), cuts) == SEGMENTS[SEGMENTS.index(name) + 1]


def test_equal_scores_are_all_in_one_segment() -> None:
    assert held(np.full(100, 0.25, np.float32), {})["champions"] == 1
    many_zeros = np.array([0.0] * 97 + [0.2, 0.3, 0.4], np.float32)
    cuts = segments.cutoffs(many_zeros, {})
    assert len({segments.assign(0.0, cuts) for _ in many_zeros}) == 1


@pytest.mark.parametrize("score", [0.0, 1.0, -1.0, 2.0, math.nan, math.inf, -math.inf])
def test_any_score_has_a_segment(score: float) -> None:
    assert segments.assign(score, (0.9, 0.7, 0.5, 0.3, 0.1)) in SEGMENTS
    assert segments.assign(math.nan, (0.9, 0.7, 0.5, 0.3, 0.1)) == "low_priority"


@pytest.mark.parametrize(
    ("events_1d", "events_30d", "age_s", "segment"),
    [
        (0, 0, None, "low_priority"),
        (0, 0, 31 * 86_400.0, "low_priority"),
        (0, 1, 30 * 86_400.0, "nurture"),
        (0, 50, 86_401.0, "nurture"),
        (1, 1, 0.0, "warm_prospects"),
        (1, 5, 0.0, "potential_buyers"),
        (7, 7, 0.0, "potential_buyers"),
        (8, 8, 0.0, "high_intent"),
        (20, 20, 0.0, "champions"),
    ],
)
def test_without_a_model_recent_and_frequent_visitors_come_first(
    events_1d: int, events_30d: int, age_s: float | None, segment: str
) -> None:
    assert segments.by_rule(events_1d, events_30d, age_s) == segment


def test_without_a_model_more_events_never_lower_the_segment() -> None:
    places = [SEGMENTS.index(segments.by_rule(count, count, 60.0)) for count in range(40)]
    assert places == sorted(places, reverse=True)
