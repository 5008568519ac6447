"""The express lane answers what the route would answer, and leaves everything unusual to it."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api import express
from service.api.express import ExpressLane
from service.score_log import ScoreLog
from service.scorer import Scorer
from tests.conftest import ServiceProcess

JSON = {"Content-Type": "application/json"}


class Unused:
    """Stands where the lane only reads."""


def head(length: int, *more: str, content_type: str = "application/json") -> bytes:
    lines = [
        f"POST {express.PATH} HTTP/1.1",
        "Host: shop",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def read(data: bytes, limit: int = 10_000) -> express.Asked | bool:
    lane = ExpressLane(cast(Scorer, Unused()), cast(ScoreLog, Unused()), limit)
    first = lane.read(data)
    assert lane.read(data) == first  # its head is known by now
    return first


def taken(body: bytes, content_type: str = "application/json") -> Any:
    """What the lane reads from a body, None where it leaves it to the route."""
    asked = read(head(len(body), content_type=content_type) + body)
    return asked.request if isinstance(asked, express.Asked) else None


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
    assert taken(b'{"visitor_id": "a"}', "text/plain") is None
    assert taken(b'{"visitor_id": "a"}', "") is None


BODY = b'{"visitor_id": "a"}'


@pytest.mark.parametrize(
    "line",
    [
        "Content-Encoding: gzip",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Connection: close",
        "Upgrade: websocket",
        "Content-Length: 19",
        "Content-Type: application/json",
        "X-Request-Timeout-Ms: 0",
        "X-Request-Timeout-Ms: -1",
        "X-Request-Timeout-Ms: 1.5",
        "X-Request-Timeout-Ms: 99999999999",
        "no colon",
    ],
)
def test_unusual_headers_are_left_to_the_route(line: str) -> None:
    assert read(head(len(BODY)) + BODY)
    assert read(head(len(BODY), line) + BODY) is False


@pytest.mark.parametrize(
    "data",
    [
        head(len(BODY)) + BODY + b"P",
        (head(len(BODY)) + BODY) * 2,
        head(len(BODY)).replace(b"POST", b"PUT") + BODY,
        head(len(BODY)).replace(b"/v1/score", b"/v1/scores") + BODY,
        head(len(BODY)).replace(b"/v1/score", b"/v1/score?a=b") + BODY,
        head(len(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0") + BODY,
        head(len(BODY))[:-2],
        head(len(BODY), "X-Long: " + "x" * 5000) + BODY,
        b"\r\n\r\n" + BODY,
        b"\x16\x03\x01",
    ],
)
def test_anything_but_one_whole_request_is_left_to_the_server(data: bytes) -> None:
    assert read(data) is False


def test_a_body_that_has_not_all_come_is_waited_for() -> None:
    whole = head(len(BODY)) + BODY
    for length in range(len(whole) - len(BODY), len(whole)):
        assert read(whole[:length]) is True
    assert isinstance(read(whole), express.Asked)


def test_other_headers_and_a_timeout_are_read() -> None:
    asked = read(head(len(BODY), "Cookie: a=b", "X-Request-Timeout-Ms: 250", "traceparent: 00-1-2-01") + BODY)
    assert isinstance(asked, express.Asked)
    assert asked.timeout_ms == 250


def test_a_body_beyond_the_limit_is_left_to_the_route() -> None:
    assert read(head(len(BODY)) + BODY, limit=len(BODY))
    assert read(head(len(BODY)) + BODY, limit=len(BODY) - 1) is False


def test_a_body_that_no_plain_score_has_is_not_held_outside_the_places_of_the_route() -> None:
    assert read(head(16 * 1024), limit=500_000) is True
    assert read(head(16 * 1024 + 1), limit=500_000) is False


def test_a_model_without_a_name_is_what_the_route_takes_it_for() -> None:
    assert taken(b'{"visitor_id": "a", "model": ""}').model == ""
    assert taken(b'{"visitor_id": "a", "model": null}').model is None


def test_heads_that_differ_in_each_request_take_no_more_room_than_a_bound() -> None:
    lane = ExpressLane(cast(Scorer, Unused()), cast(ScoreLog, Unused()), 10_000)
    for number in range(5000):
        assert lane.read(head(len(BODY), f"X-Number: {number}") + BODY)
    assert len(lane._heads) <= 1024


ID = "2d1b3c9a-6a5f"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_heads_that_only_their_marks_tell_apart_are_remembered_as_one_wherever_the_marks_stand() -> None:
    lane = ExpressLane(cast(Scorer, Unused()), cast(ScoreLog, Unused()), 10_000)
    for number in range(2000):
        marks = (f"X-Request-ID: {number}", f"traceparent: 00-{number:032x}-{number:016x}-01", "tracestate: a=1, b=2")
        data = head(len(BODY), *marks) + BODY
        if number % 2:  # right below the first line
            lines = data.split(b"\r\n")
            data = b"\r\n".join([lines[0], *lines[4:7], *lines[1:4], *lines[7:]])
        asked = lane.read(data)
        assert isinstance(asked, express.Asked)
        parent = f"00-{number:032x}-{number:016x}-01".encode()
        assert asked.marks == (str(number).encode(), parent, b"a=1, b=2")
    assert len(lane._heads) == 1


@pytest.mark.parametrize("name", ["X-Request-ID", "x-request-id", "X-Request-Id"])
def test_a_plain_request_id_is_read_however_its_name_is_written(name: str) -> None:
    asked = read(head(len(BODY), f"{name}: {ID}") + BODY)
    assert isinstance(asked, express.Asked)
    assert asked.marks is not None
    assert asked.marks.request_id == ID.encode()


@pytest.mark.parametrize(
    "lines",
    [
        ("X-Request-ID: a b",),
        ("X-Request-ID: shopper@example.org",),
        ("X-Request-ID:",),
        ("X-Request-ID: " + "a" * 129,),
        ("X-REQUEST-ID: a",),
        ("X-Request-ID: a\r\n b",),
        ("X-Request-ID: a", "X-Request-ID: a"),
        ("X-Request-ID: a", "x-request-id: b"),
        ("X-Request-ID: a", "X-Request-ID: b c"),
        (f"traceparent: {PARENT}", f"traceparent: {PARENT}"),
        ("X-Request-ID : a",),
    ],
)
def test_a_request_id_that_is_unusual_in_any_way_is_left_to_the_route(lines: tuple[str, ...]) -> None:
    assert read(head(len(BODY), *lines) + BODY) is False


@pytest.mark.parametrize("line", ["X-Request-ID: a\r\n\tTransfer-Encoding: chunked", "X: a\nX-Request-ID: b"])
def test_a_line_that_a_parser_may_see_otherwise_is_never_cut_out(line: str) -> None:
    assert express._MARK.search(head(len(BODY), line)) is None


def test_a_request_id_comes_back_with_the_answer_of_the_lane_and_of_the_route(service: ServiceProcess) -> None:
    url = service.url + express.PATH
    for kind in ("application/json", "application/json; by=route"):
        headers = {"Content-Type": kind, "X-Request-ID": ID}
        assert httpx2.post(url, content=BODY, headers=headers).headers["x-request-id"] == ID
    for unusual in ("", "not plain", "a" * 129):
        headers = {"Content-Type": "application/json; by=route", "X-Request-ID": unusual}
        made = httpx2.post(url, content=BODY, headers=headers).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


_values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
_documents = st.fixed_dictionaries(
    {"visitor_id": st.text(min_size=1, max_size=300)},
    optional={"context": st.dictionaries(st.text(), _values), "features": st.dictionaries(st.text(), _values)},
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
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


def test_the_lane_and_the_route_give_the_same_answer(service: ServiceProcess) -> None:
    plain = httpx2.post(service.url + express.PATH, json={"visitor_id": "a:b"})
    unusual = httpx2.post(service.url + express.PATH, content=b'{"visitor_id": "a\\u003ab"}', headers=JSON)
    answers = [plain.json(), unusual.json()]
    for answer in answers:
        del answer["score_id"], answer["scored_at"]
    assert answers[0] == answers[1]
    assert unusual.headers.pop("x-request-id")  # made by the route; the lane gives back what it is given
    for response in (plain, unusual):
        del response.headers["date"], response.headers["server-timing"]
    assert dict(plain.headers) == dict(unusual.headers)
