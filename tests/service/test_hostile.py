"""What a hostile, broken or careless client or feature cache must not be able to do to a running service."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from service import settings as service_settings
from service.app import serve
from service.core.bundle import MANIFEST
from service.core.errors import PropensityError
from service.models import load
from tests.conftest import RedisServer, ServiceProcess, StartService, WriteBundle

ROUTES = ("/v1/score", "/v1/score/batch", "/v1/events", "/v2/models/shop/infer")
JSON = {"Content-Type": "application/json"}
ROUTED = {"Content-Type": "application/json; by=route"}  # nothing but the ordinary route answers this one
PRICES: dict[str, Any] = {
    "model": "shop",
    "events": {"view": {"code": 1, "event": "Product Viewed", "value": "price"}},
    "features": {"price": {"latest": "view"}, "views": {"count": "view"}},
}


def _head(path: str, length: int | None, more: str = "", method: str = "POST", version: str = "1.1") -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    usual = "".join(f"{name}: {value}\r\n" for name, value in JSON.items())
    text = f"{method} {path} HTTP/{version}\r\nHost: shop\r\nConnection: close\r\n{usual}{more}{size}\r\n"
    return text.encode("latin-1")


def _exchange(port: int, *parts: bytes, pause_s: float = 0, half_close: bool = False) -> bytes:
    """All that the service answers to these bytes on a connection of their own."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        received = []
        with suppress(ConnectionError):  # who sends on after a refusal may find the connection reset
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                received.append(more)
        return b"".join(received)


def _status(answer: bytes) -> int:
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    return int(answer[9:12])


BODIES = {
    "NaN": b'{"visitor_id": NaN}',
    "arrays in arrays": b"[" * 100_000 + b"]" * 100_000,
    "objects in objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "5000 digits": b'{"visitor_id":"x","features":{"views_1d":' + b"1" * 5000 + b"}}",
    "4000 digits": b'{"visitor_id":"x","context":{"referrer":' + b"1" * 4000 + b"}}",
    "a byte order mark": b'\xef\xbb\xbf{"visitor_id":"x"}',
    "UTF-16": '{"visitor_id":"x"}'.encode("utf-16"),
    "half a surrogate pair": b'{"visitor_id":"\\ud800"}',
    "a surrogate in UTF-8": b'{"visitor_id":"\xed\xa0\x80"}',
    "NUL": b'{"visitor_id":"\\u0000","userId":"\\u0000","event":"Product Viewed"}',
    "booleans": b'{"visitor_id":true,"userId":true,"features":{"views_1d":true}}',
    "a key twice": b'{"visitor_id":"a","visitor_id":"b"}',
    "an array": b"[]",
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_is_answered_as_a_bug_of_the_service(service: ServiceProcess, path: str) -> None:
    for name, body in BODIES.items():
        answer = _exchange(service.port, _head(path, len(body)), body)
        assert 200 <= _status(answer) < 500, (name, answer)
        if _status(answer) >= 400 and path.startswith("/v1"):
            assert b"application/problem+json" in answer, (name, answer)


DIGITS = "1" * 30_000
SLOW_TO_READ: dict[str, dict[str, Any]] = {
    "a price": {"event": "Product Viewed", "properties": {"price": f"{DIGITS}x"}},
    "a moment": {"event": "Product Viewed", "timestamp": f"{DIGITS}x"},
    "a refused text": {"event": "", "properties": {"note": f"{DIGITS}x"}},
    "a refused trait": {"event": "", "traits": {"note": "1 " * 15_000 + "x"}},
    "an address": {"type": "identify", "traits": {"email": "a" + "\u0301\u0316" * 7000 + "@b.example"}},
    "a number": {"type": "identify", "traits": {"phone": f"+{DIGITS}x"}},
}


@pytest.mark.parametrize("name", SLOW_TO_READ)
def test_no_event_keeps_the_service_from_answering(service: ServiceProcess, name: str) -> None:
    body = json.dumps({"userId": "u", **SLOW_TO_READ[name]}, ensure_ascii=False)
    used_s = _processor_seconds(service)
    httpx2.post(f"{service.url}/v1/events", content=body.encode(), headers=JSON, timeout=60)
    assert _processor_seconds(service) - used_s < 0.2


