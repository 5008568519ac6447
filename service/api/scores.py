"""Scores: one visitor, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Header
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from starlette.responses import Response

from service.api.body import JSONRoute
from service.api.state import CurrentScoreLog, CurrentScorer, CurrentSettings
from service.errors import InvalidRequest, Place, Problem, TooLarge, answers, body_of, places
from service.ingest import LONGEST_ID
from service.score_log import ScoreLog
from service.scorer import Outcome
from service.scoring import Score, ScoreFailure, ScoreRequest

router = APIRouter(prefix="/v1/score", tags=["scores"], route_class=JSONRoute)

TIMEOUT_HEADER: Final = "X-Request-Timeout-Ms"
TimeoutMs = Annotated[
    int | None,
    Header(
        alias=TIMEOUT_HEADER,
        ge=1,
        description="Milliseconds the client waits: what is missing by then is named in `degraded`. Left out it is "
        "PROPENSITY_DEADLINE_MS; the most it can be is PROPENSITY_MAX_DEADLINE_MS.",
    ),
]

VisitorId = Annotated[
    str, Field(min_length=1, max_length=LONGEST_ID, description="The visitor: its userId, or else its anonymousId.")
]


def _not_yet(value: object) -> object:
    if value is not False:
        raise ValueError("scores cannot be explained yet; leave explain out")
    return value


class ScoreIn(BaseModel):
    """Whom to score, and what the caller knows at this moment."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"visitor_id": "visitor-17", "context": {"referrer": "ads"}}]},
    )

    visitor_id: VisitorId
    model: Annotated[
        str | None,
        Field(description="Name of the model; needed where several are served and none is the default."),
    ] = None
    context: Annotated[
        dict[str, Any], Field(description="Values for the request features of the model; others are let be.")
    ] = {}
    features: Annotated[
        dict[str, Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=float | str | None)]],
        Field(
            description="Values to use instead of what is known, by name of the feature: a number is what the model "
            "gets, null is a missing value, a string is a category of a trait or request feature. Ratios follow."
        ),
    ] = {}
    explain: Annotated[
        Literal[False], BeforeValidator(_not_yet), Field(description="Reserved: scores cannot be explained yet.")
    ] = False

    def asked(self) -> ScoreRequest:
        """The request without its wire."""
        return ScoreRequest(self.visitor_id, self.model, self.context, self.features)


class BatchIn(BaseModel):
    """Many visitors. A wrong one has an error in its place and does not touch the others."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"visitors": [{"visitor_id": "visitor-17"}, {"visitor_id": "visitor-18"}]}]},
    )

    visitors: Annotated[
        list[Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=ScoreIn)]],
        Field(min_length=1, description="At most 1,000, unless PROPENSITY_BATCH_VISITORS says otherwise."),
    ]


class FailureOut(BaseModel):
    """A visitor of a batch that has no score."""

    visitor_id: str | None = Field(description="The visitor, if its request says it.")
    error: Problem


class BatchOut(BaseModel):
    """The answers, in the order of the visitors."""

    results: list[Score | FailureOut]


_EXAMPLE: Final = {
    "score_id": "0b5f6f0e-5f0a-4b1e-9f43-0d2f6c1c8a55",
    "visitor_id": "visitor-17",
    "propensity": 0.0873,
    "percentile": 93.4,
    "segment": "high_intent",
    "model": "purchase_7d",
    "version": "20260131T120000",
    "scored_at": "2026-01-31T23:59:59.999Z",
    "events": 12,
    "last_event_age_s": 4.2,
    "degraded": [],
}


@router.post(
    "",
    response_model=Score,
    responses={
        200: {"description": "The score.", "content": {"application/json": {"example": _EXAMPLE}}},
        **answers(404, 413, 415, 422, 429),
    },
    summary="Score one visitor",
)
async def score(
    request: ScoreIn, scorer: CurrentScorer, log: CurrentScoreLog, timeout_ms: TimeoutMs = None
) -> Response:
    """Score one visitor, known or not. What is missing is named in `degraded`; it is no error."""
    outcome, timing = await scorer.score_one(request.asked(), timeout_ms)
    if isinstance(outcome, ScoreFailure):
        raise outcome.error
    if isinstance(outcome, Exception):
        raise outcome
    body = encode(outcome)
    log.add(body)
    return Response(body, headers={"Server-Timing": timing.header()}, media_type="application/json")


@router.post("/batch", response_model=BatchOut, responses=answers(413, 415, 422, 429), summary="Score many visitors")
async def score_batch(
    batch: BatchIn,
    scorer: CurrentScorer,
    settings: CurrentSettings,
    log: CurrentScoreLog,
    timeout_ms: TimeoutMs = None,
) -> Response:
    """Score many visitors. The answers are in order; where a visitor's request is wrong, its place says so."""
    if len(batch.visitors) > settings.batch_visitors:
        raise TooLarge(f"{len(batch.visitors)} visitors are more than {settings.batch_visitors}; send several batches")
    asked = [_asked(place, item) for place, item in enumerate(batch.visitors)]
    scored = iter(await scorer.score([item for item in asked if isinstance(item, ScoreRequest)], timeout_ms))
    outcomes = [next(scored) if isinstance(item, ScoreRequest) else item for item in asked]
    bodies = [_wire(outcome, log) for outcome in outcomes]
    return Response(b'{"results":[%b]}' % b",".join(bodies), media_type="application/json")


def _asked(place: int, item: object) -> ScoreRequest | ScoreFailure:
    if not isinstance(item, dict):
        return ScoreFailure(None, InvalidRequest([Place(f"/visitors/{place}", "write an object with a visitor_id")]))
    try:
        return ScoreIn.model_validate(item).asked()
    except ValidationError as error:
        visitor_id = item.get("visitor_id")
        wrong: Sequence[Place] = [Place(f"/visitors/{place}{found.pointer}", found.message) for found in places(error)]
        return ScoreFailure(visitor_id if isinstance(visitor_id, str) else None, InvalidRequest(wrong))


def encode(content: object) -> bytes:
    """JSON, with null for what is no number."""
    return msgspec.json.encode(content)


def _wire(outcome: Outcome, log: ScoreLog) -> bytes:
    if isinstance(outcome, Score):
        body = encode(outcome)
        log.add(body)
        return body
    if isinstance(outcome, ScoreFailure):
        return encode({"visitor_id": outcome.visitor_id, "error": body_of(outcome.error, "/v1/score/batch")})
    raise outcome
