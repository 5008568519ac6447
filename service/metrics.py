"""Every metric of the service, and the middleware that times requests.

With PROMETHEUS_MULTIPROC_DIR set before the start, `exposition` sums over all processes that share the directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from typing import Final

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The time of each series' creation doubles what is scraped, and nothing here needs it.
disable_created_metrics()  # type: ignore[no-untyped-call]

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_BUCKETS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05),
    *(0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_STAGE_BUCKETS: Final = (
    *(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)

REQUEST_SECONDS: Final = Histogram(
    "propensity_request_seconds",
    "Seconds from the first byte of a request's head to the last of its answer.",
    ["route", "method", "status"],
    buckets=_REQUEST_BUCKETS,
)
STAGE_SECONDS: Final = Histogram(
    "propensity_stage_seconds",
    "Seconds of one stage of scoring (store, features, model), for all visitors of a call together.",
    ["stage"],
    buckets=_STAGE_BUCKETS,
)
SCORES: Final = Counter(
    "propensity_scores_total",
    "Scores given; without a model, model and version are empty.",
    ["model", "version", "segment"],
)
DEGRADED: Final = Counter(
    "propensity_degraded_total", "Scores given without something that was missing (store, model).", ["reason"]
)
for _reason in ("store", "model"):  # a rate needs the 0 before the first time
    DEGRADED.labels(_reason)
BATCH_VISITORS: Final = Histogram(
    "propensity_batch_visitors",
    "Visitors that were read and scored together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)
STORE_READS: Final = Counter(
    "propensity_store_reads_total",
    "Reads of the feature cache for scores: ok, late, failed, or skipped since the breaker is open.",
    ["outcome"],
)
for _outcome in ("ok", "late", "failed", "skipped"):
    STORE_READS.labels(_outcome)
BREAKER_STATE: Final = Gauge(
    "propensity_breaker_state",
    "Workers whose circuit breaker of the feature cache is closed, open, or half_open.",
    ["state"],
    multiprocess_mode="livesum",
)
IN_FLIGHT: Final = Gauge(
    "propensity_in_flight",
    "Requests that are being answered, scores of one visitor apart.",
    multiprocess_mode="livesum",
)
QUEUE_LENGTH: Final = Gauge(
    "propensity_queue_length", "Scores that wait for their turn or for the feature cache.", multiprocess_mode="livesum"
)
SHED: Final = Counter(
    "propensity_shed_total", "Requests answered 429, since the queue or the requests in_flight were full.", ["reason"]
)
for _reason in ("queue", "in_flight"):
    SHED.labels(_reason)
SCORE_LOG: Final = Counter(
    "propensity_score_log_total", "Served scores for the stream of scores: written, or dropped.", ["outcome"]
)
for _outcome in ("written", "dropped"):
    SCORE_LOG.labels(_outcome)
WORKER_RESTARTS: Final = Counter("propensity_worker_restarts_total", "Workers that ended unasked and were replaced.")
EVENTS: Final = Counter("propensity_events_total", "Events received: accepted, ignored, or refused.", ["outcome"])
BROKEN_RECORDS: Final = Counter(
    "propensity_broken_records_total", "Stored records whose check is wrong; they were skipped."
)
MODELS: Final = Gauge(
    "propensity_models", "Models in the artifacts directory, loaded or refused.", ["state"], multiprocess_mode="livemax"
)
MODEL_INFO: Final = Gauge(
    "propensity_model_info",
    "1 for the version of each model that is served.",
    ["model", "version"],
    multiprocess_mode="livemax",
)


def set_models(loaded: Mapping[str, str], refused: int) -> None:
    """Say which version of which model is served, and how many models were refused."""
    MODELS.labels("loaded").set(len(loaded))
    MODELS.labels("refused").set(refused)
    for name, version in loaded.items():
        MODEL_INFO.labels(name, version).set(1)


@cache
def scores(model: str, version: str, segment: str) -> Counter:
    """The counter of scores of one segment; looked up once, since labels() costs as much as a feature."""
    return SCORES.labels(model, version, segment)


@cache
def stage(name: str) -> Histogram:
    """The histogram of one stage of scoring."""
    return STAGE_SECONDS.labels(name)


@cache
def store_reads(outcome: str) -> Counter:
    """The counter of reads of the feature cache that ended so."""
    return STORE_READS.labels(outcome)


@cache
def degraded(reason: str) -> Counter:
    """The counter of scores without something."""
    return DEGRADED.labels(reason)


@cache
def shed(reason: str) -> Counter:
    """The counter of requests that were one too many."""
    return SHED.labels(reason)


@cache
def score_log(outcome: str) -> Counter:
    """The counter of served scores that were written to the stream, or dropped."""
    return SCORE_LOG.labels(outcome)


def set_breaker_state(state: str) -> None:
    """Say in which state the breaker of this worker is."""
    for known in ("closed", "open", "half_open"):
        BREAKER_STATE.labels(known).set(known == state)


def exposition() -> bytes:
    """All metrics in Prometheus' text format; over several processes that takes 10 ms and more, so not in the loop."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def retire(name: str) -> None:
    """Take away what is true of a process only while it lives, when it has ended; what it counted stays."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(name)  # type: ignore[no-untyped-call]


class RequestTimer:
    """ASGI middleware that times every HTTP request, failed ones too, under the template of its route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            route = getattr(scope.get("route"), "path_format", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            REQUEST_SECONDS.labels(route, method, status).observe(time.perf_counter() - started)
