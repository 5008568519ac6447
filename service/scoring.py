"""The way from visitor ids to scores: read the histories, compute the features, ask the model, decide.

Nothing that is missing keeps a visitor from an answer: without the feature cache a visitor is scored as one without
history, without a model it is put into a segment by rules, and `degraded` says so.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from service import metrics
from service.core import events, features, segments
from service.core.bundle import Bundle
from service.core.events import FLOAT32_END, RECORD_BYTES, Records
from service.core.features import Plan
from service.core.segments import SEGMENTS
from service.core.spec import Feature, Request, Trait
from service.errors import InvalidRequest, Place, ServiceError, StoreError, pointer
from service.models import Models
from service.store import MOST_EVENTS, History, Store

logger = logging.getLogger(__name__)

# Visitors that are read and scored in one go. Between two goes other requests have their turn.
GROUP: Final = 100
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


@dataclass(frozen=True, slots=True)
class Score:
    """The answer for one visitor."""

    score_id: Annotated[str, Field(description="Unique id of this answer, a UUID.")]
    visitor_id: Annotated[str, Field(description="The visitor that was asked for.")]
    propensity: Annotated[float | None, Field(ge=0, le=1, description="Calibrated probability; null without a model.")]
    percentile: Annotated[
        float | None,
        Field(ge=0, le=100, description="Percent of the training population that scored lower; null without a model."),
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


class Scorer:
    """Scores visitors. One per process.

    Requests that come one by one while others are being scored wait for each other: whatever has queued meanwhile is
    taken up next as one group, with one read, one call of the kernel and one of the model. Nobody waits for company.
    """

    def __init__(
        self, store: Store, models: Models, *, deadline_ms: float, now_ms: Callable[[], int] = unix_ms
    ) -> None:
        self._store, self._models, self._deadline_ms, self._now_ms = store, models, deadline_ms, now_ms
        self._queue: deque[_Waiting] = deque()
        self._drain: asyncio.Task[None] | None = None
        self._is_lost = False

    async def score_one(self, request: ScoreRequest) -> Score | ScoreFailure:
        """The score of one request, together with those that wait beside it."""
        answer: asyncio.Future[Score | ScoreFailure] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(request, answer, self._deadline()))
        if self._drain is None:
            self._drain = asyncio.create_task(self._score_waiting())
        return await answer

    async def _score_waiting(self) -> None:
        try:
            while self._queue:
                group = [self._queue.popleft() for _ in range(min(len(self._queue), GROUP))]
                group = [one for one in group if not one.answer.done()]  # its client went away
                try:
                    deadline = min((one.deadline for one in group), default=0.0)
                    scores = await self._score_group([one.request for one in group], deadline)
                except Exception as error:  # a bug: each request of the group reports it, those to come are scored
                    for one in group:
                        if not one.answer.done():
                            one.answer.set_exception(error)
                    continue
                for one, score in zip(group, scores, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(score)
        finally:
            self._drain = None

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score | ScoreFailure]:
        """The score of each request, in order; all are scored at the moment they are taken up."""
        scores: list[Score | ScoreFailure] = []
        deadline = self._deadline()
        for first in range(0, len(requests), GROUP):
            scores += await self._score_group(requests[first : first + GROUP], deadline)
        return scores

    def _deadline(self) -> float:
        """Until when, on the loop's clock, a request that arrives now may wait for the feature cache."""
        return asyncio.get_running_loop().time() + self._deadline_ms / 1000

    async def _score_group(self, requests: Sequence[ScoreRequest], deadline: float) -> list[Score | ScoreFailure]:
        now_ms = self._now_ms()
        histories = await self._read([request.visitor_id for request in requests], deadline)
        known = histories or [History()] * len(requests)
        degraded = [] if histories is not None else ["store"]
        at = iso_8601(now_ms)
        scores: list[Score | ScoreFailure | None] = [None] * len(requests)
        by_model: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            by_model.setdefault(request.model, []).append(place)
        for name, chosen in by_model.items():
            asked, histories_of = [requests[place] for place in chosen], [known[place] for place in chosen]
            batch = _Batch(asked, histories_of, now_ms, at, degraded)
            for place, answer in zip(chosen, self._score_batch(name, batch), strict=True):
                scores[place] = answer
        return [answer for answer in scores if answer is not None]

    def _score_batch(self, name: str | None, batch: _Batch) -> list[Score | ScoreFailure]:
        try:
            bundle = self._models.choose(name)
        except ServiceError as error:
            return [ScoreFailure(request.visitor_id, error) for request in batch.requests]
        return _score_by_rule(name, batch) if bundle is None else _score_by_model(bundle, batch)

    async def _read(self, visitor_ids: Sequence[str], deadline: float) -> list[History] | None:
        if asyncio.get_running_loop().time() >= deadline:
            return None
        with metrics.stage("store"):
            try:
                async with asyncio.timeout_at(deadline):
                    histories = await self._store.read(visitor_ids)
            except (StoreError, TimeoutError) as error:
                self._note_cache(lost=error)
                return None
        self._note_cache(lost=None)
        return histories

    def _note_cache(self, lost: Exception | None) -> None:
        """Log when the feature cache goes and when it is back, once each."""
        if lost is not None and not self._is_lost:
            logger.warning(
                "the feature cache does not answer (%s); visitors are scored without it", str(lost) or "too slow"
            )
        elif lost is None and self._is_lost:
            logger.warning("the feature cache answers again")
        self._is_lost = lost is not None


