"""Every metric of the service, how what is counted often reaches the client library, and the timer of requests.

With PROMETHEUS_MULTIPROC_DIR set before the start, `exposition` sums over all processes that share the directory.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.bundle import Bundle
from service.logs import method_of, route_of

# The time of each series' creation doubles what is scraped, and nothing here needs it.
disable_created_metrics()  # type: ignore[no-untyped-call]

_REQUEST_BUCKETS: Final = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
_STAGE_BUCKETS: Final = (0.00005, 0.0001, *_REQUEST_BUCKETS)
# Seconds to 90 days. What is not above 0 comes from the future.
_AGE_BUCKETS: Final = (
    *(0.0, 0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0),
    *(86_400.0, 3 * 86_400.0, 7 * 86_400.0, 30 * 86_400.0, 90 * 86_400.0),
)


class Histogram(prometheus_client.Histogram):
    """A histogram that takes many observations at once, for which the client library has no call."""

    def observe_all(self, values: npt.ArrayLike) -> None:
        """The same as `observe` of each of float[n], none of which may be NaN."""
        places = np.searchsorted(self._upper_bounds, values, "left")
        for place, times in enumerate(np.bincount(places).tolist()):
            if times:
                self._buckets[place].inc(times)
        self._sum.inc(float(np.sum(values)))


REQUEST_SECONDS: Final = Histogram(
    "propensity_request_seconds",
    "Seconds from the first byte of a request's head to the last of its answer.",
    ["route", "method", "status"],
    buckets=_REQUEST_BUCKETS,
)
LATENCY_OBJECTIVE: Final = Gauge(
    "propensity_latency_objective_seconds",
    "The tighter objective for the time of a score, as the setting latency_objective_ms says.",
    multiprocess_mode="livemax",
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
REDIS_SECONDS: Final = Histogram(
    "propensity_redis_seconds",
    "Seconds of one round trip to the feature cache: read for scores, or write of events.",
    ["operation"],
    buckets=_STAGE_BUCKETS,
)
for _operation in ("read", "write"):
    REDIS_SECONDS.labels(_operation)
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
LIVE_SCORES: Final = Counter(
    "propensity_live_scores_total", "Scores for the propensity database: written, or dropped.", ["outcome"]
)
for _outcome in ("written", "dropped"):
    LIVE_SCORES.labels(_outcome)
RANKED_VISITORS: Final = Gauge(
    "propensity_ranked_visitors",
    "Visitors of whom the propensity database has a score, as counted once a minute.",
    ["model"],
    multiprocess_mode="livemostrecent",
)
AUDIENCE_MEMBERS: Final = Gauge(
    "propensity_audience_members",
    "Members of an audience, as counted once a minute.",
    ["audience"],
    multiprocess_mode="livemostrecent",
)
AUDIENCE_DESCRIBED: Final = Gauge(
    "propensity_audience_described_timestamp_seconds",
    "When an audience was refreshed last, whether its members changed or not.",
    ["audience"],
    multiprocess_mode="livemostrecent",
)
WORKER_RESTARTS: Final = Counter("propensity_worker_restarts_total", "Workers that ended unasked and were replaced.")
EVENTS: Final = Counter("propensity_events_total", "Events received: accepted, ignored, or refused.", ["outcome"])
for _outcome in ("accepted", "ignored", "refused"):
    EVENTS.labels(_outcome)
EVENTS_REFUSED: Final = Counter("propensity_events_refused_total", "Events refused, by reason.", ["reason"])
for _reason in ("visitor", "type", "shape", "timestamp", "future", "event", "size", "unfit"):
    EVENTS_REFUSED.labels(_reason)
SAID: Final = Counter(
    "propensity_identity_total",
    "What events said of persons (email, phone, consent): kept, malformed, no_region; and ids that are an address.",
    ["said", "outcome"],
)
for _said, _outcomes in {
    "email": ("kept", "malformed"),
    "phone": ("kept", "malformed", "no_region"),
    "consent": ("kept", "malformed"),
    "id": ("address",),
}.items():
    for _outcome in _outcomes:
        SAID.labels(_said, _outcome)
JOINS: Final = Counter(
    "propensity_joins_total",
    "Logins of anonymous visitors: joined, known already, or refused since one of the two cannot be joined.",
    ["outcome"],
)
for _outcome in ("joined", "known", "refused"):
    JOINS.labels(_outcome)
EVENTS_BY_KIND: Final = Counter(
    "propensity_events_by_kind_total",
    "Sound events by their kind in the catalogue; unknown where no model knows their name.",
    ["kind"],
)
EVENT_PROPERTIES: Final = Counter(
    "propensity_event_properties_total",
    "Events of a kind whose property that the catalogue names was present, or missing.",
    ["kind", "property", "state"],
)
EVENT_LAG: Final = Histogram(
    "propensity_event_lag_seconds",
    "Seconds from the timestamp of an accepted event to its receipt; up to 0 are those from the future.",
    buckets=_AGE_BUCKETS,
)
LAST_EVENT_AGE: Final = Histogram(
    "propensity_last_event_age_seconds",
    "Age of the newest event of a scored visitor; visitors without events are not in it.",
    ["model"],
    buckets=_AGE_BUCKETS,
)
SCORES_CAPPED: Final = Counter(
    "propensity_scores_capped_total", "Scores of visitors who have as many events as are read at most.", ["model"]
)
SCORES_WITHOUT_HISTORY: Final = Counter(
    "propensity_scores_without_history_total", "Scores of visitors without events, degraded ones apart.", ["model"]
)
EARLIER_EVENTS: Final = Counter(
    "propensity_earlier_events_total",
    "Events of scored visitors in the half of a window before each score, the newest left out.",
    ["model", "version", "window"],
)
FEATURE_BINS: Final = Counter(
    "propensity_feature_bin_total",
    "Scored values of a feature in a bin of the reference; under (score) the scores themselves.",
    ["model", "version", "feature", "bin"],
)
REFERENCE_SHARE: Final = Gauge(
    "propensity_reference_share",
    "Share of a bin in the population that training saw last.",
    ["model", "version", "feature", "bin"],
    multiprocess_mode="livemax",
)
REFERENCE_ROWS: Final = Gauge(
    "propensity_reference_rows",
    "Independent rows that tell as much as the reference shares; 0 where the bundle does not say.",
    ["model", "version", "feature"],
    multiprocess_mode="livemax",
)
DRIFT_CRITICAL: Final = Gauge(
    "propensity_drift_critical",
    "What rows times PSI of a feature stays below by chance, with all features in mind.",
    ["model", "version", "feature"],
    multiprocess_mode="livemax",
)
REFERENCE_SEGMENT_SHARE: Final = Gauge(
    "propensity_reference_segment_share",
    "Share of a segment that the cut-offs give on the scores of the reference.",
    ["model", "version", "segment"],
    multiprocess_mode="livemax",
)
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
MODEL_LOADED: Final = Gauge(
    "propensity_model_loaded_timestamp_seconds",
    "When this version was loaded.",
    ["model", "version"],
    multiprocess_mode="livemax",
)
MODEL_CREATED: Final = Gauge(
    "propensity_model_created_timestamp_seconds",
    "When this version was trained.",
    ["model", "version"],
    multiprocess_mode="livemax",
)
MODEL_LOAD_SECONDS: Final = Gauge(
    "propensity_model_load_seconds",
    "Seconds that loading and verifying this version took.",
    ["model", "version"],
    multiprocess_mode="livemax",
)
BUILD_INFO: Final = Gauge(
    "propensity_build_info", "1 for the version that runs.", ["version", "python"], multiprocess_mode="livemax"
)


class Held:
    """Numbers for a counter or a histogram, which get them together, by `tell`.

    To keep one costs 0.03 us. The client library takes 0.5 us and, with several processes, 1 to 2 us for each, and
    a score has ten of them. For the event loop's thread alone; what a killed process has kept since is lost.
    """

    def __init__(self, metric: Counter | Histogram) -> None:
        self._metric = metric
        self._numbers: list[float] = []
        self.add = self._numbers.append
        _HELD.append(self)

    def tell(self) -> None:
        """Give them to the metric."""
        if not self._numbers:
            return
        numbers = self._numbers.copy()
        self._numbers.clear()
        if isinstance(self._metric, Counter):
            self._metric.inc(sum(numbers))
        else:
            self._metric.observe_all(numbers)


_HELD: Final[list[Held]] = []


def tell() -> None:
    """Give what is held of every metric to the client library."""
    for held in _HELD:
        held.tell()


@cache
def batch_visitors() -> Held:
    """For the number of visitors that were scored together."""
    return Held(BATCH_VISITORS)


@cache
def said(what: str, outcome: str) -> Held:
    """For what events said of persons, and what became of it."""
    return Held(SAID.labels(what, outcome))


@cache
def express(route: str, status: int) -> Held:
    """For the seconds of requests that do not pass the middleware."""
    return Held(REQUEST_SECONDS.labels(route, "POST", status))


# A rate needs the 0 before the first time, of failures most of all.
for _route in ("/v1/score", "/v1/events"):
    for _status in (200, 429, 500, 503):
        REQUEST_SECONDS.labels(_route, "POST", _status)


@cache
def scores(model: str, version: str, segment: str) -> Held:
    """For scores of one segment."""
    return Held(SCORES.labels(model, version, segment))


@cache
def stage(name: str) -> Held:
    """For the seconds of one stage of scoring."""
    return Held(STAGE_SECONDS.labels(name))


@cache
def store_reads(outcome: str) -> Held:
    """For reads of the feature cache that ended so."""
    return Held(STORE_READS.labels(outcome))


@cache
def redis_seconds(operation: str) -> Held:
    """For the seconds of round trips to the feature cache."""
    return Held(REDIS_SECONDS.labels(operation))


@cache
def degraded(reason: str) -> Held:
    """For scores without something."""
    return Held(DEGRADED.labels(reason))


@cache
def shed(reason: str) -> Held:
    """For requests that were one too many."""
    return Held(SHED.labels(reason))


@cache
def events(outcome: str) -> Held:
    """For events of which that became."""
    return Held(EVENTS.labels(outcome))


@cache
def events_refused(reason: str) -> Held:
    """For events refused for a reason."""
    return Held(EVENTS_REFUSED.labels(reason))


@cache
def events_by_kind(kind: str) -> Held:
    """For sound events of a kind."""
    return Held(EVENTS_BY_KIND.labels(kind))


@cache
def live_scores(outcome: str) -> Held:
    """For scores that were written to the propensity database, or dropped."""
    return Held(LIVE_SCORES.labels(outcome))


@cache
def score_log(outcome: str) -> Counter:
    """The counter of served scores that were written to the stream, or dropped."""
    return SCORE_LOG.labels(outcome)


def set_service(version: str, latency_objective_ms: int) -> None:
    """Say which version of the service runs, and within what time its scores should be answered."""
    LATENCY_OBJECTIVE.set(latency_objective_ms / 1000)
    BUILD_INFO.labels(version, platform.python_version()).set(1)


def set_models(loaded: int, refused: int) -> None:
    """Say how many models are served, and how many were refused."""
    MODELS.labels("loaded").set(loaded)
    MODELS.labels("refused").set(refused)


def set_model(bundle: Bundle, load_s: float) -> None:
    """Say that a version is served that took so long to load, and what is known of it."""
    labels = bundle.name, bundle.version
    MODEL_INFO.labels(*labels).set(1)
    MODEL_LOADED.labels(*labels).set(time.time())
    MODEL_LOAD_SECONDS.labels(*labels).set(load_s)
    created = bundle.manifest.created
    if created is not None:
        MODEL_CREATED.labels(*labels).set(created.timestamp())
    for segment, share in bundle.segment_shares.items():
        REFERENCE_SEGMENT_SHARE.labels(*labels, segment).set(share)


def set_ranked(model: str, visitors: int) -> None:
    """Say of how many visitors a model's score is kept."""
    RANKED_VISITORS.labels(model).set(visitors)


def set_audiences(known: Mapping[str, tuple[int, int]]) -> None:
    """Say how many members each audience has, and when it was described last; those that are gone have none."""
    for name in _AUDIENCES - known.keys():
        # A series cannot be taken out of the files of several processes.
        AUDIENCE_MEMBERS.labels(name).set(0)
    for name, (size, described_ms) in known.items():
        AUDIENCE_MEMBERS.labels(name).set(size)
        AUDIENCE_DESCRIBED.labels(name).set(described_ms / 1000)
    _AUDIENCES.update(known)


_AUDIENCES: Final = set[str]()


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
            REQUEST_SECONDS.labels(route_of(scope), method_of(scope), status).observe(time.perf_counter() - started)
