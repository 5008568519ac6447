"""The express lane answers what the route would answer, and leaves everything unusual to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api import express

JSON = {"Content-Type": "application/json"}


def taken(body: bytes, content_type: bytes = b"application/json", limit: int = 10_000) -> Any:
    """What the lane reads from a body, None where it leaves it to the route."""

    class Settings:
        body_bytes = limit

    scope = {"headers": [(b"content-type", content_type)], "state": {"settings": Settings}}
    return express._request(scope, {"type": "http.request", "body": body, "more_body": False})


def test_a_plain_request_is_taken() -> None:
    request = taken(b'{"visitor_id": "v:1", "context": {"referrer": "ads:2", "n": 1.5, "x": null}, "model": "m"}')
    assert (request.visitor_id, request.model) == ("v:1", "m")
    assert request.context == {"referrer": "ads:2", "n": 1.5, "x": None}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"visitor_id": ""}',
        b'{"visitor_id": 1}',
        b'{"visitor_id": "a", "visitor_id": "b"}',
        b'{"visitor_id": "a", "context": {"x": 1, "x": 2}}',
        b'{"visitor_id": "a", "context": {"x": [1]}}',
        b'{"visitor_id": "a", "context": {"x": NaN}}',
        b'{"visitor_id": "a", "context": {"x": 1e999}}',
        b'{"visitor_id": "a", "context": null}',
        b'{"visitor_id": "a", "explain": true}',
        b'{"visitor_id": "a", "unknown": 1}',
        b'{"visitor_id": "\\ud800"}',
        b'{"visitor_id": "\xff"}',
        b'{"visitor_id": "a"} trailing',
        b'{"visitor_id": "' + b"a" * 257 + b'"}',
        b'{"visitor_id": "a"' + b" " * 10_000 + b"}",
    ],
)
def test_what_is_unusual_is_left_to_the_route(body: bytes) -> None:
    assert taken(body) is None


def test_other_content_types_are_left_to_the_route() -> None:
    assert taken(b'{"visitor_id": "a"}', b"text/plain") is None
    assert taken(b'{"visitor_id": "a"}', b"") is None


_values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
_documents = st.fixed_dictionaries(
    {"visitor_id": st.text(min_size=1, max_size=300)},
    optional={"context": st.dictionaries(st.text(), _values), "features": st.dictionaries(st.text(), _values)},
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(_documents, st.booleans())
def test_what_is_taken_is_what_json_says(document: dict[str, Any], is_ascii: bool) -> None:
    try:
        body = json.dumps(document, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:
        return
    request = taken(body)
    if request is not None:
        said = json.loads(body)
        assert request.visitor_id == said["visitor_id"]
        assert dict(request.context) == said.get("context", {})
        assert dict(request.features) == said.get("features", {})


@pytest.mark.parametrize(
    "body",
    [
        b'{"visitor_id": "a", "visitor_id": "b"}',
        b'{"visitor_id": "a", "context": {"x": NaN}}',
        b'{"visitor_id": "a", "unknown": 1}',
        b"not json",
    ],
)
def test_a_wrong_request_gets_the_problem_of_the_route(client: TestClient, body: bytes) -> None:
    response = client.post(express.PATH, content=body, headers=JSON)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


def test_the_lane_and_the_route_give_the_same_answer(client: TestClient) -> None:
    plain = client.post(express.PATH, json={"visitor_id": "a:b"}).json()
    unusual = client.post(express.PATH, content=b'{"visitor_id": "a\\u003ab"}', headers=JSON).json()
    for answer in (plain, unusual):
        del answer["score_id"], answer["scored_at"]
    assert plain == unusual
