"""Models over HTTP."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tests.conftest import SHOP


def test_the_models_are_listed(client: TestClient) -> None:
    answer = client.get("/v1/models").json()
    assert (answer["refused"], answer["default"]) == ({}, None)
    [model] = answer["models"]
    assert (model["name"], model["version"], model["features"]) == ("shop", "1", len(SHOP["features"]))
    assert list(model["segments"]) == ["champions", "high_intent", "potential_buyers", "warm_prospects", "nurture"]


def test_a_model_is_shown_in_full(client: TestClient) -> None:
    model = client.get("/v1/models/shop").json()
    assert model["names"] == list(SHOP["features"])
    assert model["spec"] == SHOP


def test_an_unknown_model_is_told_which_exist(client: TestClient) -> None:
    response = client.get("/v1/models/gone")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"].endswith("there is shop")
