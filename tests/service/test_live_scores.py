"""Live scores arrive in the propensity database, and never hold anything up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import metrics
from service.core.bundle import Bundle
from service.core.bundle import load as load_bundle
from service.history import History
from service.live_scores import LiveScores
from service.propensities import Propensities
from service.scoring import Batch, Score, ScoreRequest
from service.store import Store
from tests.conftest import DAY_MS, RedisServer, wait_until

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000


@pytest.fixture
def shop(artifacts: Any) -> Bundle:
    return load_bundle(artifacts / "shop" / "1")


def scored(names: list[str], propensity: float, now_ms: int = NOW_MS, events: int = 1) -> tuple[Batch, list[Score]]:
    batch = Batch([ScoreRequest(name, None, {}, {}) for name in names], [History()] * len(names), now_ms)
    return batch, [
        Score("id", name, propensity, 50.0, "nurture", "shop", "1", "now", events, None, []) for name in names
    ]


def count(outcome: str) -> float:
    metrics.tell()
    value: float = metrics.LIVE_SCORES.labels(outcome)._value.get()
    return value


async def until(condition: Callable[[], Any], times: int = 300) -> None:
    for _ in range(times):
        if await condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("waited too long")


async def test_a_score_that_is_no_probability_ends_no_writing(shop: Bundle, redis_server: RedisServer) -> None:
    store = Store.open(redis_server.url, namespace=f"test-{uuid.uuid4().hex[:12]}", retention_ms=90 * DAY_MS)
    live = LiveScores(Propensities(store), buffer=10)
    for propensity in (float("nan"), 1.5, 0.5):
        live.add(shop, *scored([f"v{propensity}"], propensity))
    await live.close()
    assert [one.propensity for one in await Propensities(store).top("shop", 9)] == [0.5]
    await store.close()


def test_only_plain_scores_of_known_visitors_go_in(client: TestClient) -> None:
    for name in ("plain", "made-up", "batch"):
        client.post("/v1/events", json={"event": "Product Viewed", "userId": name, "properties": {"price": 9}})
    plain = client.post("/v1/score", json={"visitor_id": "plain", "context": {"referrer": "ads"}}).json()
    client.post("/v1/score", json={"visitor_id": "made-up", "features": {"views_1d": 9}})
    client.post("/v1/score", json={"visitor_id": "unknown"})
    batch = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": "batch"}, {"visitor_id": "nobody"}]})
    wanted = {one["visitor_id"]: one["propensity"] for one in (plain, batch.json()["results"][0])}
    wait_until(lambda: len(client.get("/v1/models/shop/top").json()["visitors"]) == 2)
    ranked = client.get("/v1/models/shop/top").json()["visitors"]
    assert {one["visitor_id"]: one["propensity"] for one in ranked} == wanted
    assert [one["propensity"] for one in ranked] == sorted(wanted.values(), reverse=True)
    assert client.get("/v1/models/shop/visitors").json() == {"visitors": sorted_by_page(client), "cursor": None}
    spread = client.get("/v1/models/shop/spread", params={"above": max(wanted.values()) - 1e-6}).json()
    assert (spread["visitors"], spread["above"], list(spread["versions"])) == (2, 1, ["1"])
    assert spread["percentiles"]["99"] == max(wanted.values())
    client.delete("/v1/visitors/plain")
    assert [one["visitor_id"] for one in client.get("/v1/models/shop/top").json()["visitors"]] == ["batch"]


def sorted_by_page(client: TestClient) -> list[dict[str, Any]]:
    """What pages of one visitor give, one after the other."""
    found, cursor = [], "0."
    while cursor is not None:
        page = client.get("/v1/models/shop/visitors", params={"limit": 1, "cursor": cursor}).json()
        found += page["visitors"]
        cursor = page["cursor"]
    return found


async def test_the_latest_score_of_each_is_written_together(redis_server: RedisServer, shop: Bundle) -> None:
    store = Store.open(redis_server.url, namespace="live", retention_ms=DAY_MS)
    propensities, written = Propensities(store), count("written")
    live = LiveScores(propensities, buffer=2000)
    names = [f"v{place}" for place in range(1000)]
    live.add(shop, *scored(names, 0.25))
    live.add(shop, *scored(names[:500], 0.5, NOW_MS + 1))
    await live.close()
    assert await propensities.of("shop", names) == [0.5] * 500 + [0.25] * 500
    assert count("written") - written == 1000
    await store.close()


async def test_what_does_not_fit_is_dropped_and_counted_and_the_rest_arrives_later(
    own_redis_server: RedisServer, shop: Bundle
) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS, timeout_ms=100)
    propensities, dropped, written = Propensities(store), count("dropped"), count("written")
    live = LiveScores(propensities, buffer=10)
    own_redis_server.kill()
    live.add(shop, *scored([f"v{place}" for place in range(25)], 0.25))
    await asyncio.sleep(0.4)
    live.add(shop, *scored(["v1"], 0.5, NOW_MS + 1))
    live.add(shop, *scored(["v30"], 0.5, NOW_MS + 1))
    assert count("dropped") - dropped == 16
    own_redis_server.start()

    async def has_all() -> bool:
        return count("written") - written == 10

    await until(has_all)
    assert await propensities.of("shop", ["v0", "v1", "v9", "v10", "v30"]) == [0.25, 0.5, 0.25, None, None]
    await live.close()
    await store.close()


async def test_degraded_scores_and_a_buffer_of_none_keep_nothing(redis_server: RedisServer, shop: Bundle) -> None:
    store = Store.open(redis_server.url, namespace="none", retention_ms=DAY_MS)
    for buffer, degraded in ((10, ("store",)), (0, ())):
        live = LiveScores(Propensities(store), buffer=buffer)
        batch, answers = scored(["a"], 0.5)
        live.add(shop, Batch(batch.requests, batch.histories, NOW_MS, degraded), answers)
        assert live.held == 0
        await live.close()
    assert await Propensities(store).models() == []
    await store.close()
