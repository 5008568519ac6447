"""Visitors over HTTP."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import redis
from fastapi.testclient import TestClient

from service.core import events
from service.settings import Settings
from tests.conftest import SHOP

EVENTS: list[dict[str, Any]] = [
    {"event": "Product Viewed", "timestamp": "2026-01-02T00:00:00Z", "properties": {"price": 1, "category": "a"}},
    {"event": "Product Viewed", "timestamp": "2026-01-01T00:00:00Z"},
    {"event": "Product Added", "timestamp": "2026-01-03T00:00:00.5Z", "context": {"device": "desktop"}},
    {"type": "identify", "timestamp": "2026-01-04T00:00:00Z", "traits": {"device": "watch", "loyalty": 7}},
]


def path_of(visitor_id: str) -> str:
    return f"/v1/visitors/{quote(visitor_id, safe='')}"


@pytest.mark.parametrize("visitor_id", ["a", "a/b", "a b", "é", "{}", "a?b#c", "100%", "😀" * 256])
def test_what_is_known_of_a_visitor(client: TestClient, visitor_id: str) -> None:
    batch = [{**event, "userId": visitor_id} for event in EVENTS]
    assert client.post("/v1/events", json={"batch": batch}).json()["accepted"] == 4
    response = client.get(path_of(visitor_id))
    assert response.status_code == 200
    known = response.json()
    assert known["visitor_id"] == visitor_id
    assert known["events"] == {
        "total": 3,
        "kinds": {"view": 2, "cart": 1},
        "first": "2026-01-01T00:00:00.000Z",
        "last": "2026-01-03T00:00:00.500Z",
    }
    since = "2026-01-04T00:00:00.000Z"
    assert known["traits"] == {"device": {"value": None, "since": since}, "loyalty": {"value": 7.0, "since": since}}
    assert list(known["features"]) == ["shop"]
    assert list(known["features"]["shop"]) == list(SHOP["features"])
    assert known["features"]["shop"]["device"] == 2
    assert known["features"]["shop"]["referrer"] is None


def test_a_listed_category_is_shown_as_its_text(client: TestClient) -> None:
    client.post("/v1/events", json={**EVENTS[2], "userId": "a"})
    assert client.get("/v1/visitors/a").json()["traits"]["device"]["value"] == "desktop"


def test_nothing_is_known_of_a_visitor_who_was_never_seen(client: TestClient) -> None:
    known = client.get("/v1/visitors/nobody").json()
    assert known["events"] == {"total": 0, "kinds": {}, "first": None, "last": None}
    assert known["traits"] == {}
    assert known["features"]["shop"]["views_1d"] == 0


def test_an_erased_visitor_is_unknown_again_and_its_neighbour_is_not(client: TestClient) -> None:
    for visitor_id in ("a", "a/b"):
        client.post("/v1/events", json={"batch": [{**event, "userId": visitor_id} for event in EVENTS]})
    assert client.delete(path_of("a/b")).status_code == 204
    assert client.delete(path_of("a/b")).status_code == 204
    assert client.get(path_of("a/b")).json()["events"]["total"] == 0
    assert client.get(path_of("a/b")).json()["traits"] == {}
    assert client.post("/v1/score", json={"visitor_id": "a/b"}).json()["events"] == 0
    assert client.get(path_of("a")).json()["events"]["total"] == 3


def test_an_id_that_is_too_long_is_a_problem(client: TestClient) -> None:
    response = client.get(path_of("x" * 257))
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


def test_rubbish_and_impossible_moments_are_not_shown(client: TestClient, settings: Settings) -> None:
    assert settings.redis_url is not None
    impossible = b"".join(events.pack(ts_ms, 1, 1, 1, 1) for ts_ms in (2**62, -(2**62), 2**53))
    with redis.Redis.from_url(settings.redis_url, protocol=2) as direct:
        for key in ("e", "t"):
            direct.set(f"{settings.namespace}:{key}:{{a}}", impossible + np.random.default_rng(9).bytes(240))
    response = client.get("/v1/visitors/a")
    assert response.status_code == 200
    assert response.json()["events"]["total"] == 0
    assert client.post("/v1/score", json={"visitor_id": "a"}).json()["events"] == 0
