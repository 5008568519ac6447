"""What two values hold of a visitor, before and after they were folded into one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import history
from service.core import events
from service.core.events import RECORD_BYTES
from service.history import MOST_EVENTS, History

NOW_MS = 1_767_225_600_000

moments = st.integers(NOW_MS - 5, NOW_MS + 2)
some_events = st.lists(
    st.builds(events.pack, moments, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.just(1.0)), max_size=12
).map(b"".join)
some_traits = st.lists(
    st.builds(
        events.pack,
        moments,
        st.sampled_from([events.TRAIT_NUMBER, events.TRAIT_TEXT]),
        st.integers(1, 3),
        st.integers(0, 2),
        st.just(1.0),
    ),
    max_size=12,
).map(b"".join)


def compacted(known: History) -> History:
    return History(history.compact_events(known.events), history.compact_traits(known.traits, NOW_MS))


@given(some_events, some_traits)
def test_folding_keeps_what_compaction_keeps(stored: bytes, traits: bytes) -> None:
    folded = history.fold(stored, traits, NOW_MS)
    assert history.unfold(*folded) == compacted(History(stored, traits))
    assert folded[1] == b"" or not stored


@given(some_events, some_traits, some_events, some_traits)
def test_what_comes_after_folding_counts_like_what_came_before(
    stored: bytes, traits: bytes, later_events: bytes, later_traits: bytes
) -> None:
    folded = history.fold(stored, traits, NOW_MS)
    grown = history.unfold(folded[0] + later_events, folded[1] + later_traits)
    assert compacted(grown) == compacted(History(stored + later_events, traits + later_traits))


@given(some_events, some_traits)
def test_folding_twice_changes_nothing(stored: bytes, traits: bytes) -> None:
    folded = history.fold(stored, traits, NOW_MS)
    assert history.fold(*folded, NOW_MS) == folded


@given(some_events, some_traits, some_events)
def test_trimming_a_value_keeps_the_traits_in_it(stored: bytes, traits: bytes, later: bytes) -> None:
    folded = history.fold(stored, traits, NOW_MS)[0] + later
    assert history.unfold(history.trim_events(folded), b"").traits == history.unfold(folded, b"").traits


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_rubbish_is_read_whole_and_folded_away(stored: bytes, traits: bytes) -> None:
    known = history.unfold(stored, traits)
    assert sorted(known.events + known.traits) == sorted(stored + traits)
    kept = history.unfold(*history.fold(stored, traits, NOW_MS))
    assert all(events.valid(events.from_bytes(part)).all() for part in kept)


def test_anything_but_bytes_holds_nothing() -> None:
    assert history.unfold(None, None) == history.unfold(7, [b"x"]) == History()


def test_the_latest_events_are_kept_whether_they_are_in_order_or_not() -> None:
    ids = np.arange(1, MOST_EVENTS + 3)
    blob = events.records(NOW_MS + ids, np.ones(len(ids)), ids, ids, ids).tobytes()
    turned = blob[RECORD_BYTES:] + blob[:RECORD_BYTES]
    assert history.compact_events(blob) == history.compact_events(turned) == blob[2 * RECORD_BYTES :]


@pytest.mark.parametrize("spoil", [lambda blob: blob[:-1], lambda blob: blob + b"x", lambda blob: b"\0" * 24 + blob])
def test_values_that_look_in_order_are_still_checked(spoil: object) -> None:
    ids = np.arange(1, 6)
    blob = events.records(NOW_MS + ids, np.ones(5), ids, ids, ids).tobytes()
    kept = history.compact_events(spoil(blob))  # type: ignore[operator]
    assert events.valid(events.from_bytes(kept)).all()
    assert kept in (blob, blob[:-RECORD_BYTES])


@pytest.mark.parametrize(
    ("size", "taken"), [(1, 16), (16, 16), (17, 32), (128, 128), (129, 160), (256, 256), (257, 320), (1025, 1280)]
)
def test_allocations_are_those_of_jemalloc(size: int, taken: int) -> None:
    assert history._allocated(size) == taken