def _processor_seconds(service: ServiceProcess) -> float:
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("path", ROUTES)
def test_however_a_body_is_sent_the_connection_gets_an_answer_or_ends(service: ServiceProcess, path: str) -> None:
    port, body = service.port, b'{"visitor_id":"x"}'
    chunked = _head(path, None, "Transfer-Encoding: chunked\r\n")
    whole = _head(path, len(body)) + body
    answer = _status(_exchange(port, whole))
    sound = [
        _exchange(port, *(bytes([byte]) for byte in whole), pause_s=0.0005),
        _exchange(port, chunked, b"5\r\n" + body[:5] + b"\r\n", b"d\r\n" + body[5:] + b"\r\n0\r\n\r\n"),
        _exchange(port, _head(path, len(body), "Expect: 100-continue\r\n") + body),
        _exchange(port, _head(path, len(body), version="1.0") + body),
    ]
    assert [_status(found) for found in sound] == [answer] * len(sound), sound
    others = [_exchange(port, _head(path, 0, method=method)) for method in ("HEAD", "OPTIONS", "PUT", "TRACE")]
    assert all(200 <= _status(found) < 500 for found in others), others
    broken = [
        _exchange(port, chunked, b"zz\r\n"),
        _exchange(port, _head(path, len(body), "Content-Encoding: gzip\r\n") + body),
        _exchange(port, _head(path, len(body), f"Content-Length: {len(body) + 1}\r\n") + body),
        _exchange(port, _head(path, len(body), "Transfer-Encoding: chunked\r\n") + body),
        _exchange(port, _head(path, -1) + body),
        _exchange(port, _head(path, 0, method="FOO")),
        _exchange(port, _head(path, 100) + body, half_close=True),
        _exchange(port, _head(path, 2_000_000) + b"x" * 2_000_000),
    ]
    halved = _exchange(port, whole, half_close=True)  # who hears nothing more may find the connection closed
    assert not halved or _status(halved) < 500
    assert all(not answer or 400 <= _status(answer) < 500 for answer in broken), broken


@pytest.mark.parametrize(
    "visitor",
    [
        "%00",
        "%ff",
        "%ed%a0%80",
        "%C3%A9",
        "a%2Fb",
        "..",
        "%7B%7D",
        "x" * 257,
        "%",
        "%zz",
        "*",
        "%0d%0aA:%20b",
        "%0a",
        "/",
    ],
)
def test_whatever_a_path_says_is_an_id_or_a_plain_error(service: ServiceProcess, visitor: str) -> None:
    for method in ("GET", "DELETE", "HEAD", "PUT"):
        answer = _exchange(service.port, _head(f"/v1/visitors/{visitor}", 0, method=method))
        assert _status(answer) in (200, 204, 405, 422), answer


@pytest.mark.parametrize("written", ["someone\n", "\nsomeone", "some\none", "someone\r\n"])
def test_an_id_with_a_line_break_is_looked_up_and_erased_as_itself(service: ServiceProcess, written: str) -> None:
    mark = f"{random.getrandbits(64):x}"
    bare, written = f"someone{mark}", written.replace("someone", f"someone{mark}").replace("some\none", f"some\n{mark}")
    with httpx2.Client(base_url=service.url) as client:
        for visitor in (bare, written):
            event = {"event": "Product Viewed", "userId": visitor, "messageId": visitor, "properties": {"price": 1}}
            assert client.post("/v1/events", json=event).status_code == 200
        path = "/v1/visitors/" + quote(written, safe="")
        assert client.get(path).json()["visitor_id"] == written
        assert client.delete(path).status_code == 204
        assert client.post("/v1/score", json={"visitor_id": written}).json()["events"] == 0
        assert client.post("/v1/score", json={"visitor_id": bare}).json()["events"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"visitor_id": "someone", "visitor_id": "model"}',
        b'{"visitor_id": "context", "visitor_id": "x"}',
        b'{"model": "other", "model": "shop", "visitor_id": "features"}',
        b'{"visitor_id": "x", "context": {"a": "features", "a": "b"}}',
    ],
)
def test_a_key_that_comes_twice_is_refused_whatever_the_strings_say(service: ServiceProcess, body: bytes) -> None:
    assert httpx2.post(f"{service.url}/v1/score", content=body, headers=JSON).status_code == 422


def test_of_two_content_types_the_express_lane_takes_the_one_that_the_route_takes(service: ServiceProcess) -> None:
    body = b'{"visitor_id":"x"}'
    head = _head("/v1/score", len(body)).replace(b"Content-Type", b"Content-Type: text/plain\r\nContent-Type")
    assert _status(_exchange(service.port, head, body)) == 415


NUMBERS = (
    *("0", "-0", "-0.0", "3", "3.0", "0.1", "1e5", "1e+20", "100000000000000000000", "9007199254740993", "1" * 400),
    *("18446744073709551616", "-9223372036854775809", "1e309", "1e-400", "3.4028236e38", "01", "1.", ".5", "NaN"),
)
STRINGS = ("", "x", ":", "a:b", "é", "😀", "search", "mobile", "3", "null", "\u2028", "x" * 257, "\ufeff", "shop")
NAMES = ("views_1d", "device", "referrer", "loyalty", "cart_rate", "x")


