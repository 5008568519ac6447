"""Logs: what a line looks like in both formats, which request it belongs to, and what is never in one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from fastapi.testclient import TestClient

from service import logs
from service.errors import InvalidRequest, Place, StoreError
from service.logs import JSONLines, RequestId, Text
from service.settings import load
from service.store import Store
from tests.conftest import RedisServer, ServiceProcess, StartService, WriteBundle, wait_until
from tests.service.collector import Collector, collecting

ROOT = Path(__file__).parents[2]
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def record(message: str, *given: object, error: BaseException | None = None) -> logging.LogRecord:
    about = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("service.models", logging.WARNING, __file__, 1, message, given, about)


def raised(error: Exception, cause: BaseException | None = None) -> Exception:
    """The error after it was raised from its cause."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


# --- a line ---


def test_a_json_line_has_time_level_logger_process_and_message() -> None:
    line = JSONLines().format(record("model %s: refused\n  twice", "sh\u2028op\x1b"))
    assert "\n" not in line
    assert line.isascii()
    members = json.loads(line)
    assert re.fullmatch(RFC_3339, members.pop("time"))
    assert members == {
        "level": "warning",
        "logger": "service.models",
        "process": os.getpid(),
        "message": "model sh\u2028op\x1b: refused\n  twice",
    }


def test_a_text_line_is_one_line_whatever_is_in_it() -> None:
    line = Text(with_process=True).format(record("a\nb\r\u2028\x1b[31mc\x85 %s", "é"))
    assert line == rf"WARNING {os.getpid()} service.models: a\nb\r\u2028\x1b[31mc\x85 é"
    assert Text(with_process=False).format(record("a")) == "WARNING service.models: a"


def test_an_error_is_told_by_type_and_place_and_not_by_its_words() -> None:
    error = raised(
        ValueError("visitor-17"), raised(KeyError("a@example.org"), raised(ConnectionRefusedError(111, "no")))
    )
    members = json.loads(JSONLines().format(record("failed", error=error)))
    told = members["exception"]
    assert Text(with_process=False).format(record("failed", error=error)) == f"WARNING service.models: failed\n{told}"
    assert re.findall(r"^\S+Error.*", told, re.MULTILINE) == [
        "ConnectionRefusedError: [Errno 111] no",  # the words of the system
        "KeyError",
        "ValueError",
    ]
    assert told.count("in raised\n    raise error from cause") == 3


def test_errors_of_a_group_and_causes_without_end_are_told_within_a_bound() -> None:
    group = raised(ExceptionGroup("visitor-17", [raised(ValueError("visitor-17")) for _ in range(50)]))
    told = json.loads(JSONLines().format(record("failed", error=group)))["exception"]
    assert "visitor-17" not in told
    assert told.count("\nValueError") == 10
    error = raised(ValueError())
    for _ in range(100):
        error = raised(ValueError(), error)
    assert json.loads(JSONLines().format(record("failed", error=error)))["exception"].count("\nValueError") == 10


def test_only_words_that_are_about_the_service_are_told() -> None:
    assert (
        logs.in_short(StoreError("the feature cache is gone")) == "service.errors.StoreError: the feature cache is gone"
    )
    assert logs.in_short(InvalidRequest([Place("/visitor-17", "wrong")])) == "service.errors.InvalidRequest"
    assert logs.in_short(ImportError("no module onnxruntime")) == "ImportError: no module onnxruntime"
    assert logs.in_short(UnicodeDecodeError("utf-8", b"visitor-17", 0, 1, "bad")) == "UnicodeDecodeError"


# --- the request that it belongs to ---


async def _asked(header: bytes | None, spawned: list[asyncio.Task[None]]) -> tuple[str | None, bytes]:
    """The id within a request with this header, and the one that its answer tells."""
    told: list[Any] = []

    async def later() -> None:
        await asyncio.sleep(0.01)
        told.append(logs.request_id())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append(logs.request_id())
        spawned.append(asyncio.create_task(later()))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        told.extend(value for name, value in message["headers"] if name == b"x-request-id")

    headers = [] if header is None else [(b"x-request-id", header)]
    await RequestId(app)({"type": "http", "method": "GET", "headers": headers}, receive, send)
    await spawned[-1]
    assert told.pop() is None  # what a request has begun and left behind is not of it any more
    within, answered = told
    return within, answered


