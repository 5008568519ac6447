"""Refreshing: what the lists end with, whoever is killed when, over strict lists in memory and over the real ones."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiences import definitions, population, refresh
from audiences.definitions import InvalidDefinitions
from audiences.refresh import Outcome, StaleScores
from service.core.segments import SEGMENTS
from service.persons import Persons
from service.store import Store
from tests.audiences.conftest import AT_MS, WriteScores
from tests.audiences.lists import Killed, Lists, Scores

pytestmark = pytest.mark.anyio

DAY = 86_400_000
TEXT = """
defaults: {model: shop, margin: 0.2, min_stay: 1d, min_size: 3, purpose: ads}
segments:
  shop:
    min_stay: 0
    micro: {champions: {mobile: {device: mobile}}}
audiences:
  best: {top: 20%, destinations: google}
  likely: {cut: 0.5, exclude: best, holdout: 20%}
  loyal: {segment: champions, micro: mobile, scores: {churn: {below: 0.5}}}
  tiny: {cut: 0.99}
"""


def random_scores(seed: int, count: int = 300) -> dict[str, float]:
    drawn = np.random.default_rng(seed).random(count)
    return {f"visitor {place}": float(score) for place, score in enumerate(drawn)}


class Day:
    """Snapshots of both models at one moment."""

    def __init__(self, write: WriteScores, artifacts: Path, seed: int, at_ms: int, leave_out: int = 0) -> None:
        shop = dict(list(random_scores(seed).items())[leave_out:])
        device = [place % 3 for place in range(len(shop))]
        paths = [
            write(f"shop-{seed}-{at_ms}", shop, at_ms=at_ms, features={"device": device}),
            write(f"churn-{seed}-{at_ms}", random_scores(seed + 1, 250), model="churn", at_ms=at_ms),
        ]
        self.snapshots = [population.open_snapshot(path) for path in paths]
        self.bundles = population.bundles_of(self.snapshots, artifacts)

    async def refresh(self, lists: Any, scores: Any, text: str = TEXT) -> Outcome:
        read = definitions.read(text, "test.yaml")
        at_ms = refresh.moment(self.snapshots)
        return await refresh.refresh(read, self.snapshots, self.bundles, lists, scores, at_ms)


def state(lists: Lists, scores: Scores) -> Mapping[str, object]:
    members = {name: found for name, found in lists.members.items() if found}
    return {"members": members, "segments": scores.places, "descriptions": lists.descriptions}


async def test_the_lists_hold_what_the_definitions_say(write_scores: WriteScores, two_models: Path) -> None:
    lists, scores = Lists(), Scores()
    done = await Day(write_scores, two_models, 1, AT_MS).refresh(lists, scores)
    shop, churn = random_scores(1), random_scores(2, 250)
    best = sorted(shop, key=lambda one: -shop[one])[:60]
    assert set(lists.members["best"]) == set(best)
    assert set(lists.members["best"].values()) == {AT_MS}
    rest = {one for one, score in shop.items() if np.float32(score) >= np.float32(0.5)} - set(best)
    likely, control = set(lists.members["likely"]), set(lists.members["likely.control"])
    assert likely | control == rest
    assert not likely & control
    assert 0 < len(control) < len(likely)
    champions = {one for one, (segment, _) in scores.places["shop"].items() if segment == "champions"}
    mobile = {f"visitor {place}" for place in range(0, 300, 3)}
    assert set(lists.members["loyal"]) == {one for one in champions & mobile if one in churn and churn[one] < 0.5}
    assert not lists.members.get("tiny")
    found = {one.audience.name: one for one in done.audiences}
    assert found["tiny"].too_small
    assert (found["likely"].members, found["likely"].control) == (len(likely), len(control))
    assert found["best"].operations == 60


async def test_everybody_is_in_exactly_one_segment_of_each_model(write_scores: WriteScores, two_models: Path) -> None:
    lists, scores = Lists(), Scores()
    for seed in (1, 3):
        done = await Day(write_scores, two_models, seed, AT_MS + seed * DAY).refresh(lists, scores)
        for model, count in (("shop", 300), ("churn", 250)):
            assert len(scores.places[model]) == count
            assert {segment for segment, _ in scores.places[model].values()} <= set(SEGMENTS)
            assert sum(done.segments[model].sizes.values()) == count
    moved = [move for move in scores.moves if move[2] is not None]
    assert moved, "segments are left and entered"
    assert all(left != entered and at_ms == AT_MS + 3 * DAY for _, _, left, entered, at_ms in moved)
    assert done.segments["shop"].moved + done.segments["churn"].moved == len(moved)


async def test_the_same_again_changes_nothing(write_scores: WriteScores, two_models: Path) -> None:
    lists, scores, day = Lists(), Scores(), Day(write_scores, two_models, 1, AT_MS)
    await day.refresh(lists, scores)
    before, changes, moves = json.dumps(state(lists, scores)), len(lists.changes), len(scores.moves)
    done = await day.refresh(lists, scores)
    assert json.dumps(state(lists, scores)) == before
    assert (len(lists.changes), len(scores.moves)) == (changes, moves)
    assert sum(one.operations for one in done.audiences) == 0


async def test_a_refresh_that_was_cut_off_anywhere_is_ended_by_another(
    write_scores: WriteScores, two_models: Path
) -> None:
    first, second = Day(write_scores, two_models, 1, AT_MS), Day(write_scores, two_models, 3, AT_MS + DAY, leave_out=20)

    async def whole() -> tuple[Lists, Scores]:
        lists, scores = Lists(), Scores()
        for day in (first, second):
            await day.refresh(lists, scores)
        return lists, scores

    lists, scores = await whole()
    wanted, changes, moves = json.dumps(state(lists, scores), sort_keys=True), lists.changes, scores.moves
    random = np.random.default_rng(5)
    for killed, allowance in [
        *((0, int(one)) for one in random.choice(len(changes) // 2, 12, replace=False)),
        *((1, int(one)) for one in random.choice(len(moves) // 2, 4, replace=False)),
    ]:
        lists, scores = Lists(), Scores()
        kills = 0
        for day in (first, second):
            victim = (lists, scores)[killed]
            victim.allowance = allowance
            try:
                await day.refresh(lists, scores)
            except Killed:
                kills += 1
                victim.allowance = None
                await day.refresh(lists, scores)
            victim.allowance = None
        assert kills, "or nothing is shown"
        assert json.dumps(state(lists, scores), sort_keys=True) == wanted, f"cut off after {allowance}"
        assert len(lists.changes) == len(changes), "and nobody was let in or out twice"
        assert len(scores.moves) == len(moves)


async def test_who_has_no_score_any_more_leaves(write_scores: WriteScores, two_models: Path) -> None:
    lists, scores = Lists(), Scores()
    await Day(write_scores, two_models, 1, AT_MS).refresh(lists, scores)
    gone = {f"visitor {place}" for place in range(200)} & set(lists.members["likely"])
    text = TEXT.replace("churn: {below: 0.5}", "shop: {at_least: 0.1}")
    day = Day(write_scores, two_models, 1, AT_MS + 1, leave_out=200)
    day.snapshots, day.bundles = day.snapshots[:1], {"shop": day.bundles["shop"]}
    await day.refresh(lists, scores, text)
    left = {change.visitor_id for change in lists.changes if change.why == "gone" and change.audience == "likely"}
    assert left == gone
    assert not gone & set(lists.members["likely"])


async def test_who_was_erased_after_the_scores_were_made_takes_nobodys_place(
    write_scores: WriteScores, two_models: Path, store_url: str
) -> None:
    members, propensities = (pytest.importorskip(f"service.{name}") for name in ("members", "propensities"))
    store = Store.open(store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY)
    lists, scores = Lists(), Scores()
    lists.gone = set(sorted(random_scores(1), key=random_scores(1).__getitem__)[-50:])
    for visitor_id in lists.gone:
        await Persons(store).erase(visitor_id)
    day = Day(write_scores, two_models, 1, AT_MS)
    done = await day.refresh(lists, scores)
    assert done == await day.refresh(members.Members(store), propensities.Propensities(store))
    await store.close()
    assert done.visitors == 250
    assert len(lists.members["best"]) == 50, "a fifth of who is left"
    assert not lists.gone & (set(lists.members["best"]) | set(scores.places["shop"]) | set(scores.scores["churn"]))


async def test_scores_that_are_older_than_the_last_refresh_are_refused(
    write_scores: WriteScores, two_models: Path
) -> None:
    lists, scores = Lists(), Scores()
    await Day(write_scores, two_models, 1, AT_MS).refresh(lists, scores)
    with pytest.raises(
        StaleScores, match=r"the scores are of 2026-09-20T.*, and best was refreshed with .*give the newer"
    ):
        await Day(write_scores, two_models, 3, AT_MS - DAY).refresh(lists, scores)


async def test_lists_that_the_definitions_do_not_name_are_told_and_left(
    write_scores: WriteScores, two_models: Path
) -> None:
    lists, scores = Lists(), Scores()
    for name in ("elsewhere", "removed"):
        await lists.change(name, {"anna": 1}, [], 1, "qualifies")
    await lists.change("removed", {}, ["anna"], 2, "removed")
    done = await Day(write_scores, two_models, 1, AT_MS).refresh(lists, scores)
    assert done.unknown == ["elsewhere"]
    assert lists.members["elsewhere"] == {"anna": 1}


async def test_a_list_says_what_it_is(write_scores: WriteScores, two_models: Path) -> None:
    lists, scores = Lists(), Scores()
    await Day(write_scores, two_models, 1, AT_MS).refresh(lists, scores)
    best, at_ms = lists.descriptions["best"]
    said = json.loads(best)
    assert at_ms == AT_MS
    assert (said["top"], said["purpose"], said["destinations"], said["min_size"]) == ("20%", "ads", ["google"], 3)
    assert said["refreshed"] == {
        "at": "2026-09-21T14:13:20Z",
        "versions": {"shop": "1", "churn": "1"},
        "qualified": 60,
        "too_small": False,
    }
    assert json.loads(lists.descriptions["likely.control"][0])["control_of"] == "likely"
    assert json.loads(lists.descriptions["tiny"][0])["refreshed"]["too_small"]


async def test_definitions_are_checked_against_the_models_before_anything_is_written(
    write_scores: WriteScores, two_models: Path
) -> None:
    lists, scores = Lists(), Scores()
    day = Day(write_scores, two_models, 1, AT_MS)
    with pytest.raises(InvalidDefinitions, match=r"test.yaml:2: audiences.a.where.devise: .*mean 'device'"):
        await day.refresh(lists, scores, "defaults: {model: shop}\naudiences: {a: {where: {devise: mobile}}}")
    assert (lists.members, scores.places) == ({}, {})


async def test_the_real_lists_end_with_the_same(write_scores: WriteScores, two_models: Path, store_url: str) -> None:
    members, propensities = (pytest.importorskip(f"service.{name}") for name in ("members", "propensities"))
    store = Store.open(store_url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY)
    lists, scores = Lists(), Scores()
    real_lists, real_scores = members.Members(store), propensities.Propensities(store)
    first, second = Day(write_scores, two_models, 1, AT_MS), Day(write_scores, two_models, 3, AT_MS + DAY, leave_out=20)
    for day in (first, second, second):
        wanted, done = await day.refresh(lists, scores), await day.refresh(real_lists, real_scores)
        assert done == wanted
    for name in ("best", "likely", "likely.control", "loyal"):
        page = await real_lists.page(name, None, 1000)
        assert {one.visitor_id: one.entered_ms for one in page.items} == lists.members[name]
    for model in ("shop", "churn"):
        moves = (await real_scores.moves(model, "", 1000)).items
        told = [(one.model, one.visitor_id, one.left, one.entered, one.at_ms) for one in moves]
        assert sorted(told, key=str) == sorted((move for move in scores.moves if move[0] == model), key=str)
    await store.close()