class _Waiting(NamedTuple):
    """A request of its own, and where its answer is awaited."""

    request: ScoreRequest
    answer: asyncio.Future[Score | ScoreFailure]
    deadline: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests for one model, with the histories of their visitors."""

    requests: Sequence[ScoreRequest]
    histories: Sequence[History]
    now_ms: int
    scored_at: str
    degraded: Sequence[str]

    def score(self, place: int, activity: Activity, reasons: Sequence[str] = (), **decided: Any) -> Score:
        degraded = [*self.degraded, *reasons]
        for reason in degraded:
            metrics.DEGRADED.labels(reason).inc()
        metrics.scores(decided["model"] or "", decided["version"] or "", decided["segment"]).inc()
        return Score(
            score_id=str(uuid.uuid4()),
            visitor_id=self.requests[place].visitor_id,
            scored_at=self.scored_at,
            events=activity.events,
            last_event_age_s=activity.last_event_age_s,
            degraded=degraded,
            **decided,
        )


class Activity(NamedTuple):
    """How many of a visitor's events count, and how old the last of them is."""

    events: int
    last_event_age_s: float | None


def iso_8601(ms: int) -> str:
    """A moment in UTC with milliseconds, as RFC 3339 writes it."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _score_by_model(bundle: Bundle, batch: _Batch) -> list[Score | ScoreFailure]:
    with metrics.stage("features"):
        found = evaluate(bundle.plan, batch.histories, batch.now_ms, [request.context for request in batch.requests])
        metrics.BROKEN_RECORDS.inc(found.broken)
        failures = _override(bundle.plan, found.matrix, batch.requests)
    activities = [
        Activity(count, age_ms / 1000 if count else None)
        for count, age_ms in zip(found.events.tolist(), found.last_age_ms.tolist(), strict=True)
    ]
    with metrics.stage("model"):
        propensities = bundle.predict(found.matrix)
    return [
        failures.get(place)
        or batch.score(
            place,
            activities[place],
            propensity=float(f"{propensity:.6g}"),
            percentile=bundle.percentile(propensity),
            segment=bundle.segment(propensity),
            model=bundle.name,
            version=bundle.version,
        )
        for place, propensity in enumerate(propensities.tolist())
    ]


def _score_by_rule(name: str | None, batch: _Batch) -> list[Score | ScoreFailure]:
    scores: list[Score | ScoreFailure] = []
    for place, history in enumerate(batch.histories):
        known = events.from_bytes(events.compact(history.events, MOST_EVENTS))
        age_ms = batch.now_ms - known["ts_ms"]
        age_ms = age_ms[age_ms >= 0]
        last_age_s = float(age_ms.min()) / 1000 if len(age_ms) else None
        recent = [int(np.count_nonzero(age_ms < days * _DAY_MS)) for days in (1, 30)]
        decided = {"propensity": None, "percentile": None, "model": name, "version": None}
        segment = segments.by_rule(recent[0], recent[1], last_age_s)
        scores.append(batch.score(place, Activity(len(age_ms), last_age_s), ["model"], segment=segment, **decided))
    return scores


def evaluate(
    plan: Plan, histories: Sequence[History], now_ms: int, contexts: Sequence[Mapping[str, object]]
) -> features.Evaluated:
    """The features of n visitors at one moment, each with the context of its request."""
    records, starts = _joined([history.events for history in histories])
    traits, trait_starts = _joined([history.traits for history in histories])
    moments = np.full(len(histories), now_ms, np.int64)
    request = np.array([plan.encode_request(context) for context in contexts], np.float32)
    return features.evaluate(plan, records, starts, moments, traits, trait_starts, request)


def _joined(blobs: Sequence[bytes]) -> tuple[Records, npt.NDArray[np.int64]]:
    sizes = [len(blob) // RECORD_BYTES for blob in blobs]
    whole = b"".join(blob[: size * RECORD_BYTES] for blob, size in zip(blobs, sizes, strict=True))
    return events.from_bytes(whole), np.cumsum([0, *sizes])


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
