"""Traces: what the spans of each route are, where they belong, and that no collector can hold up the service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service import tracing
from service.app import create_app
from service.core.errors import PropensityError
from service.embedded import EmbeddedServer
from service.settings import Settings
from service.store import Store
from service.tracing import Tracing
from tests.conftest import MakeSettings, StartService, free_port, wait_until
from tests.service.collector import Collector, collecting

ROOT = Path(__file__).parents[2]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
STAGES = ["store", "features", "model"]
EVENT = {"event": "Product Viewed", "userId": "a", "messageId": "1"}
ROUTED = {"Content-Type": "application/json; by=route"}
Spans = dict[str, list[ReadableSpan]]


@pytest.fixture(autouse=True)
def without_variables_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced_app(memory: InMemorySpanExporter, settings: Settings) -> TestClient:
    """The application as shipped, whose spans are kept in this process."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return TestClient(create_app(settings, traces=Tracing(provider, "1")), raise_server_exceptions=False)


@pytest.fixture
def traced(memory: InMemorySpanExporter, make_settings: MakeSettings, embedded_server: EmbeddedServer) -> TestClient:
    return traced_app(memory, make_settings(redis_url=embedded_server.url))


def finished(memory: InMemorySpanExporter) -> tuple[ReadableSpan | None, list[ReadableSpan]]:
    """The span of the one request, and those below it in the order of their beginning."""
    spans = memory.get_finished_spans()
    memory.clear()
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    if not spans:
        return None, []
    (request,) = requests
    children = sorted((span for span in spans if span is not request), key=lambda span: span.start_time or 0)
    for child in children:
        assert child.parent == request.context
        assert (request.start_time or 0) <= (child.start_time or 0) <= (child.end_time or 0) <= (request.end_time or 0)
    return request, children


FEATURES: dict[str, Any] = {"name": "features", "datatype": "FP32", "shape": [1, 10], "data": [0] * 10}
VISITORS: dict[str, Any] = {"name": "visitor_id", "datatype": "BYTES", "shape": [1], "data": ["a"]}


