"""From visitor ids to scores."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import models, scoring
from service.core import events, features, segments
from service.core.features import Plan
from service.errors import InvalidRequest, ModelNotNamed, UnknownModel
from service.history import History
from service.models import Models
from service.scorer import Scorer
from service.scoring import Score, ScoreFailure, ScoreRequest
from service.store import Store
from service.visitors import Visitors
from tests.conftest import DAY_MS, SHOP, RedisServer, WriteBundle

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = Store.open(store_url, namespace=f"scoring-{uuid.uuid4().hex[:12]}", retention_ms=DAY_MS)
    yield opened
    await opened.close()


@pytest.fixture
def loaded(artifacts: Path) -> Models:
    return models.load(artifacts)


@pytest.fixture
def plan(loaded: Models) -> Plan:
    return loaded.bundles["shop"].plan


def scorer_of(store: Store, loaded: Models, deadline_ms: float = 2000) -> Scorer:
    return Scorer(store, loaded, deadline_ms=deadline_ms, now_ms=lambda: NOW_MS)


@pytest.fixture
async def scorer(store: Store, loaded: Models) -> Scorer:
    return scorer_of(store, loaded)


def history(seed: int, count: int = 30) -> History:
    """Events of the last days in any order, some twice, some still to come, and a device."""
    random = np.random.default_rng(seed)
    records = events.records(
        NOW_MS - random.integers(-DAY_MS, 20 * DAY_MS, count),
        random.integers(1, 4, count),
        random.integers(1, 2**32, count),
        random.integers(0, 5, count),
        random.exponential(20, count),
    )
    device = events.pack(NOW_MS - 5, events.TRAIT_TEXT, events.hash32("device"), events.hash32("desktop"), float("nan"))
    return History(records.tobytes() + records[: count // 3].tobytes(), device if seed % 2 else b"")


async def one(scorer: Scorer, request: ScoreRequest) -> Score:
    [result] = await scorer.score([request])
    assert isinstance(result, Score), result
    return result


async def test_scores_are_those_of_the_kernel_and_the_model(scorer: Scorer, store: Store, loaded: Models) -> None:
    bundle, count = loaded.bundles["shop"], 250
    kept = {f"v{seed}": history(seed, 1 + seed % 40) for seed in range(count)}
    await Visitors(store).append(kept, NOW_MS)
    contexts: list[dict[str, object]] = [{"referrer": ("ads", "search", "mail", 7)[seed % 4]} for seed in range(count)]
    results = await scorer.score(
        [ScoreRequest(name, context=context) for name, context in zip(kept, contexts, strict=True)]
    )
    for past, context, result in zip(kept.values(), contexts, results, strict=True):
        records, traits = events.from_bytes(past.events), events.from_bytes(past.traits)
        now = np.array([NOW_MS])
        row = features.matrix(
            bundle.plan,
            records,
            np.array([0, len(records)]),
            now,
            traits,
            np.array([0, len(traits)]),
            np.array([bundle.plan.encode_request(context)], np.float32),
        )
        expected = float(bundle.predict(row)[0])
        ages = {int(NOW_MS - record["ts_ms"]) for record in records if record["ts_ms"] <= NOW_MS}
        assert isinstance(result, Score)
        assert result.propensity == pytest.approx(expected, rel=1e-5)
        assert result.percentile == bundle.percentile(expected)
        assert result.segment == bundle.segment(expected)
        assert result.events == len(ages)
        assert result.last_event_age_s == (min(ages) / 1000 if ages else None)
        assert (result.model, result.version, result.degraded) == ("shop", "1", [])
        assert result.scored_at == "2026-01-01T00:00:00.000Z"
    assert len({result.score_id for result in results if isinstance(result, Score)}) == count


async def test_order_and_doubles_and_late_events_change_nothing(scorer: Scorer, store: Store) -> None:
    records = events.from_bytes(history(3).events)
    await Visitors(store).append({"a": History(records.tobytes())}, NOW_MS)
    for start in range(0, len(records), 7):
        part = records[::-1][start : start + 7].tobytes()
        await Visitors(store).append({"b": History(part)}, NOW_MS)
        await Visitors(store).append({"b": History(part)}, NOW_MS)
    first, second = await scorer.score([ScoreRequest("a"), ScoreRequest("b")])
    assert isinstance(first, Score)
    assert isinstance(second, Score)
    assert (first.propensity, first.events) == (second.propensity, second.events)


async def test_nobody_knows_the_visitor_and_it_gets_a_score(scorer: Scorer) -> None:
    score = await one(scorer, ScoreRequest("nobody"))
    assert score.propensity is not None
    assert (score.events, score.last_event_age_s, score.degraded) == (0, None, [])


async def test_rubbish_under_a_visitors_key_is_not_scored(scorer: Scorer, store: Store) -> None:
    empty = await one(scorer, ScoreRequest("nobody"))
    await Visitors(store).append(
        {"a": History(np.random.default_rng(7).bytes(24 * 50 + 7), np.random.default_rng(8).bytes(55))}, NOW_MS
    )
    score = await one(scorer, ScoreRequest("a"))
    assert (score.propensity, score.events) == (empty.propensity, 0)


async def test_answers_are_in_order_whatever_the_models(
    store: Store, tmp_path: Path, write_bundle: WriteBundle
) -> None:
    for name, weight in (("a", 0.1), ("b", 0.2), ("broken", 0.3)):
        directory = write_bundle(tmp_path, {**SHOP, "model": name}, weight=weight)
    (directory / "model.onnx").unlink()
    names = ["b", "a", None, "broken", "gone", "a", "b"] * 40
    scorer = scorer_of(store, models.load(tmp_path))
    results = await scorer.score([ScoreRequest(f"v{place}", name) for place, name in enumerate(names)])
    assert [result.visitor_id for result in results if not isinstance(result, Exception)] == [
        f"v{place}" for place in range(len(names))
    ]
    for asked, result in zip(names, results, strict=True):
        if asked is None:
            assert isinstance(result, ScoreFailure)
            assert isinstance(result.error, ModelNotNamed)
        elif asked == "gone":
            assert isinstance(result, ScoreFailure)
            assert isinstance(result.error, UnknownModel)
        else:
            assert isinstance(result, Score)
            assert result.model == asked
            assert (result.propensity is None) == (asked == "broken")
            assert result.degraded == (["model"] if asked == "broken" else [])


async def test_without_a_model_the_segment_follows_the_rules(store: Store, tmp_path: Path) -> None:
    moments = [NOW_MS - hours * 3_600_000 for hours in (0, 1, 2, 30, 100, -5)]
    blob = b"".join(events.pack(ts_ms, 1, place, 0, 1) for place, ts_ms in enumerate([*moments, moments[0] - 3]))
    await Visitors(store).append({"a": History(blob + blob)}, NOW_MS)
    scorer = scorer_of(store, models.load(tmp_path))
    score = await one(scorer, ScoreRequest("a"))
    assert score.segment == segments.by_rule(4, 6, 0.0) == "potential_buyers"
    assert (score.propensity, score.percentile, score.model, score.version) == (None, None, None, None)
    assert (score.events, score.last_event_age_s, score.degraded) == (6, 0.0, ["model"])
    assert (await one(scorer, ScoreRequest("nobody"))).segment == "low_priority"


async def test_a_feature_cache_that_is_gone_costs_the_history_and_not_the_score(
    own_redis_server: RedisServer, loaded: Models
) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS)
    scorer = scorer_of(store, loaded)
    await Visitors(store).append({"a": history(1)}, NOW_MS)
    assert (await one(scorer, ScoreRequest("a"))).degraded == []
    own_redis_server.kill()
    score = await one(scorer, ScoreRequest("a"))
    assert (score.degraded, score.events) == (["store"], 0)
    assert score.propensity == (await one(scorer, ScoreRequest("nobody"))).propensity
    own_redis_server.start()
    assert (await one(scorer, ScoreRequest("a"))).degraded == []
    await store.close()


@pytest.mark.alone
async def test_a_feature_cache_that_hangs_costs_the_deadline_and_no_more(
    own_redis_server: RedisServer, loaded: Models
) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS)
    scorer = scorer_of(store, loaded, deadline_ms=50)
    await Visitors(store).append({"a": history(1)}, NOW_MS)
    assert own_redis_server.process is not None
    os.kill(own_redis_server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert (await one(scorer, ScoreRequest("a"))).degraded == ["store"]
    assert 0.04 < time.monotonic() - started < 0.5
    os.kill(own_redis_server.process.pid, signal.SIGCONT)
    relaxed = await one(scorer_of(store, loaded), ScoreRequest("a"))
    assert relaxed.degraded == []
    assert relaxed.events > 0
    await store.close()


def row_of(plan: Plan, overrides: dict[str, object]) -> dict[str, float]:
    matrix = scoring.evaluate(plan, [history(1)], NOW_MS, [{}]).matrix
    scoring.override(plan, matrix, overrides)
    return dict(zip(plan.spec.names, matrix[0].tolist(), strict=True))


async def test_an_overridden_feature_takes_its_ratios_along(plan: Plan) -> None:
    before, after = row_of(plan, {}), row_of(plan, {"carts_7d": 9})
    assert after["cart_rate"] == pytest.approx((9 + 1) / (before["views_90d"] + 20), rel=1e-6)
    assert {
        name: value for name, value in after.items() if name not in ("carts_7d", "cart_rate", "loyalty", "referrer")
    } == {name: value for name, value in before.items() if name not in ("carts_7d", "cart_rate", "loyalty", "referrer")}


async def test_an_overridden_ratio_stays_as_it_was_given(plan: Plan) -> None:
    row = row_of(plan, {"cart_rate": 0.5, "carts_7d": 9})
    assert (row["cart_rate"], row["carts_7d"]) == (0.5, 9)


async def test_a_ratio_of_an_overridden_ratio_follows_it(tmp_path: Path, write_bundle: WriteBundle) -> None:
    nested = {**SHOP["features"], "outer": {"ratio": ["cart_rate", "views_1d"], "prior": [1, 1]}}
    write_bundle(tmp_path, {**SHOP, "features": nested})
    row = row_of(models.load(tmp_path).bundles["shop"].plan, {"cart_rate": 3, "views_1d": 1})
    assert row["outer"] == 2


async def test_strings_override_by_category_and_null_is_missing(plan: Plan) -> None:
    row = row_of(plan, {"device": "mobile", "referrer": "unheard of", "views_1d": None})
    assert (row["device"], row["referrer"]) == (0, 2)
    assert np.isnan(row["views_1d"])


@pytest.mark.parametrize(
    ("overrides", "pointers"),
    [
        ({"nope": 1}, ["/features/nope"]),
        ({"a/b~c": 1}, ["/features/a~1b~0c"]),
        ({"views_1d": "3"}, ["/features/views_1d"]),
        ({"loyalty": "gold"}, ["/features/loyalty"]),
        ({"views_1d": True, "spend_7d": [1]}, ["/features/views_1d", "/features/spend_7d"]),
        ({"views_1d": 1e39}, ["/features/views_1d"]),
        ({"views_1d": 10**400}, ["/features/views_1d"]),
    ],
)
async def test_overrides_that_do_not_fit_are_all_named(
    scorer: Scorer, overrides: dict[str, Any], pointers: list[str]
) -> None:
    [result, neighbour] = await scorer.score([ScoreRequest("a", features=overrides), ScoreRequest("b")])
    assert isinstance(result, ScoreFailure)
    assert isinstance(result.error, InvalidRequest)
    assert [place.pointer for place in result.error.places] == pointers
    assert isinstance(neighbour, Score)