def test_the_express_lane_answers_as_the_route_does(service: ServiceProcess) -> None:
    chance = random.Random(7)

    def value() -> str:
        kind = chance.random()
        if kind < 0.5:
            return chance.choice(NUMBERS)
        return chance.choice(["null", "true", "[]"]) if kind < 0.6 else _text(chance.choice(STRINGS))

    def values() -> str:
        return "{" + ",".join(f"{_text(name)}:{value()}" for name in chance.sample(NAMES, chance.randrange(3))) + "}"

    with httpx2.Client(base_url=service.url, timeout=10) as client:
        for _ in range(1000):
            members = [f'"visitor_id": {_text(chance.choice(STRINGS)) if chance.random() < 0.9 else value()}']
            members += [f'"context":{values()}'] * (chance.random() < 0.6)
            members += [f'"features" :{values()}'] * (chance.random() < 0.5)
            members += [f'"model":{chance.choice(["null", _text("shop"), value()])}'] * (chance.random() < 0.3)
            chance.shuffle(members)
            body = "{" + ",\n".join(members) + chance.choice(["}"] * 20 + ["},", "", "}\x00"])
            express, routed = (
                _comparable(client.post("/v1/score", content=body.encode(), headers=headers))
                for headers in (JSON, ROUTED)
            )
            assert express == routed, body


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _comparable(answer: httpx2.Response) -> tuple[int, dict[str, Any]]:
    content = answer.json()
    return answer.status_code, {name: content[name] for name in content if name not in ("score_id", "scored_at")}


def test_pipelined_requests_are_answered_in_their_order(service: ServiceProcess) -> None:
    ids = [f"pipelined-{place}" for place in range(200)]
    bodies = [json.dumps({"visitor_id": visitor}).encode() for visitor in ids]
    heads = [_head("/v1/score", len(body)).replace(b"Connection: close\r\n", b"") for body in bodies]
    heads[-1] = _head("/v1/score", len(bodies[-1]))
    answers = _exchange(service.port, b"".join(part for pair in zip(heads, bodies, strict=True) for part in pair))
    found = [json.loads(part.partition(b"\r\n\r\n")[2])["visitor_id"] for part in answers.split(b"HTTP/1.1 200 OK")[1:]]
    assert found == ids


def _longest_wait_s(url: str, meanwhile: Callable[[], object]) -> float:
    """How long any request for /livez takes while something else goes on."""
    ended, waits = threading.Event(), [0.0]

    def ask() -> None:
        with httpx2.Client(timeout=60) as client:
            while not ended.is_set():
                started = time.monotonic()
                assert client.get(f"{url}/livez").status_code == 200
                waits.append(time.monotonic() - started)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        meanwhile()
    finally:
        ended.set()
        asking.join()
    return max(waits)


HEAVY = {
    "the last key twice": b"{%s}" % b",".join(b'"%x":1' % n for n in [*range(45_000), 44_999]),
    "wrong events": b'{"batch":[' + b",".join([b"1"] * 200_000) + b"]}",
    "wrong features": json.dumps({"visitor_id": "x", "features": {f"{n:x}": 1 for n in range(35_000)}}).encode(),
    "wrong keys": json.dumps({"visitor_id": "x", **{f"{n:x}": 1 for n in range(35_000)}}).encode(),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", HEAVY)
def test_no_body_of_the_allowed_size_holds_up_others(service: ServiceProcess, name: str) -> None:
    path = "/v1/events" if name == "wrong events" else "/v1/score"

    def send() -> None:
        httpx2.post(f"{service.url}{path}", content=HEAVY[name], headers=JSON, timeout=60)

    # A machine that is late once is not late every time.
    assert any(_longest_wait_s(service.url, send) < 1.0 for _ in range(3))


@pytest.mark.parametrize("name", ["wrong features", "wrong keys"])
def test_an_error_is_not_larger_than_the_body_it_is_about(service: ServiceProcess, name: str) -> None:
    answer = httpx2.post(f"{service.url}/v1/score", content=HEAVY[name], headers=JSON, timeout=60)
    assert answer.status_code == 422
    assert len(answer.content) < len(HEAVY[name])


def test_wrong_events_of_a_batch_never_cost_their_neighbour_its_place(service: ServiceProcess) -> None:
    event = b'{"event":"Product Viewed","userId":"neighbour","properties":{"price":1}}'
    body = b'{"batch":[' + event + b",1" * 20_000 + b"]}"
    answer = httpx2.post(f"{service.url}/v1/events", content=body, headers=JSON, timeout=60)
    assert answer.status_code in (200, 413)  # all of it is taken, or nothing and it says why; never "try again"
    if answer.status_code == 200:
        assert answer.json()["accepted"] == 1


@pytest.fixture(scope="module")
def prices(
    tmp_path_factory: pytest.TempPathFactory, embedded_server: Any, write_bundle: WriteBundle
) -> Iterator[ServiceProcess]:
    """A service whose score tells the price that the visitor saw last, and so whose score it is."""
    directory = tmp_path_factory.mktemp("prices")
    write_bundle(directory / "artifacts", PRICES, weight=0.002)
    process = ServiceProcess(
        directory, redis_url=embedded_server.url, artifacts=directory / "artifacts", namespace="prices"
    )
    process.wait_until_ready()
    yield process
    process.end(signal.SIGKILL)


@pytest.mark.anyio
async def test_beside_aborted_requests_everybody_gets_their_own_score_with_all_that_was_acknowledged(
    prices: ServiceProcess,
) -> None:
    async def visit(number: int) -> int:
        chance, seen = random.Random(number), 0
        async with httpx2.AsyncClient(base_url=prices.url, timeout=20) as client:
            for turn in range(25):
                visitor, price = f"{number}/{turn}", number * 25 + turn + 1
                event = {"event": "Product Viewed", "userId": visitor, "properties": {"price": price}}
                for count in (1, 2):
                    sent = await client.post("/v1/events", json={**event, "messageId": str(count)})
                    assert sent.status_code == 200
                    if chance.random() < 0.3:
                        await _abort(prices.port, visitor)
                    headers = chance.choice([JSON, ROUTED])
                    answer = await client.post("/v1/score", json={"visitor_id": visitor}, headers=headers)
                    score = answer.json()
                    assert score["visitor_id"] == visitor
                    assert score["events"] == count
                    wanted = 1 / (1 + math.exp(-(0.002 * price + 0.0002 * count)))
                    assert score["propensity"] == pytest.approx(wanted, abs=2e-6)
                    seen += 1
        return seen

    assert sum(await asyncio.gather(*(visit(number) for number in range(20)))) == 20 * 25 * 2


async def _abort(port: int, visitor: str) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"visitor_id": visitor}).encode()
    writer.write(_head("/v1/score", len(body)) + body)
    writer.transport.abort()