@pytest.mark.parametrize(
    ("method", "path", "body", "name", "status", "stages"),
    [
        ("POST", "/v1/score", {"visitor_id": "a"}, "POST /v1/score", 200, STAGES),
        ("POST", "/v1/score", {"visitor_id": 1}, "POST /v1/score", 422, []),
        ("POST", "/v1/score/batch", {"visitors": [{"visitor_id": "a"}] * 120}, None, 200, STAGES),
        ("POST", "/v1/events", EVENT, None, 200, ["store"]),
        ("POST", "/v1/events", {"batch": [EVENT, {"event": "x"}]}, None, 200, ["store"]),
        ("GET", "/v1/visitors/a", None, "GET /v1/visitors/{visitor_id}", 200, ["store"]),
        ("DELETE", "/v1/visitors/a", None, "DELETE /v1/visitors/{visitor_id}", 204, ["store"]),
        ("GET", "/v1/models", None, None, 200, []),
        ("POST", "/v2/models/shop/infer", {"inputs": [FEATURES]}, "POST /v2/models/{name}/infer", 200, ["model"]),
        ("POST", "/v2/models/shop/infer", {"inputs": [VISITORS]}, "POST /v2/models/{name}/infer", 200, STAGES),
        ("GET", "/nothing", None, "GET", 404, []),
        ("BREW", "/v1/score", None, "HTTP /v1/score", 405, []),
        ("GET", "/livez", None, "", 200, []),
        ("GET", "/metrics", None, "", 200, []),
    ],
)
def test_a_request_has_one_span_named_by_its_route_and_its_stages_below(
    traced: TestClient,
    memory: InMemorySpanExporter,
    method: str,
    path: str,
    body: object,
    name: str | None,
    status: int,
    stages: list[str],
) -> None:
    with traced as client:
        assert client.request(method, path, json=body, headers={"X-Request-ID": "a"}).status_code == status
    request, children = finished(memory)
    if name == "":
        assert request is None
        return
    assert request is not None
    assert request.name == (name or f"{method} {path}")
    asked, _, route = request.name.partition(" ")
    told = dict(request.attributes or {})
    assert told.pop("http.request.method") == (asked if asked != "HTTP" else "_OTHER")
    assert told.pop("http.response.status_code") == status
    assert told.pop("http.route", "") == route
    assert told.pop("url.scheme") == "http"
    assert request.status.status_code is StatusCode.UNSET
    if stages == STAGES:
        scored = {"propensity.model": "shop", "propensity.version": "1", "propensity.degraded": ()}
        assert {key: told.pop(key) for key in scored} == scored
    assert told == {}
    groups = 1 if "batch" not in path else max(1, len(children) // len(STAGES))
    assert [child.name for child in children] == stages * groups
    assert [child.kind for child in children if child.name == "store"] == [SpanKind.CLIENT] * stages.count("store") * (
        groups
    )


def test_a_request_belongs_to_the_trace_that_its_client_names(traced: TestClient, memory: InMemorySpanExporter) -> None:
    with traced as client:
        client.get("/v1/models", headers={"traceparent": PARENT, "tracestate": "shop=1"})
        request, _ = finished(memory)
        assert request is not None
        assert request.context is not None
        assert request.parent is not None
        assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
        assert request.context.trace_state.to_header() == "shop=1"
        for given in (PARENT[:-2] + "00", None, "00-nothing", "00-" + "0" * 32 + PARENT[35:]):
            client.get("/v1/models", headers={"traceparent": given} if given else {})
            request, _ = finished(memory)
            # A parent that is not sampled has children that are not; what is no parent begins a trace.
            assert (request is None) == (given == PARENT[:-2] + "00")
            assert request is None or request.parent is None


def test_a_bug_is_an_error_of_its_type_and_none_of_its_words_are_told(
    traced: TestClient, memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Store, visitor_ids: list[str]) -> None:
        raise KeyError(visitor_ids)

    monkeypatch.setattr(Store, "read", fail)
    with traced as client:
        assert client.get("/v1/visitors/secret").status_code == 500
    request, [store] = finished(memory)
    assert request is not None
    for span in (request, store):
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "KeyError"
        assert "secret" not in span.to_json()
        assert list(span.events) == []
    assert (request.attributes or {})["http.response.status_code"] == 500


def test_without_a_feature_cache_the_span_of_the_store_is_an_error(
    memory: InMemorySpanExporter, make_settings: MakeSettings
) -> None:
    with traced_app(memory, make_settings(redis_url=f"redis://127.0.0.1:{free_port()}/0")) as client:
        assert client.post("/v1/score", json={"visitor_id": "a"}).status_code == 200
        request, [store, *others] = finished(memory)
        assert request is not None
        assert (request.attributes or {})["propensity.degraded"] == ("store",)
        assert request.status.status_code is StatusCode.UNSET  # the visitor got a score
        assert store.status.status_code is StatusCode.ERROR
        assert [span.status.status_code for span in others] == [StatusCode.UNSET] * 2
        assert client.post("/v1/events", json=EVENT).status_code == 503
        request, [store] = finished(memory)
        assert request is not None
        assert (request.attributes or {})["error.type"] == "503"
        assert (store.attributes or {})["error.type"] == "StoreError"


# --- the service as a process, and a collector ---


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


def test_spans_of_the_running_service_reach_a_collector_at_the_latest_when_it_ends(
    collector: Collector,
    start_service: StartService,
    artifacts: Path,
    embedded_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    service = start_service(redis_url=embedded_server.url, artifacts=artifacts)
    service.wait_until_ready()
    before_ns = time.time_ns()
    with httpx2.Client(base_url=service.url) as client:
        for headers in ({"traceparent": PARENT}, ROUTED | {"traceparent": PARENT}, {}):
            content = (
                {"json": {"visitor_id": "a"}} if "Content-Type" not in headers else {"content": '{"visitor_id":"a"}'}
            )
            assert client.post("/v1/score", headers=headers, **content).status_code == 200
        assert client.post("/v1/events", json=EVENT).status_code == 200
    assert collector.spans == []
    assert service.end() == 0
    after_ns = time.time_ns()
    assert collector.paths == {"/v1/traces"}
    requests = [span for span in collector.spans if span.kind == 2]
    assert sorted(span.name for span in requests) == ["POST /v1/events"] + ["POST /v1/score"] * 3
    assert len(collector.spans) == 4 + 3 * len(STAGES) + 1
    within = [span for span in requests if span.trace_id == TRACE_ID]
    assert [span.parent_id for span in within] == [PARENT_ID] * 2
    assert len({span.trace_id for span in requests}) == 3
    scored = {"propensity.model": "shop", "propensity.version": "1", "propensity.degraded": []}
    for span in requests:
        told = {"http.request.method": "POST", "http.route": span.name.partition(" ")[2], "url.scheme": "http"}
        is_score = span.name == "POST /v1/score"
        assert span.attributes == told | {"http.response.status_code": 200} | (scored if is_score else {})
        children = collector.below(span)
        assert [child.name for child in children] == (STAGES if is_score else ["store"])
        moments = [moment for child in children for moment in (child.start_ns, child.end_ns)]
        assert [before_ns, span.start_ns, *moments, span.end_ns, after_ns] == sorted(
            [before_ns, span.start_ns, *moments, span.end_ns, after_ns]
        )
        assert all(child.start_ns < child.end_ns for child in (span, *children))
        resource = {key: span.resource[key] for key in ("service.name", "process.pid", "deployment.environment.name")}
        assert resource == {
            "service.name": "propensity",
            "process.pid": service.process.pid,
            "deployment.environment.name": "test",
        }


def test_every_worker_exports_and_the_sampler_of_the_environment_decides(
    collector: Collector,
    start_service: StartService,
    artifacts: Path,
    embedded_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.endpoint}/elsewhere")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop-scores")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    service = start_service(redis_url=embedded_server.url, artifacts=artifacts, workers=2)
    service.wait_until_ready()

    def pids() -> set[int]:
        for headers in ({}, {"traceparent": PARENT}):
            assert client.post("/v1/score", json={"visitor_id": "a"}, headers=headers).status_code == 200
        return {span.resource["process.pid"] for span in collector.spans}

    # A connection for each request: the kernel spreads them over the workers.
    with httpx2.Client(base_url=service.url, limits=httpx2.Limits(max_keepalive_connections=0)) as client:
        wait_until(lambda: len(pids()) == 2)
    assert {span.trace_id for span in collector.spans} == {TRACE_ID}
    assert {span.resource["service.name"] for span in collector.spans} == {"shop-scores"}
    assert collector.paths == {"/elsewhere"}
    assert service.end() == 0


@pytest.mark.alone
@pytest.mark.parametrize("is_listening", [True, False])
def test_a_collector_that_hangs_or_is_gone_costs_no_request_and_hardly_delays_the_end(
    start_service: StartService,
    artifacts: Path,
    embedded_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    is_listening: bool,
) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if is_listening:
            hole.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        for name, value in {"SCHEDULE_DELAY": "20", "MAX_QUEUE_SIZE": "64", "MAX_EXPORT_BATCH_SIZE": "16"}.items():
            monkeypatch.setenv(f"OTEL_BSP_{name}", value)
        service = start_service(redis_url=embedded_server.url, artifacts=artifacts, log_format="json")
        service.wait_until_ready()
        took_s = []
        with httpx2.Client(base_url=service.url) as client:
            for _ in range(300):
                started = time.monotonic()
                assert client.post("/v1/score", json={"visitor_id": "a"}).json()["degraded"] == []
                took_s.append(time.monotonic() - started)
        # An export that one of them waited for would take ten seconds, a retry one.
        took_s.sort()
        assert took_s[-3] < 0.8, took_s[-5:]  # a busy machine may be that late once or twice
        assert took_s[len(took_s) // 2] < 0.05
        told_at = time.monotonic()
        assert service.end() == 0
        assert time.monotonic() - told_at < 2.5
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    told = [line["message"] for line in lines if line["logger"].startswith("opentelemetry.")]
    assert 1 <= len(told) <= 6, told  # 1,200 spans found no room
    assert any("Queue full" in message for message in told)


# --- whether there is tracing at all ---


@pytest.mark.parametrize(
    ("given", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_an_endpoint_in_the_environment_turns_it_on(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], is_wanted: bool
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    started = tracing.start("1")
    assert (started is not None) == is_wanted
    if started is not None:
        started.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[x"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no URL"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; write http/protobuf",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_BSP_MAX_QUEUE_SIZE": "5"},
            "max_export_batch_size must be less",
        ),
    ],
)
def test_what_cannot_be_done_is_told(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], told: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PropensityError, match=told):
        tracing.start("1")


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path, artifacts: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.sdk'] = None")
    command = [sys.executable, "-P", "-m", "cli.main", "serve", "--workers", "2", "--port", str(free_port())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT))),
        "PROPENSITY_ARTIFACTS": str(artifacts),
        "PROPENSITY_REDIS_URL": "redis://127.0.0.1:1/0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
    }
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("propensity: OTEL_EXPORTER_OTLP_ENDPOINT is set, and")
    assert "pip install 'propensity[tracing]'" in ended.stderr


def test_as_long_as_it_is_off_nothing_that_traces_is_imported() -> None:
    # redis-py imports the SDK's metrics wherever they are installed.
    code = (
        "import sys, service.app; from service import tracing; assert tracing.start('1') is None; print(*sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    imported = ended.stdout.split()
    assert "service.tracing" in imported
    assert [name for name in imported if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))] == []
