"""Bodies that are JSON to Python and not to others, through the routes that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from service.api.body import DEEPEST, decode, decode_exactly
from service.app import create_app
from service.embedded import EmbeddedServer
from service.errors import InvalidRequest
from service.settings import Settings

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(embedded_server: EmbeddedServer, artifacts: Path) -> Iterator[TestClient]:
    """One application for all: nothing here reaches the feature cache."""
    settings = Settings(_env_file=None, redis_url=embedded_server.url, artifacts=artifacts, namespace="body")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


BAD = {
    "NaN": b'{"visitor_id": "a", "features": {"views_1d": NaN}}',
    "Infinity": b'{"visitor_id": "a", "features": {"views_1d": Infinity}}',
    "-Infinity": b'{"visitor_id": "a", "context": {"x": [-Infinity]}}',
    "a float beyond float64": b'{"visitor_id": "a", "features": {"views_1d": 1e400}}',
    "a number of many digits": b'{"visitor_id": "a", "context": {"x": ' + b"9" * 5000 + b"}}",
    "a fraction of many digits": b'{"visitor_id": 0.' + b"9" * 20_000 + b"}",
    "a key twice": b'{"visitor_id": "a", "visitor_id": "b"}',
    "a key twice inside": b'{"visitor_id": "a", "context": {"x": 1, "y": 1, "x": 2}}',
    "half a surrogate pair": b'{"visitor_id": "\\ud800"}',
    "the other half": b'{"visitor_id": "a", "context": {"\\udfff": 1}}',
    "not UTF-8": b'{"visitor_id": "\xff"}',
    "deep lists": b'{"visitor_id": "a", "context": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "deep objects": b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
    "a little too deep": b'{"visitor_id": "a", "context": ' + b'{"x":' * 64 + b"1" + b"}" * 65,
    "nothing": b"",
    "a word": b"score",
    "half an object": b'{"visitor_id": "a"',
    "two objects": b'{"visitor_id": "a"}{}',
    "a byte order mark": b'\xef\xbb\xbf{"visitor_id": "a"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a string": b'"a"',
}


@pytest.mark.parametrize("body", BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/batch", "/v1/events"])
def test_a_bad_body_is_a_problem_of_the_client(client: TestClient, route: str, body: bytes) -> None:
    response = client.post(route, content=body, headers=JSON)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == 422
    assert problem["instance"] == route
    assert problem["detail"]


@pytest.mark.parametrize("body", BAD.values(), ids=list(BAD))
def test_a_bad_body_of_an_inference_is_an_error_in_its_own_form(client: TestClient, body: bytes) -> None:
    response = client.post("/v2/models/shop/infer", content=body, headers=JSON)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {"Content-Type": ""}, {}, {**JSON, "Content-Encoding": "gzip"}],
)
def test_what_is_not_declared_as_json_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    response = client.post("/v1/score", content=b'{"visitor_id": "a"}', headers=headers)
    assert response.status_code == 415
    assert response.headers["content-type"] == "application/problem+json"
    assert "application/json" in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_json_may_be_declared_in_several_ways(client: TestClient, content_type: str) -> None:
    response = client.post("/v1/score", content=b'{"visitor_id": "a"}', headers={"Content-Type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/batch", "/v1/events", "/v2/models/shop/infer"])
def test_a_body_over_the_limit_is_refused(client: TestClient, route: str) -> None:
    response = client.post(route, content=b" " * (500 * 1024 + 1), headers=JSON)
    assert response.status_code == 413
    assert ("error" in response.json()) == route.startswith("/v2")


@pytest.mark.parametrize("value", [{}, [], "é😀", {"a": [1, -2.5e3, None, True, {"b": "\u2028"}]}, 10**4000])
def test_sound_json_is_read_as_it_is(value: object) -> None:
    assert decode(json.dumps(value).encode()) == value
    assert decode(json.dumps(value, ensure_ascii=False).encode()) == value


def test_the_deepest_nesting_that_is_read(client: TestClient) -> None:
    value = json.loads("[" * DEEPEST + "]" * DEEPEST)
    assert decode(json.dumps(value).encode()) == value
    with pytest.raises(InvalidRequest, match="deeper"):
        decode(json.dumps([value]).encode())


def _json_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    keys = st.sampled_from(["a", "b:", "é", ""]) | st.text(max_size=3)
    return st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


def _outcome(read: Callable[[bytes], Any], raw: bytes) -> str:
    """What is read, with the type of each number, or the error."""
    try:
        return repr(read(raw))
    except InvalidRequest as error:
        return f"refused: {error}"


@given(
    _json_values(),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n")]),
    st.lists(
        st.tuples(st.integers(0, 10_000), st.sampled_from([b"", b'"', b"\\", b":", b"{", b"0", b"\xed", b"\\u003a"]))
    ),
)
def test_the_fast_reader_reads_what_the_exact_one_reads(
    value: Any, is_ascii: bool, separators: tuple[str, str], slips: list[tuple[int, bytes]]
) -> None:
    raw = json.dumps(value, ensure_ascii=is_ascii, separators=separators).encode("utf-8", "surrogatepass")
    for place, slip in slips[:3]:
        raw = raw[: place % (len(raw) + 1)] + slip + raw[(place + 1) % (len(raw) + 1) :]
    assert _outcome(decode, raw) == _outcome(decode_exactly, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":2}',
        b'{"a":":","a":"\\u003a:"}',
        b'{"a":"\\u003A","a":""}',
        b'{"a":{"b":1},"a":{"b":":"}}',
        b'{"\\u0061":":","a":"::"}',
        b'[{"a":"","a":"\\":\\""}]',
    ],
)
def test_colons_in_texts_do_not_hide_a_key_that_comes_twice(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="comes twice"):
        decode(raw)
