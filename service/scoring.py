"""From histories to scores: compute the features, ask the model, decide. `service.scorer` reads the histories.

Nothing that is missing keeps a visitor from an answer: without the feature cache a visitor is scored as one without
history, without a model it is put into a segment by rules, and `degraded` says so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from service import metrics
from service.core import events, features, segments
from service.core.bundle import Bundle
from service.core.events import FLOAT32_END
from service.core.features import Plan
from service.core.segments import SEGMENTS
from service.core.spec import Feature, Request, Trait
from service.errors import InvalidRequest, Place, ServiceError, pointer
from service.history import MOST_EVENTS, History
from service.population import Histories, Population, Rows

_DAY_MS: Final = 86_400_000

Matrix = npt.NDArray[np.float32]


def unix_ms() -> int:
    """The time, in milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Whom to score, with which model (None: the default one), and what the caller knows at this moment.

    `context` is read by the request features of the spec. `features` overrides features by name: a number is the
    value that the model gets, null a missing one, and a string one of the categories of a trait or request feature.
    """

    visitor_id: str
    model: str | None = None
    context: Mapping[str, object] = field(default_factory=dict)
    features: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Score:
    """The answer for one visitor."""

    score_id: Annotated[str, Field(description="Unique id of this answer, a UUID.")]
    visitor_id: Annotated[str, Field(description="The visitor that was asked for.")]
    propensity: Annotated[float | None, Field(ge=0, le=1, description="Calibrated probability; null without a model.")]
    percentile: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            description="Percent of the scores of the week before training that are lower; null without a model.",
        ),
    ]
    segment: Annotated[str, Field(description="One of the segments.", json_schema_extra={"enum": list(SEGMENTS)})]
    model: Annotated[str | None, Field(description="Name of the model; null if none was asked for and none is loaded.")]
    version: Annotated[str | None, Field(description="Version of the model; null if it could not be asked.")]
    scored_at: Annotated[str, Field(description="The moment the score holds for, RFC 3339 in UTC with milliseconds.")]
    events: Annotated[int, Field(ge=0, description="How many of the visitor's events counted.")]
    last_event_age_s: Annotated[
        float | None, Field(ge=0, description="Seconds since the last of them; null without any.")
    ]
    degraded: Annotated[
        list[str],
        Field(
            description="What was missing: `store` (scored without history), `model` (put into a segment by rules). "
            "Empty if all was there."
        ),
    ]


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """Why one visitor of a batch has no score: something in its own request."""

    visitor_id: str | None  # None if not even that could be read
    error: ServiceError


class Timing(NamedTuple):
    """Milliseconds that a score waited for its turn, and those of each stage, which its group went through together."""

    queue: float = 0.0
    store: float = 0.0
    features: float = 0.0
    model: float = 0.0

    def header(self) -> str:
        """The value of a Server-Timing header."""
        return "queue;dur={:.2f}, store;dur={:.2f}, features;dur={:.2f}, model;dur={:.2f}".format(*self)


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests for one model, with the histories of their visitors, at one moment.

    `owners` are whom these were joined into, of each request, where they were; otherwise there are none.
    """

    requests: Sequence[ScoreRequest]
    histories: Sequence[History]
    now_ms: int
    degraded: tuple[str, ...] = ()
    owners: Sequence[str] = ()


class Scored(NamedTuple):
    """The answers of a batch in order, and how long features and model took."""

    answers: Sequence[Score | ScoreFailure]
    features_ms: float = 0.0
    model_ms: float = 0.0


class Activity(NamedTuple):
    """How many of a visitor's events count, and how old the last of them is."""

    events: int
    last_event_age_s: float | None


def iso_8601(ms: int) -> str:
    """A moment in UTC with milliseconds, as RFC 3339 writes it."""
    second, rest = divmod(ms, 1000)
    return f"{_whole_second(second)}.{rest:03}Z"


@lru_cache(maxsize=4)  # the same one for all that is scored within it
def _whole_second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).replace(tzinfo=None).isoformat()


def score_by_model(bundle: Bundle, batch: Batch, population: Population | None = None) -> Scored:
    """Score a batch by its model, and have it counted for drift unless histories are missing."""
    started = time.perf_counter()
    found = evaluate(bundle.plan, batch.histories, batch.now_ms, [request.context for request in batch.requests])
    failures = _override(bundle.plan, found.matrix, batch.requests)
    computed = time.perf_counter()
    scores = bundle.predict(found.matrix)
    propensities = scores.tolist()
    asked = time.perf_counter()
    if found.broken:
        metrics.BROKEN_RECORDS.inc(found.broken)
    at, name, version, degraded = iso_8601(batch.now_ms), bundle.name, bundle.version, list(batch.degraded)
    answers: list[Score | ScoreFailure] = [
        Score(
            score_id,
            request.visitor_id,
            float(f"{propensity:.6g}"),
            bundle.percentile(propensity),
            bundle.segment(propensity),
            name,
            version,
            at,
            count,
            age_ms / 1000 if count else None,
            degraded,
        )
        for score_id, request, propensity, count, age_ms in zip(
            _uuids(len(propensities)),
            batch.requests,
            propensities,
            found.events.tolist(),
            found.last_age_ms.tolist(),
            strict=True,
        )
    ]
    for place, failure in failures.items():
        answers[place] = failure
    _count(answers, name, version, degraded)
    if population is not None and not degraded:
        stored = [history.events for history in batch.histories]
        rows = Rows(found.matrix, scores, Histories(found.events, found.last_age_ms, stored, batch.now_ms))
        population.add(rows.without(list(failures)) if failures else rows)
    return Scored(answers, (computed - started) * 1000, (asked - computed) * 1000)


