"""Events over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi.testclient import TestClient

from service.api.events import EventsOut
from service.app import create_app
from service.settings import Settings
from tests.conftest import MakeSettings


def view(visitor_id: object = "a", **members: Any) -> dict[str, Any]:
    return {"type": "track", "event": "Product Viewed", "userId": visitor_id, **members}


def quarantined(settings: Settings) -> list[dict[bytes, bytes]]:
    assert settings.redis_url is not None
    with redis.Redis.from_url(settings.redis_url, protocol=2) as direct:
        entries: Any = direct.xrange(f"{settings.namespace}:quarantine")
    return [fields for _, fields in entries]


def count(client: TestClient, outcome: str) -> float:
    line = f'propensity_events_total{{outcome="{outcome}"}} '
    found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line)]
    return float(found[0].removeprefix(line)) if found else 0.0


def test_one_event_is_taken(client: TestClient) -> None:
    response = client.post("/v1/events", json=view())
    assert response.status_code == 200
    assert response.json() == {"accepted": 1, "ignored": 0, "refused": 0, "results": [{"status": "accepted"}]}


def test_each_event_of_a_batch_has_its_own_result(client: TestClient, settings: Settings) -> None:
    before = {outcome: count(client, outcome) for outcome in ("accepted", "ignored", "refused")}
    batch = [view(messageId="1"), view(None), view(event="Unheard Of"), 7, view(timestamp="soon"), view(messageId="2")]
    response = client.post("/v1/events", json={"batch": batch})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["accepted"], answer["ignored"], answer["refused"]) == (2, 1, 3)
    found = [(result["status"], result.get("reason")) for result in answer["results"]]
    assert found == [
        ("accepted", None),
        ("refused", "visitor"),
        ("ignored", None),
        ("refused", "shape"),
        ("refused", "timestamp"),
        ("accepted", None),
    ]
    assert client.post("/v1/score", json={"visitor_id": "a"}).json()["events"] == 2
    kept = quarantined(settings)
    assert [fields[b"reason"] for fields in kept] == [b"visitor", b"shape", b"timestamp"]
    assert [json.loads(fields[b"event"]) for fields in kept] == [batch[1], batch[3], batch[4]]
    assert {outcome: count(client, outcome) - before[outcome] for outcome in before} == {
        "accepted": 2,
        "ignored": 1,
        "refused": 3,
    }


def test_one_refused_event_is_a_problem_and_in_quarantine(client: TestClient, settings: Settings) -> None:
    response = client.post("/v1/events", json=view("", timestamp=1))
    assert response.status_code == 422
    assert response.json()["type"] == "urn:propensity:problem:refused-event"
    assert response.json()["detail"].startswith("visitor: ")
    assert len(quarantined(settings)) == 1


@pytest.mark.parametrize("body", [{"batch": []}, {"batch": {}}, {"batch": None}, [], [view()], "x"])
def test_a_body_that_is_neither_event_nor_batch_is_refused(client: TestClient, body: object) -> None:
    assert client.post("/v1/events", json=body).status_code == 422


def test_an_event_over_its_limit_is_refused_alone(client: TestClient, settings: Settings) -> None:
    large = view(properties={"x": "x" * settings.event_bytes})
    response = client.post("/v1/events", json=large)
    assert response.status_code == 413
    answer = client.post("/v1/events", json={"batch": [view(), large, view()]}).json()
    assert [result["status"] for result in answer["results"]] == ["accepted", "refused", "accepted"]
    assert answer["results"][1]["reason"] == "size"
    assert quarantined(settings) == []


def test_a_batch_of_many_visitors_reaches_each(client: TestClient) -> None:
    batch = [view(f"v{place % 50}", messageId=place) for place in range(500)]
    assert client.post("/v1/events", json={"batch": batch}).json()["accepted"] == 500
    visitors = [{"visitor_id": f"v{place}"} for place in range(50)]
    results = client.post("/v1/score/batch", json={"visitors": visitors}).json()["results"]
    assert [result["events"] for result in results] == [10] * 50


def spoil(settings: Settings, key: str) -> None:
    """Put something else under a key, as another program might."""
    assert settings.redis_url is not None
    with redis.Redis.from_url(settings.redis_url, protocol=2) as direct:
        direct.lpush(f"{settings.namespace}:{key}", "x")


def test_an_event_for_a_spoilt_key_is_refused_and_its_neighbours_are_taken(
    client: TestClient, settings: Settings
) -> None:
    spoil(settings, "e:{spoilt}")
    batch = [view("spoilt"), view("a"), view("spoilt", context={"device": "mobile"})]
    batch.append({"type": "identify", "userId": "spoilt", "traits": {"loyalty": 3}})
    answer = client.post("/v1/events", json={"batch": batch}).json()
    assert [result.get("reason") for result in answer["results"]] == ["unfit", None, "unfit", None]
    assert "key of events" in answer["results"][0]["message"]
    assert [fields[b"reason"] for fields in quarantined(settings)] == [b"unfit", b"unfit"]
    score = client.post("/v1/score", json={"visitor_id": "spoilt"})
    assert (score.status_code, score.json()["events"]) == (200, 0)
    assert client.post("/v1/score", json={"visitor_id": "a"}).json()["events"] == 1


def test_an_event_whose_traits_cannot_be_kept_is_accepted_and_says_so(client: TestClient, settings: Settings) -> None:
    spoil(settings, "t:{a}")
    batch = [view(messageId="1"), view(messageId="2", context={"device": "mobile"}), view("b", traits={"loyalty": 3})]
    batch.append({"type": "identify", "userId": "a", "traits": {"loyalty": 3}})
    answer = client.post("/v1/events", json={"batch": batch}).json()
    assert (answer["accepted"], answer["refused"]) == (3, 1)
    whole, partly, other, refused = answer["results"]
    assert whole == other == {"status": "accepted"}
    assert partly["status"] == "accepted"
    assert partly["message"].startswith("its traits are not kept")
    assert (refused["reason"], "key of traits" in refused["message"]) == ("unfit", True)
    assert client.post("/v1/score", json={"visitor_id": "a"}).json()["events"] == 2


def test_a_spoilt_quarantine_is_no_failure_of_what_is_sent(
    client: TestClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(settings, "quarantine")
    response = client.post("/v1/events", json={"batch": [view(), view(None)]})
    assert response.status_code == 200
    assert [result["status"] for result in response.json()["results"]] == ["accepted", "refused"]
    assert client.post("/v1/events", json=view(None)).status_code == 422
    assert "1 refused events are not kept" in caplog.text


def test_what_is_answered_is_what_the_documentation_says(client: TestClient) -> None:
    batch = [view(), view(None), view(event="Unheard Of"), view(timestamp="soon")]
    response = client.post("/v1/events", json={"batch": batch})
    assert response.headers["content-type"] == "application/json"
    told = EventsOut.model_validate_json(response.content, strict=True)
    assert told.model_dump(exclude_none=True) == response.json()
    assert [bool(result.message) for result in told.results] == [False, True, True, True]


def test_without_a_model_events_are_not_thrown_away_in_silence(
    tmp_path: Path, make_settings: MakeSettings, store_url: str
) -> None:
    with TestClient(create_app(make_settings(artifacts=tmp_path, redis_url=store_url))) as client:
        response = client.post("/v1/events", json=view())
        assert response.status_code == 503
        assert "artifacts" in response.json()["detail"]