@pytest.mark.anyio
async def test_a_plain_id_of_the_client_is_taken_and_any_other_made() -> None:
    spawned: list[asyncio.Task[None]] = []
    assert await _asked(b"2d1b3c9a-6a5f_X.1", spawned) == ("2d1b3c9a-6a5f_X.1", b"2d1b3c9a-6a5f_X.1")
    for header in (None, b"", b"a b", b"a@example.org", b"x" * 129, b"a\xff", b"a\n"):
        within, answered = await _asked(header, spawned)
        assert within is not None
        assert re.fullmatch("[0-9a-f]{32}", within)
        assert answered == within.encode()
    assert logs.request_id() is None


def test_a_bug_is_told_once_under_the_id_that_its_answer_has(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(self: Store, visitor_ids: list[str]) -> None:
        told.append(logs.request_id())
        raise KeyError(visitor_ids)

    told: list[str | None] = []
    monkeypatch.setattr(Store, "read", fail)
    answer = client.get("/v1/visitors/a", headers={"X-Request-ID": "2d1b"})
    assert (answer.status_code, answer.headers["x-request-id"], told) == (500, "2d1b", ["2d1b"])
    assert [line.getMessage() for line in caplog.records if line.exc_info] == ["GET /v1/visitors/{visitor_id}: a bug"]


# --- whatever ends up on stderr ---

ACCIDENTS = """
import asyncio, logging, sys, threading, warnings
from service import logs
logs.configure("FORMAT", "debug")
class Broken:
    def __del__(self): raise KeyError("canary")
def fail(what): raise KeyError(what)
async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.log_loop_error)
    loop.call_soon(fail, "canary")
    loop.create_task(lost())
    await asyncio.sleep(0.01)
    import gc; gc.collect()
async def lost(): raise KeyError("canary")
thread = threading.Thread(target=fail, args=["canary"])
thread.start(); thread.join()
broken = Broken(); del broken
asyncio.run(main())
warnings.warn("careful")
logging.getLogger("urllib3").debug("canary")
logging.getLogger("opentelemetry.util.re").warning("Header format invalid! %s", "canary")
for _ in range(3): logging.getLogger("opentelemetry.x").error("gone")
logging.getLogger("service").debug("seen")
fail("canary")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_ends_a_thread_a_callback_or_the_process_is_a_line_without_its_words(form: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ACCIDENTS.replace("FORMAT", form)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "canary" not in "\n".join(line for line in ended.stderr.splitlines() if '"canary"' not in line)
    if form == "json":
        lines = [json.loads(line) for line in ended.stderr.splitlines()]
        assert sum("KeyError" in line.get("exception", "") for line in lines) == 5
        assert [line["message"] for line in lines if line["logger"] == "opentelemetry.x"] == ["gone"]
        assert [line["level"] for line in lines if line["logger"] == "service"] == ["debug"]
    else:
        assert ended.stderr.count("\nKeyError\n") == 5
    assert ended.stderr.count("an error that nothing caught") == 3


# --- canaries ---

CANARY = "canary-5e1f"
PASSWORD = "canary-of-the-password"
MAIL = f"{CANARY}@example.org"
# What a bug of the service would be, in every process that serves.
BUGS = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        # By now what is spoiled has been imported, and no request has come.
        if name == "uvicorn.loops.uvloop":
            from service import scoring
            from service.api.express import ExpressLane
            from service.persons import Persons
            read, score = ExpressLane.read, scoring.score_by_model

            def fail_to_read(self, data):
                if b"bug-of-the-lane" in data:
                    raise KeyError(data)
                return read(self, data)

            def fail_to_score(bundle, batch):
                if any("bug-of-the-model" in one.visitor_id for one in batch.requests):
                    raise KeyError(batch)
                return score(bundle, batch)

            async def fail(self, visitor_id):
                raise KeyError(visitor_id)

            ExpressLane.read, scoring.score_by_model, Persons.erase = fail_to_read, fail_to_score, fail

sys.meta_path.insert(0, Finder())
"""


def head(path: str, more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: {CANARY}\r\nContent-Type: application/json\r\n{more}\r\n".encode()


MALFORMED = [
    f"GET /{CANARY} HTTP/9.9\r\n\r\n".encode(),
    f"{CANARY}\r\n\r\n".encode(),
    f"GET /v1/visitors/{CANARY} HTTP/1.1\r\nHost: x\r\n{CANARY}\r\n\r\n".encode(),
    f"GET //[{CANARY} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    head("/v1/score", f"Content-Length: {CANARY}\r\n"),
    head(f"/v1/visitors/{CANARY}", "Transfer-Encoding: chunked\r\n") + CANARY.encode(),
    f"GET /v1/visitors/{CANARY} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode(),
    f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{CANARY}".encode(),
    head("/v1/score", "Content-Length: 1000\r\n") + CANARY.encode(),
    head("/v1/score", f"X-Long: {CANARY * 10_000}\r\n"),
    head("/v1/score", "Content-Length: 40\r\n") + f'{{"visitor_id": "bug-of-the-lane-{CANARY}"}}'.encode(),
]
EVENT = {
    "event": "Product Viewed",
    "userId": CANARY,
    "anonymousId": f"anonymous-{CANARY}",
    "messageId": f"message-{CANARY}",
    "properties": {"price": CANARY, "category": CANARY},
    "context": {"device": CANARY, "page": CANARY},
    "traits": {"email": MAIL, "loyalty": CANARY},
}
VISITORS = {"name": "visitor_id", "datatype": "BYTES", "shape": [1], "data": [CANARY]}
REQUESTS: list[tuple[str, str, object]] = [
    ("POST", "/v1/score", {"visitor_id": CANARY, "context": {"referrer": CANARY}}),
    ("POST", "/v1/score", {"visitor_id": CANARY, "features": {CANARY: CANARY}}),
    ("POST", "/v1/score", {"visitor_id": CANARY, "model": CANARY}),
    ("POST", "/v1/score", {"visitor_id": [CANARY]}),
    ("POST", "/v1/score", {"visitor_id": CANARY, CANARY: CANARY}),
    ("POST", "/v1/score", f'{{"visitor_id": "{CANARY}", "visitor_id": "{MAIL}"}}'),
    ("POST", "/v1/score", f'{{"visitor_id": "{CANARY}", '),
    ("POST", "/v1/score?visitor_id=" + CANARY, CANARY),
    ("POST", "/v1/score", {"visitor_id": f"bug-of-the-model-{CANARY}"}),
    ("POST", "/v1/score/batch", {"visitors": [{"visitor_id": CANARY}, {"visitor_id": {CANARY: 1}}, CANARY]}),
    ("POST", "/v1/score/batch", {"visitors": [{"visitor_id": f"bug-of-the-model-{CANARY}"}]}),
    ("POST", "/v1/events", EVENT),
    ("POST", "/v1/events", {**EVENT, "userId": f"other-{CANARY}"}),
    ("POST", "/v1/events", {**EVENT, "timestamp": CANARY}),
    ("POST", "/v1/events", {"batch": [{**EVENT, "type": CANARY}, {**EVENT, "properties": CANARY}, CANARY, EVENT]}),
    ("GET", f"/v1/visitors/{CANARY}", None),
    ("DELETE", f"/v1/visitors/{CANARY}", None),
    ("PUT", f"/v1/visitors/{CANARY}", {CANARY: CANARY}),
    ("GET", f"/v1/models/{CANARY}", None),
    ("GET", "/v1/models/broken", None),
    ("GET", f"/{CANARY}?{CANARY}={MAIL}", None),
    ("PROPFIND", f"/{CANARY}", None),
    ("POST", "/v2/models/shop/infer", {"id": CANARY, "inputs": [VISITORS]}),
    ("POST", "/v2/models/broken/infer", {"id": CANARY, "inputs": [VISITORS]}),
    ("POST", f"/v2/models/shop/versions/{CANARY}/infer", {"inputs": [VISITORS | {"datatype": CANARY}]}),
]
HEADERS = {
    "Cookie": CANARY,
    "User-Agent": CANARY,
    "Referer": f"http://x/{CANARY}",
    "Authorization": CANARY,
    "X-Request-ID": MAIL,
    "traceparent": CANARY,
    "tracestate": CANARY,
    "baggage": f"visitor={CANARY}",
}


def provoke(service: ServiceProcess) -> set[int]:
    """Send everything there is to be wrong with a request; returns the statuses of the answers."""
    statuses = set()
    alone = httpx2.Limits(max_keepalive_connections=0)  # some answers end their connection
    with httpx2.Client(base_url=service.url, headers=HEADERS, timeout=10, limits=alone) as client:
        for kind in ("application/json", "application/json; by=route"):
            for method, path, body in REQUESTS:
                content = body if isinstance(body, str | None) else json.dumps(body)
                answer = client.request(method, path, content=content, headers={"Content-Type": kind})
                statuses.add(answer.status_code)
    return statuses


def provoke_connections(service: ServiceProcess) -> None:
    for data in MALFORMED:
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection, suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)


class Cache(RedisServer):
    """A redis-server that can be started again with other options."""

    options: tuple[str, ...] = ()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self.options]
        self.process = subprocess.Popen([*command, "--dir", str(self.directory)], stdout=subprocess.DEVNULL)
        wait_until(self.listens)

    def listens(self) -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", self.port)) == 0

    def change(self, *options: str) -> None:
        self.kill()
        self.options = options
        self.start()


