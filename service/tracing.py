"""Traces: a span for each request, with its stages below it, sent to an OpenTelemetry collector by OTLP over HTTP.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) is set; that, and every other OTEL_* variable, means
here what it means to the SDK, which is imported only then. A span has the template of its route and never a path, an
id, or the words of an error. FastAPI's own spans have the path, and with it ids of visitors, so they stay off.

Spans of scores are made when the answer has been sent, from the times that were taken anyway.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import PropensityError
from service.logs import method_of, route_of
from service.scoring import Score, Timing

if TYPE_CHECKING:  # installed with the extra `tracing`
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Stage = Literal["store", "features", "model"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)

# Headers that say which trace a request belongs to: https://www.w3.org/TR/trace-context-1/
TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
# The semantic conventions that names and attributes follow: https://opentelemetry.io/docs/specs/semconv/http/http-spans/
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.44.0"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# How long the end of the service waits for the last spans to be taken.
_FLUSH_S: Final = 1.0
# Probes and scrapes come every few seconds, and nobody asks why one took long.
_UNTRACED: Final = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
# What the conventions call a method that is none of theirs, as an attribute and in a name.
_METHODS: Final = {"other": "_OTHER"}
_METHOD_NAMES: Final = {"other": "HTTP"}
_REDIS: Final = {"db.system.name": "redis"}
_extract: Final = TraceContextTextMapPropagator().extract


class Marks(NamedTuple):
    """What a client's headers say about one request alone: its id, and where it belongs in a trace."""

    request_id: bytes | None = None
    traceparent: bytes | None = None
    tracestate: bytes | None = None


def is_wanted() -> bool:
    """Whether the environment names a collector for traces."""
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    is_elsewhere = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("", "otlp")
    return not is_disabled and not is_elsewhere and any(os.environ.get(name) for name in _ENDPOINTS)


def start(version: str) -> Tracing | None:
    """Tracing as the environment wants it, None if it does not. Raises PropensityError for what it cannot do."""
    if not is_wanted():
        return None
    endpoint_name, endpoint = _endpoint()
    if not _is_url(endpoint):
        raise PropensityError(f"{endpoint_name} is no URL of a collector; write one as http://127.0.0.1:4318")
    protocol_name, protocol = next(
        ((name, value) for name in _PROTOCOLS if (value := os.environ.get(name))), ("", "http/protobuf")
    )
    if protocol != "http/protobuf":
        raise PropensityError(
            f"{protocol_name} is {protocol!r}; write http/protobuf, and give the collector's port for it (4318)"
        )
    prepare()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(_provider(OTLPSpanExporter(), version), version)


def prepare() -> None:
    """Import what `start` needs, if traces are wanted. Raises PropensityError where that is not installed."""
    if not is_wanted():
        return
    try:
        for name in ("opentelemetry.sdk.trace.export", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
            import_module(name)
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{_endpoint()[0]} is set, and {error.name} is not installed; "
            "install it with pip install 'propensity[tracing]', or set OTEL_SDK_DISABLED=true"
        ) from None


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _endpoint() -> tuple[str, str]:
    """The variable that names the collector, and what it says."""
    return next((name, value) for name in _ENDPOINTS if (value := os.environ.get(name)))


