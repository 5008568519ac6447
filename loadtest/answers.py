"""What the service must answer to simulated visitors; anything else is `Wrong`, with a reason out of a bounded set.

A check takes the body of an answer and returns the scores in it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeVar

import msgspec

from loadtest.visits import Event, Visit, is_counted

Answer = TypeVar("Answer")


class Wrong(Exception):
    """An answer that is not what it must be. Its text has no id and no number, so that equal ones can be counted."""

    def __repr__(self) -> str:  # what locust shows
        return str(self)


class Score(msgspec.Struct):
    """The answer of `POST /v1/score`."""

    score_id: Annotated[str, msgspec.Meta(min_length=1)]
    visitor_id: str
    propensity: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    percentile: Annotated[float, msgspec.Meta(ge=0, le=100)] | None
    segment: Literal["champions", "high_intent", "potential_buyers", "warm_prospects", "nurture", "low_priority"]
    model: str | None
    version: str | None
    scored_at: datetime
    events: Annotated[int, msgspec.Meta(ge=0)]
    last_event_age_s: Annotated[float, msgspec.Meta(ge=0)] | None
    degraded: list[Literal["store", "model"]]


class _Scores(msgspec.Struct):
    results: list[Score]


class _Outcome(msgspec.Struct):
    status: Literal["accepted", "ignored", "refused"]
    reason: str = ""


class _Outcomes(msgspec.Struct):
    accepted: int
    results: list[_Outcome]


class _Ready(msgspec.Struct):
    status: Literal["ready"]


class _Problem(msgspec.Struct):
    title: str = ""


class _Failure(msgspec.Struct):
    error: _Problem | None = None


class _Failures(msgspec.Struct):
    results: list[_Failure]


def require_ok(status: int, body: bytes) -> None:
    """Raise Wrong, with the title of the problem, for any status but 200."""
    if status != 200:
        try:
            title = msgspec.json.decode(body, type=_Problem).title
        except msgspec.DecodeError:
            title = ""
        raise Wrong(f"status {status} {title}".strip())


def check_events(body: bytes, visit: Visit, sent: Sequence[Event], catalogue: Container[str]) -> Sequence[Score]:
    """Note in the visit which events the service acknowledged; no scores."""
    outcomes = _decode(_Outcomes, body).results
    if len(outcomes) != len(sent):
        raise Wrong("not one result for each event")
    for event, outcome in zip(sent, outcomes, strict=True):
        if outcome.status == "refused":
            raise Wrong(f"an event was refused: {outcome.reason}")
        if outcome.status == "accepted" and is_counted(event, catalogue):
            visit.counted += 1
            visit.last_ms = round(datetime.fromisoformat(event["timestamp"]).timestamp() * 1000)
    return ()


def check_score(body: bytes, visit: Visit) -> Sequence[Score]:
    """The score, which must count the events that were acknowledged."""
    score = _decode(Score, body)
    _check(score, visit.visitor_id)
    if "store" in score.degraded or not visit.counted:
        return [score]
    if score.events < visit.counted or (visit.is_new and score.events != visit.counted):
        raise Wrong("`events` does not count what was just sent")
    # The age has milliseconds; half a one covers the rounding of its decimal fraction.
    if score.scored_at.timestamp() * 1000 - (score.last_event_age_s or 0) * 1000 < visit.last_ms - 0.5:
        raise Wrong("`last_event_age_s` does not know what was just sent")
    return [score]


def check_batch(body: bytes, visitor_ids: Sequence[str]) -> Sequence[Score]:
    """The scores of a batch, which must be those of its visitors in their order."""
    if b'"error":' in body:
        titles = {failure.error.title for failure in _decode(_Failures, body).results if failure.error}
        raise Wrong(f"visitors with an error: {', '.join(sorted(titles))}")
    scores = _decode(_Scores, body).results
    if len(scores) != len(visitor_ids):
        raise Wrong("not one result for each visitor")
    for score, visitor_id in zip(scores, visitor_ids, strict=True):
        _check(score, visitor_id)
    return scores


def check_metrics(body: bytes) -> Sequence[Score]:
    """Prometheus' text must have the service's own metrics; no scores."""
    if b"# TYPE propensity_request_seconds histogram" not in body:
        raise Wrong("the metrics of the service are missing")
    return ()


def check_ready(body: bytes) -> Sequence[Score]:
    """The service must say that it is ready; no scores."""
    _decode(_Ready, body)
    return ()


def _check(score: Score, visitor_id: str) -> None:
    if score.visitor_id != visitor_id:
        raise Wrong("the score of another visitor")
    if (score.propensity is None) != ("model" in score.degraded):
        raise Wrong("`propensity` does not agree with `degraded`")


def _decode(kind: type[Answer], body: bytes) -> Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Wrong(f"not the agreed answer: {re.sub(r'[0-9]+', 'N', str(error))}") from None