@pytest.mark.alone
@pytest.mark.redis
def test_a_hanging_feature_cache_costs_a_large_batch_one_deadline(
    start_service: StartService, own_redis_server: RedisServer, artifacts: Path
) -> None:
    given = {"redis_url": own_redis_server.url, "artifacts": artifacts, "deadline_ms": 200}
    process = start_service(**given, breaker_failures=1000)
    process.wait_until_ready()
    batch = {"visitors": [{"visitor_id": str(number)} for number in range(1000)]}
    assert own_redis_server.process is not None
    os.kill(own_redis_server.process.pid, signal.SIGSTOP)
    took_s = []
    try:
        for _ in range(3):
            started = time.monotonic()
            answer = httpx2.post(f"{process.url}/v1/score/batch", json=batch, timeout=20)
            took_s.append(time.monotonic() - started)
    finally:
        os.kill(own_redis_server.process.pid, signal.SIGCONT)
    assert {tuple(result["degraded"]) for result in answer.json()["results"]} == {("store",)}
    assert min(took_s) < 0.8  # one deadline, and time to score a thousand


def test_a_client_that_stops_sending_does_not_keep_the_service_from_ending(
    start_service: StartService, embedded_server: Any, artifacts: Path
) -> None:
    process = start_service(redis_url=embedded_server.url, artifacts=artifacts)
    process.wait_until_ready()
    with socket.create_connection(("127.0.0.1", process.port)) as stalled:
        stalled.sendall(_head("/v1/score", 100) + b'{"visitor')
        time.sleep(0.3)
        assert process.end() == 0


@pytest.mark.parametrize("query", ["foo=bar", "decode_responses=true", "max_connections=many", "socket_timeout=60"])
def test_an_option_that_the_url_of_the_feature_cache_cannot_have_is_named_before_the_start(query: str) -> None:
    with pytest.raises(PropensityError, match="PROPENSITY_REDIS_URL"):
        service_settings.load(redis_url=f"redis://127.0.0.1:6379/0?{query}")


def test_a_port_that_is_taken_is_named_before_anything_is_started(service: ServiceProcess, tmp_path: Path) -> None:
    taken = service_settings.Settings(_env_file=None, port=service.port, data_dir=tmp_path / "data")
    with pytest.raises(PropensityError, match=f"port {service.port} of 127.0.0.1: Address already in use"):
        serve(taken)
    assert not (tmp_path / "data").exists()


def test_a_manifest_nested_beyond_reading_refuses_its_model_alone(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path)
    (tmp_path / "deep" / "1").mkdir(parents=True)
    (tmp_path / "deep" / "1" / MANIFEST).write_text("[" * 200_000, encoding="utf-8")
    models = load(tmp_path)
    assert set(models.bundles) == {"shop"}
    assert set(models.refused) == {"deep"}
