"""The propensity database, against sorted lists and over real servers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import numpy as np
import pytest

from service.persons import Persons
from service.propensities import MOMENT_MS, Propensities, Scored
from service.shards import SHARDS, shard_of
from service.store import Store
from tests.service.test_members import STRANGE

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000


@pytest.fixture
async def store(every_store_url: str) -> AsyncIterator[Store]:
    """A store of its own over each feature cache."""
    found = Store.open(every_store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    yield found
    await found.close()


async def all_above(propensities: Propensities, cut: float, n: int) -> dict[str, float]:
    """Everyone above a cut, page by page; fails if one comes twice."""
    found: list[Scored] = []
    cursor = None
    while True:
        page = await propensities.above("shop", cut, cursor, n)
        assert len(page.items) <= n
        found += page.items
        cursor = page.cursor
        if cursor is None:
            assert len({one.visitor_id for one in found}) == len(found)
            return dict(found)


async def test_scores_are_ranked_counted_and_paged(store: Store) -> None:
    propensities = Propensities(store)
    random = np.random.default_rng(5)
    ids = [*STRANGE, *(f"v{place}" for place in range(300))]
    scores = np.round(random.beta(1, 8, len(ids)), 3).astype(np.float32)
    scores[:3] = (0.0, 1.0, np.float32(1e-30))
    await propensities.put("shop", "1", ids, scores, NOW_MS)
    exact = dict(zip(ids, scores.tolist(), strict=True))
    assert await propensities.of("shop", [*ids, "nobody"]) == [*scores.tolist(), None]
    for n in (1, 10, 65, 2000):
        best = await propensities.top("shop", n)
        assert [one.propensity for one in best] == sorted(exact.values(), reverse=True)[:n]
        assert all(exact[one.visitor_id] == one.propensity for one in best)
        assert len({one.visitor_id for one in best}) == len(best)
    for cut in (0.0, 0.05, 0.7, 0.9999, 1.0, 1.1):
        wanted = {name: value for name, value in exact.items() if value >= np.float32(cut)}
        assert await propensities.count("shop", cut) == len(wanted)
        assert await all_above(propensities, cut, 13) == wanted
        assert await all_above(propensities, cut, 1000) == wanted
    assert await propensities.count("shop", 0.05, 0.2) == sum(
        np.float32(0.05) <= value < np.float32(0.2) for value in exact.values()
    )
    for p in (0, 1, 50, 95, 99.9, 100):
        assert await propensities.percentile("shop", p) == np.percentile(scores, p, method="inverted_cdf")
    assert await propensities.percentile("other", 50) is None
    assert await propensities.models() == ["shop"]
    assert await propensities.versions("shop") == {"1": NOW_MS}


async def test_the_later_score_wins_in_whatever_order_they_come(store: Store) -> None:
    propensities = Propensities(store)
    later = NOW_MS + 2 * MOMENT_MS
    await propensities.put("shop", "1", ["a", "b"], [0.5, 0.5], [later, NOW_MS])
    await propensities.put("shop", "1", ["a", "b"], [0.25, 0.25], [NOW_MS, later])
    assert await propensities.of("shop", ["a", "b"]) == [0.5, 0.25]
    assert await propensities.top("shop", 5) == [Scored("a", 0.5), Scored("b", 0.25)]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf")])
async def test_what_is_no_probability_is_refused(store: Store, wrong: float) -> None:
    with pytest.raises(ValueError, match="number from 0 to 1"):
        await Propensities(store).put("shop", "1", ["a"], [wrong], NOW_MS)


async def test_segments_are_entered_once_and_every_move_is_told(store: Store) -> None:
    propensities = Propensities(store)
    assert await propensities.segments("shop", ["a"]) == [None]
    for _ in range(2):
        await propensities.move("shop", {"a": "champions", "b": "nurture", "é": "nurture"}, NOW_MS)
    for _ in range(2):
        await propensities.move("shop", {"a": "champions", "b": "low_priority"}, NOW_MS + 5)
    await propensities.move("shop", {"b": "nurture"}, NOW_MS)
    assert await propensities.segments("shop", ["a", "b", "c", "é"]) == [
        ("champions", NOW_MS),
        ("low_priority", NOW_MS + 5),
        None,
        ("nurture", NOW_MS),
    ]
    page = await propensities.moves("shop", "", 10)
    told = [(one.at_ms, one.visitor_id, one.model, one.left, one.entered) for one in page.items]
    assert sorted(told[:3]) == [
        (NOW_MS, "a", "shop", None, "champions"),
        (NOW_MS, "b", "shop", None, "nurture"),
        (NOW_MS, "é", "shop", None, "nurture"),
    ]
    assert told[3:] == [(NOW_MS + 5, "b", "shop", "nurture", "low_priority")]
    assert page.cursor is None
    assert (await propensities.moves("shop", page.items[-2].cursor, 10)).items == page.items[-1:]


async def test_an_erased_visitor_is_nowhere(store: Store) -> None:
    propensities = Propensities(store)
    await propensities.put("shop", "1", ["a", "b"], [0.5, 0.25], NOW_MS)
    await propensities.move("shop", {"a": "champions", "b": "nurture"}, NOW_MS)
    assert await Persons(store).erase("a")
    assert not await Persons(store).erase("a")
    assert await propensities.top("shop", 5) == [Scored("b", 0.25)]
    assert await all_above(propensities, 0, 5) == {"b": 0.25}
    assert await propensities.segments("shop", ["a", "b"]) == [None, ("nurture", NOW_MS)]
    assert [one.visitor_id for one in (await propensities.moves("shop", "", 5)).items] == ["b"]


async def test_who_was_not_scored_for_long_is_pruned(store: Store) -> None:
    propensities = Propensities(store)
    ids = [f"v{place}" for place in range(100)]
    await propensities.put("shop", "1", ids, np.full(100, 0.5), [NOW_MS - place * DAY_MS for place in range(100)])
    await propensities.move("shop", {**dict.fromkeys(ids, "nurture"), "unscored": "nurture"}, NOW_MS - 50 * DAY_MS)
    pruned = sum([count async for count in propensities.prune("shop", NOW_MS - 30 * DAY_MS)])
    assert pruned == 70
    assert set(await all_above(propensities, 0, 50)) == set(ids[:31])
    known = await propensities.segments("shop", ids)
    assert [one is not None for one in known] == [True] * 31 + [False] * 69
    assert await propensities.segments("shop", ["unscored"]) == [None]


async def test_a_batch_that_was_made_before_brings_nobody_back_who_was_erased(store: Store) -> None:
    propensities = Propensities(store)
    for _ in range(2):
        await propensities.put("shop", "1", ["a", "gone"], [0.5, 0.25], NOW_MS)
        await propensities.put_live("shop", "1", [{}] * SHARDS)
        live: list[dict[str, tuple[float, int]]] = [{} for _ in range(SHARDS)]
        live[shard_of("gone")]["gone"] = 0.25, NOW_MS
        await propensities.put_live("shop", "1", live)
        await propensities.move("shop", {"a": "champions", "gone": "nurture"}, NOW_MS)
        await Persons(store).erase("gone")
    assert await propensities.of("shop", ["a", "gone"]) == [0.5, None]
    await propensities.put("shop", "1", ["a", "gone"], [0.5, 0.25], NOW_MS)
    await propensities.put_live("shop", "1", live)
    await propensities.move("shop", {"gone": "nurture"}, NOW_MS)
    assert await propensities.of("shop", ["a", "gone"]) == [0.5, None]
    assert await propensities.segments("shop", ["a", "gone"]) == [("champions", NOW_MS), None]
    assert [one.visitor_id for one in (await propensities.moves("shop", "", 9)).items] == ["a"]