def _provider(exporter: SpanExporter, version: str) -> TracerProvider:
    """Spans in a queue with a bound, which a thread sends in batches; what does not fit is dropped."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": version, "process.pid": os.getpid()})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "propensity"}))
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError as error:
        raise PropensityError(f"OTEL_*: {error}") from None
    return provider


class _Parent(NamedTuple):
    """The span of the request that is being answered, and what makes spans below it."""

    tracer: trace.Tracer
    span: Span


_request: ContextVar[_Parent | None] = ContextVar("traced request", default=None)


class Tracing:
    """Makes the spans of one process. `close` sends the last ones."""

    def __init__(self, provider: TracerProvider, version: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("propensity", version, _SCHEMA)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it within a second."""
        # A thread that nobody waits for when the process exits: an export that hangs has ten seconds, and tries again.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)

    def add_score(self, route: str, seconds: float, score: Score, timing: Timing, marks: Marks | None) -> None:
        """The spans of a score that has just been sent, `seconds` after it was asked for."""
        end_ns = time.time_ns()
        start_ns = end_ns - round(seconds * 1e9)
        span = self._start("POST", route, marks, start_ns)
        if span.is_recording():
            _add_stages(_Parent(self._tracer, span), start_ns, timing, score)
            _end(span, 200, end_ns)

    def add_refusal(self, route: str, status: int, marks: Marks | None) -> None:
        """The span of a request that has been refused at once."""
        now_ns = time.time_ns()
        _end(self._start("POST", route, marks, now_ns), status, now_ns)

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have `app` answer a request, with a span around it."""
        status, error_type = 500, None

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = method_of(scope)
        span = self._start(method, None, _marks_of(scope), time.time_ns())
        token = _request.set(_Parent(self._tracer, span))
        try:
            await app(scope, receive, note_status)
        except Exception as error:
            error_type = type(error).__qualname__
            raise
        finally:
            _request.reset(token)
            if (route := route_of(scope)) != "none":
                span.update_name(f"{_METHOD_NAMES.get(method, method)} {route}")
                span.set_attribute("http.route", route)
            _end(span, status, time.time_ns(), error_type)

    def _start(self, method: str, route: str | None, marks: Marks | None, start_ns: int) -> Span:
        name = _METHOD_NAMES.get(method, method)
        attributes = {"http.request.method": _METHODS.get(method, method), "url.scheme": "http"}
        if route is not None:
            name, attributes["http.route"] = f"{name} {route}", route
        return self._tracer.start_span(name, _context(marks), SpanKind.SERVER, attributes, start_time=start_ns)


class Traced:
    """ASGI middleware: a span for every request but probes, if this process traces."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracing: Tracing | None = scope.get("state", {}).get("tracing")
        if tracing is None or scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self.app(scope, receive, send)
        else:
            await tracing.answer(self.app, scope, receive, send)


def add_stages(arrived: float, timing: Timing, outcome: object) -> None:
    """The stages of a score that was asked for at `arrived`, by perf_counter; nothing where no trace is made."""
    parent = _request.get()
    if parent is not None and parent.span.is_recording():
        _add_stages(parent, time.time_ns() - round((perf_counter() - arrived) * 1e9), timing, outcome)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """A span around what is done within; nothing where no trace is made."""
    parent = _request.get()
    if parent is None or not parent.span.is_recording():
        yield
        return
    span = _start_stage(parent, name, trace.set_span_in_context(parent.span, Context()), time.time_ns())
    try:
        yield
    except BaseException as error:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


def _add_stages(parent: _Parent, arrived_ns: int, timing: Timing, outcome: object) -> None:
    """A span for each stage, one after the other, from when the score had its turn."""
    is_read = True
    if isinstance(outcome, Score):
        is_read = "store" not in outcome.degraded
        told = {"model": outcome.model or "", "version": outcome.version or "", "degraded": list(outcome.degraded)}
        parent.span.set_attributes({f"propensity.{name}": value for name, value in told.items()})
    context = trace.set_span_in_context(parent.span, Context())
    start_ns = arrived_ns + round(timing.queue * 1e6)
    stages: Iterable[tuple[Stage, float]] = zip(STAGES, timing[1:], strict=True)
    for name, took_ms in stages:
        span = _start_stage(parent, name, context, start_ns)
        if name == "store" and not is_read:
            span.set_status(StatusCode.ERROR)
        start_ns += round(took_ms * 1e6)
        span.end(start_ns)


def _start_stage(parent: _Parent, name: Stage, context: Context, start_ns: int) -> Span:
    kind, attributes = (SpanKind.CLIENT, _REDIS) if name == "store" else (SpanKind.INTERNAL, None)
    return parent.tracer.start_span(name, context, kind, attributes, start_time=start_ns)


def _context(marks: Marks | None) -> Context:
    """What the headers of a client say; without any a new trace begins, whatever runs around this."""
    if marks is None or marks.traceparent is None:
        return Context()
    carrier = {"traceparent": marks.traceparent.decode("latin-1")}
    if marks.tracestate is not None:
        carrier["tracestate"] = marks.tracestate.decode("latin-1")
    return _extract(carrier, Context())


def _marks_of(scope: Scope) -> Marks:
    given = dict(scope["headers"])
    return Marks(None, given.get(TRACEPARENT), given.get(TRACESTATE))


def _end(span: Span, status: int, end_ns: int, error_type: str | None = None) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", error_type or str(status))
        span.set_status(StatusCode.ERROR)
    span.end(end_ns)