@pytest.fixture
def cache(tmp_path: Path, own_redis_server: RedisServer) -> Iterator[Cache]:
    own_redis_server.kill()
    server = Cache(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


@pytest.mark.redis
@pytest.mark.parametrize(("form", "workers"), [("text", 1), ("json", 2)])
def test_nothing_of_a_client_is_in_a_log_or_a_span_whatever_goes_wrong(
    cache: Cache,
    collector: Collector,
    write_bundle: WriteBundle,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    form: str,
    workers: int,
) -> None:
    write_bundle(tmp_path / "artifacts")
    (tmp_path / "artifacts" / "broken" / "1").mkdir(parents=True)
    (tmp_path / "sitecustomize.py").write_text(BUGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization {PASSWORD}")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10000")
    cache.change("--requirepass", PASSWORD)
    given = {
        "workers": workers,
        "log_format": form,
        "log_level": "debug",
        "artifacts": tmp_path / "artifacts",
        "default_model": "shop",
    }
    short = {"deadline_ms": 50, "redis_timeout_ms": 300, "breaker_failures": 2, "breaker_pause_ms": 100}
    service = start_service(redis_url=f"redis://:{PASSWORD}@127.0.0.1:{cache.port}/0", **given, **short)
    service.wait_until_ready()

    statuses = provoke(service)
    provoke_connections(service)
    with redis.Redis(port=cache.port, password=PASSWORD, protocol=2) as client:
        client.flushall()
        for key in (f"p:e:{{{CANARY}}}", f"p:t:{{{CANARY}}}", "p:quarantine"):
            client.lpush(key, "x")
    provoke(service)
    for options in (
        ("--requirepass", PASSWORD, "--rename-command", "MGET", "", "--rename-command", "EVAL", ""),
        ("--requirepass", f"{PASSWORD}-changed"),
        ("--rename-command", "AUTH", ""),
    ):
        cache.change(*options)
        time.sleep(0.2)  # as the breaker needs to try
        provoke(service)
    cache.kill()
    provoke(service)
    cache.change("--requirepass", PASSWORD)
    wait_until(lambda: "the feature cache answers again" in service.log.read_text())
    assert service.end() == 0
    log = service.log.read_text()

    assert {200, 404, 405, 422, 500, 503} <= statuses
    told = [json.loads(line) for line in log.splitlines()] if form == "json" else []
    if form == "json":
        assert {line["level"] for line in told} >= {"info", "warning", "error"}
        known = {line["request_id"] for line in told if "503" in line["message"] or "a bug" in line["message"]}
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in known)
        assert len(known) > 20
    for line in (
        "model broken: refused",
        "POST /v1/score: a bug",
        "POST /v1/score/batch: a bug",
        "DELETE /v1/visitors/{visitor_id}: a bug",
        "POST /v1/events: 503: ",
        "POST /v2/models/{name}/infer: 503: model broken was refused",
        "KeyError",
        "the feature cache refuses to read (ERR unknown command 'MGET')",
        "the feature cache refuses (ERR unknown command 'EVAL')",
        "AuthenticationError",
        "ConnectionRefusedError",
        "the feature cache does not answer",
        "refused events are not kept",
        "Invalid HTTP request received",
        "Unsupported upgrade request",
        "Fatal error",
        "Header format invalid",
    ):
        assert line in log, line
    assert "Exception in ASGI application" not in log  # each bug is told once
    assert CANARY not in log
    assert PASSWORD not in log
    names = {span.name for span in collector.spans}
    assert {"POST /v1/score", "POST /v1/events", "GET /v1/visitors/{visitor_id}", "store", "GET", "HTTP"} <= names
    assert not any(CANARY.encode() in body or PASSWORD.encode() in body for body in collector.bodies)


def test_settings_of_the_log_are_held_to_what_there_is() -> None:
    for given in ({"log_format": "xml"}, {"log_level": "loud"}):
        with pytest.raises(Exception, match="PROPENSITY_LOG_.*(text|debug)"):
            load(**given)
