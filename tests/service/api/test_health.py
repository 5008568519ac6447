"""Health, metrics and what is not there."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from service.app import create_app
from service.settings import Settings


def samples(client: TestClient, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by the values of its labels, in the order of the labels' names."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "le"): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def test_the_process_is_live_and_ready(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready", "models": 1}


def test_requests_are_timed_under_the_template_of_their_route_whatever_becomes_of_them(client: TestClient) -> None:
    name = "propensity_request_seconds_count"
    before = samples(client, name)
    client.get("/v1/visitors/one")
    client.get("/v1/visitors/two")
    client.post("/v1/score", json={})
    client.post("/v1/score", content=b"NaN", headers={"Content-Type": "application/json"})
    client.get("/nothing/here")
    client.request("BREW", "/v1/score")
    after = samples(client, name)
    new = {labels: value - before.get(labels, 0) for labels, value in after.items() if value != before.get(labels, 0)}
    assert new == {
        ("GET", "/v1/visitors/{visitor_id}", "200"): 2,
        ("POST", "/v1/score", "422"): 2,
        ("GET", "none", "404"): 1,
        ("other", "/v1/score", "405"): 1,
        ("GET", "/metrics", "200"): 1,
    }


def test_stages_scores_and_models_are_counted(client: TestClient) -> None:
    before = samples(client, "propensity_scores_total")
    stages = samples(client, "propensity_stage_seconds_count")
    segment = client.post("/v1/score", json={"visitor_id": "a"}).json()["segment"]
    labels = ("shop", segment, "1")
    assert samples(client, "propensity_scores_total")[labels] == before.get(labels, 0) + 1
    now = samples(client, "propensity_stage_seconds_count")
    assert {stage: now[stage] - stages.get(stage, 0) for stage in now} == {
        ("store",): 1,
        ("features",): 1,
        ("model",): 1,
    }
    assert samples(client, "propensity_models") == {("loaded",): 1, ("refused",): 0}
    assert samples(client, "propensity_model_info")[("shop", "1")] == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/score", 405), ("DELETE", "/v1/models", 405)],
)
def test_what_is_not_there_is_a_problem(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["type"], problem["status"], problem["instance"]) == ("about:blank", status, path)
    assert ("allow" in response.headers) == (status == 405)


def test_a_bug_is_a_problem_that_tells_no_secret_and_is_timed(settings: Settings) -> None:
    app = create_app(settings)

    @app.get("/bug")
    async def bug(request: Request) -> None:
        raise ZeroDivisionError("secret")

    with TestClient(app, raise_server_exceptions=False) as client:
        before = samples(client, "propensity_request_seconds_count")
        response = client.get("/bug")
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert "secret" not in response.text
        labels = ("GET", "/bug", "500")
        assert samples(client, "propensity_request_seconds_count")[labels] == before.get(labels, 0) + 1
