"""Scores over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from tests.conftest import SHOP, MakeSettings, RedisServer, WriteBundle, wait_until

FIELDS = {
    *("score_id", "visitor_id", "propensity", "percentile", "segment", "model", "version"),
    *("scored_at", "events", "last_event_age_s", "degraded"),
}


def view(visitor_id: str, **members: Any) -> dict[str, Any]:
    return {"type": "track", "event": "Product Viewed", "userId": visitor_id, **members}


def ask(client: TestClient, visitor_id: str, **members: Any) -> dict[str, Any]:
    response = client.post("/v1/score", json={"visitor_id": visitor_id, **members})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_unknown_visitor_has_a_score(client: TestClient) -> None:
    answer = ask(client, "nobody")
    assert set(answer) == FIELDS
    assert 0 < answer["propensity"] < 1
    assert (answer["events"], answer["last_event_age_s"], answer["degraded"]) == (0, None, [])


def test_what_was_just_sent_is_in_the_next_score(client: TestClient) -> None:
    for count in range(1, 30):
        assert client.post("/v1/events", json=view("a", messageId=count)).status_code == 200
        assert ask(client, "a")["events"] == count


def test_doubles_and_late_events_give_the_same_score(client: TestClient) -> None:
    now = time.time()
    sent = [
        view(visitor, messageId=n, timestamp=now - 3600 * n, properties={"price": n, "category": f"c{n % 3}"})
        for visitor, order in (("a", range(20)), ("b", [*reversed(range(20)), *range(20)]))
        for n in order
    ]
    assert client.post("/v1/events", json={"batch": sent}).json()["accepted"] == 60
    batch = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": "a"}, {"visitor_id": "b"}]})
    first, second = batch.json()["results"]
    assert (first["propensity"], first["events"]) == (second["propensity"], second["events"])
    assert first["events"] == 20


@pytest.mark.parametrize(
    "visitor_id", ["a{b}", "}{", "é", "日本", "a b/c?d#e", "\u0000", "😀" * 256, "%7Ba%7D", "../x"]
)
def test_odd_visitor_ids_are_visitors_like_any_other(client: TestClient, visitor_id: str) -> None:
    client.post("/v1/events", json=view(visitor_id, messageId="1"))
    answer = ask(client, visitor_id)
    assert (answer["visitor_id"], answer["events"]) == (visitor_id, 1)
    assert ask(client, visitor_id[:-1] + "~")["events"] == 0


def test_the_context_and_overridden_features_reach_the_model(client: TestClient) -> None:
    plain = ask(client, "a")["propensity"]
    assert ask(client, "a", context={"referrer": "ads", "unheard": [1]})["propensity"] > plain
    assert ask(client, "a", features={"views_1d": 10})["propensity"] > plain
    assert ask(client, "a", features={"device": "desktop"})["propensity"] > plain


@pytest.mark.parametrize(
    ("request_", "pointer"),
    [
        ({}, "/visitor_id"),
        ({"visitor_id": ""}, "/visitor_id"),
        ({"visitor_id": "x" * 257}, "/visitor_id"),
        ({"visitor_id": 7}, "/visitor_id"),
        ({"visitor_id": None}, "/visitor_id"),
        ({"visitor_id": "a", "context": []}, "/context"),
        ({"visitor_id": "a", "model": 7}, "/model"),
        ({"visitor_id": "a", "explain": True}, "/explain"),
        ({"visitor_id": "a", "explain": 0}, "/explain"),
        ({"visitor_id": "a", "visitor": "b"}, "/visitor"),
        ({"visitor_id": "a", "features": {"nope": 1}}, "/features/nope"),
        ({"visitor_id": "a", "features": {"views_1d": {}}}, "/features/views_1d"),
    ],
)
def test_a_wrong_request_is_told_where(client: TestClient, request_: dict[str, Any], pointer: str) -> None:
    response = client.post("/v1/score", json=request_)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [place["pointer"] for place in response.json()["errors"]] == [pointer]


def test_unknown_features_are_told_which_exist(client: TestClient) -> None:
    response = client.post("/v1/score", json={"visitor_id": "a", "features": {"nope": 1}})
    for name in SHOP["features"]:
        assert name in response.json()["detail"]


def test_explain_may_be_false(client: TestClient) -> None:
    assert ask(client, "a", explain=False)["segment"]


def test_an_unknown_model_is_told_which_exist(client: TestClient) -> None:
    response = client.post("/v1/score", json={"visitor_id": "a", "model": "gone"})
    assert response.status_code == 404
    assert response.json() == {
        "type": "urn:propensity:problem:unknown-model",
        "title": "Unknown model",
        "status": 404,
        "detail": "no model 'gone'; there is shop",
        "instance": "/v1/score",
    }


def test_a_batch_answers_in_order_with_an_error_where_one_failed(client: TestClient) -> None:
    visitors = [
        {"visitor_id": "a"},
        {"visitor_id": ""},
        "b",
        {"visitor_id": "c", "model": "gone"},
        {"visitor_id": "d", "features": {"nope": 1}},
        {"visitor_id": "e", "unknown": 1},
        {"visitor_id": "a"},
    ]
    response = client.post("/v1/score/batch", json={"visitors": visitors})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["visitor_id"] for result in results] == ["a", "", None, "c", "d", "e", "a"]
    assert [result.get("error", {}).get("status") for result in results] == [None, 422, 422, 404, 422, 422, None]
    assert results[1]["error"]["errors"][0]["pointer"] == "/visitors/1/visitor_id"
    assert results[2]["error"]["errors"][0]["pointer"] == "/visitors/2"


def test_a_batch_has_at_least_one_visitor_and_at_most_a_thousand(client: TestClient) -> None:
    assert client.post("/v1/score/batch", json={"visitors": []}).status_code == 422
    assert client.post("/v1/score/batch", json={}).status_code == 422
    many = [{"visitor_id": f"v{place}"} for place in range(1001)]
    assert client.post("/v1/score/batch", json={"visitors": many}).status_code == 413
    results = client.post("/v1/score/batch", json={"visitors": many[:1000]}).json()["results"]
    assert [result["visitor_id"] for result in results] == [f"v{place}" for place in range(1000)]


def test_a_request_must_name_one_of_several_models(
    tmp_path: Path, write_bundle: WriteBundle, make_settings: MakeSettings, store_url: str
) -> None:
    for name in ("a", "b"):
        write_bundle(tmp_path, {**SHOP, "model": name})
    with TestClient(create_app(make_settings(artifacts=tmp_path, redis_url=store_url))) as client:
        response = client.post("/v1/score", json={"visitor_id": "x"})
        assert response.status_code == 422
        assert "name a model: a, b" in response.json()["detail"]
        assert ask(client, "x", model="b")["model"] == "b"


def test_a_damaged_model_leaves_a_service_that_answers_by_rules(
    tmp_path: Path, write_bundle: WriteBundle, make_settings: MakeSettings, store_url: str
) -> None:
    (write_bundle(tmp_path) / "model.onnx").write_bytes(b"")
    with TestClient(create_app(make_settings(artifacts=tmp_path, redis_url=store_url))) as client:
        answer = ask(client, "x", model="shop")
        assert (answer["propensity"], answer["segment"], answer["degraded"]) == (None, "low_priority", ["model"])
        assert "model.onnx" in client.get("/v1/models").json()["refused"]["shop"]
        assert client.get("/readyz").status_code == 200


@pytest.mark.redis
def test_without_the_feature_cache_everything_is_answered_and_says_so(
    own_redis_server: RedisServer, make_settings: MakeSettings
) -> None:
    with TestClient(create_app(make_settings(redis_url=own_redis_server.url))) as client:
        client.post("/v1/events", json=view("a"))
        assert (ask(client, "a")["events"], ask(client, "a")["degraded"]) == (1, [])
        own_redis_server.kill()
        for _ in range(5):
            answer = ask(client, "a")
            assert (answer["events"], answer["degraded"]) == (0, ["store"])
            assert answer["propensity"] is not None
        for response in (
            client.post("/v1/events", json=view("a")),
            client.get("/v1/visitors/a"),
            client.delete("/v1/visitors/a"),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.headers["content-type"] == "application/problem+json"
            assert str(own_redis_server.port) not in response.text
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/metrics")] == [200] * 3
        own_redis_server.start()
        wait_until(lambda: ask(client, "a")["degraded"] == [], timeout_s=2)


def test_the_embedded_server_keeps_what_was_sent_over_a_restart(tmp_path: Path, make_settings: MakeSettings) -> None:
    settings = make_settings(data_dir=tmp_path / "data")
    with TestClient(create_app(settings)) as client:
        client.post("/v1/events", json=view("a", messageId="1"))
    with TestClient(create_app(settings)) as client:
        assert ask(client, "a")["events"] == 1