def score_by_rule(name: str | None, batch: Batch) -> Scored:
    """Put the visitors of a batch into segments by what they did lately, since there is no model."""
    degraded, at = [*batch.degraded, "model"], iso_8601(batch.now_ms)
    answers = []
    for score_id, request, history in zip(_uuids(len(batch.requests)), batch.requests, batch.histories, strict=True):
        known = events.from_bytes(events.compact(history.events, MOST_EVENTS))
        age_ms = batch.now_ms - known["ts_ms"]
        age_ms = age_ms[age_ms >= 0]
        last_age_s = float(age_ms.min()) / 1000 if len(age_ms) else None
        recent = [int(np.count_nonzero(age_ms < days * _DAY_MS)) for days in (1, 30)]
        segment = segments.by_rule(recent[0], recent[1], last_age_s)
        answers.append(
            Score(score_id, request.visitor_id, None, None, segment, name, None, at, len(age_ms), last_age_s, degraded)
        )
    _count(answers, name or "", "", degraded)
    return Scored(answers)


def _count(answers: Sequence[Score | ScoreFailure], name: str, version: str, degraded: Sequence[str]) -> None:
    given: dict[str, int] = {}
    for answer in answers:
        if isinstance(answer, Score):
            given[answer.segment] = given.get(answer.segment, 0) + 1
    for segment, times in given.items():
        metrics.scores(name, version, segment).add(times)
    for reason in degraded:
        metrics.degraded(reason).add(sum(given.values()))


def _uuids(count: int) -> Iterator[str]:
    """Random UUIDs of version 4 (RFC 9562); `uuid.uuid4` takes as long as the model does for a row."""
    digits = os.urandom(16 * count).hex()
    for start in range(0, len(digits), 32):
        one = digits[start : start + 32]
        yield f"{one[:8]}-{one[8:12]}-4{one[13:16]}-{_VARIANT[one[16]]}{one[17:20]}-{one[20:]}"


_VARIANT: Final = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}


def evaluate(
    plan: Plan, histories: Sequence[History], now_ms: int, contexts: Sequence[Mapping[str, object]]
) -> features.Evaluated:
    """The features of n visitors at one moment, each with the context of its request."""
    records, starts = events.join([history.events for history in histories])
    traits, trait_starts = events.join([history.traits for history in histories])
    moments = np.empty(len(histories), np.int64)
    moments.fill(now_ms)
    request = np.array([plan.encode_request(context) for context in contexts], np.float32)
    return features.evaluate(plan, records, starts, moments, traits, trait_starts, request)


def _override(plan: Plan, matrix: Matrix, requests: Sequence[ScoreRequest]) -> dict[int, ScoreFailure]:
    """Put the requests' own feature values into their rows; returns the requests that name wrong ones, by row."""
    failures: dict[int, ScoreFailure] = {}
    for place, request in enumerate(requests):
        if request.features:
            try:
                override(plan, matrix[place : place + 1], request.features)
            except InvalidRequest as error:
                failures[place] = ScoreFailure(request.visitor_id, error)
    return failures


def override(plan: Plan, row: Matrix, values: Mapping[str, object]) -> None:
    """Put `values` by feature name into the float32[1, F] row, and compute again the ratios that are built on them.

    Raises InvalidRequest that lists each name or value that does not fit.
    """
    columns = {name: column for column, name in enumerate(plan.spec.names)}
    wrong: list[Place] = []
    fixed: set[int] = set()
    for name, value in values.items():
        try:
            row[0, columns[name]] = _feature_value(plan.spec.features[name], value)
            fixed.add(columns[name])
        except KeyError:
            wrong.append(Place(pointer(["features", name]), f"no such feature; there are {', '.join(columns)}"))
        except ValueError as error:
            wrong.append(Place(pointer(["features", name]), str(error)))
    if wrong:
        raise InvalidRequest(wrong)
    features.fill_ratios(plan, row, sorted(fixed))


def _feature_value(feature: Feature, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str):
        if not isinstance(feature, Trait | Request) or feature.categories is None:
            raise ValueError("write a number, or null for a missing value; the feature has no categories")
        return features.encode(feature, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < FLOAT32_END:
        raise ValueError("write a number that a float32 can hold, or null for a missing value")
    return float(value)
