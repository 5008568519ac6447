"""Events: one, or many at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import to_json

from service import door as doors
from service import identity, ingest, metrics, tracing
from service.api.body import JSONRoute
from service.api.state import CurrentDoor, CurrentModels, CurrentSettings, CurrentStore
from service.door import Door
from service.errors import InvalidRequest, ModelNotReady, Place, RefusedEvent, TooLarge, answers
from service.history import History
from service.ingest import Accepted, Catalogue, Ignored, Refused
from service.models import Models
from service.persons import Persons
from service.scoring import unix_ms
from service.settings import Settings
from service.store import Store
from service.streams import Quarantine, Quarantined
from service.visitors import Visitors

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/events", tags=["events"], route_class=JSONRoute)


class Event(BaseModel):
    """An event of the Segment spec. Further members are let be."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "track",
                    "event": "Product Viewed",
                    "userId": "visitor-17",
                    "messageId": "6f1c2d34",
                    "timestamp": "2026-01-31T23:59:59.999Z",
                    "properties": {"price": 19.9, "category": "shoes"},
                    "context": {"device": "mobile"},
                }
            ]
        }
    )

    type: Literal["track", "page", "identify", "screen", "group", "alias"] = "track"
    event: str | None = Field(None, description="Name of a track event, as the catalogue has it.")
    name: str | None = Field(None, description="Name of a page.")
    user_id: str | float | None = Field(None, alias="userId", description="The visitor, once known.")
    anonymous_id: str | float | None = Field(None, alias="anonymousId", description="The visitor before that.")
    message_id: str | float | None = Field(
        None,
        alias="messageId",
        description="Id of the event: sent again with the same id and timestamp it counts once.",
    )
    timestamp: str | float | None = Field(
        None, description="ISO 8601, UTC unless it says, or epoch in ms or s; now if left out."
    )
    properties: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    traits: dict[str, Any] | None = None


class EventBatch(BaseModel):
    """Many events."""

    batch: list[Event] = Field(min_length=1)


class EventResult(BaseModel):
    """What became of one event."""

    status: Literal["accepted", "ignored", "refused"] = Field(
        description="accepted: it is in the next score; ignored: no model reads it; refused: it cannot be understood "
        "and is kept in quarantine."
    )
    reason: str | None = Field(None, description="Why it was refused, out of a fixed set.")
    message: str | None = Field(None, description="What to write instead, or to mend.")


class EventsOut(BaseModel):
    """What became of each event, in their order."""

    accepted: int
    ignored: int
    refused: int
    results: list[EventResult]


Outcome = Accepted | Ignored | Refused
# Events are judged one by one by `ingest`, so that a bad one does not take its neighbours along.
AnyEvents = Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=Event | EventBatch), Body()]

_STATUS: Final = {Accepted: "accepted", Ignored: "ignored", Refused: "refused"}
_ENCODER: Final = msgspec.json.Encoder()
_WHOLLY_ACCEPTED: Final = b'{"status":"accepted"}'


@router.post(
    "",
    response_model=EventsOut,
    responses=answers(413, 415, 422, 503),
    summary="Send events",
)
async def send_events(
    request: Request,
    body: AnyEvents,
    store: CurrentStore,
    models: CurrentModels,
    door: CurrentDoor,
    settings: CurrentSettings,
) -> Response:
    """Take one event, or many as `{"batch": [...]}`, each with its own result.

    What is accepted is in the next score. Events with a timestamp can be sent again without harm. After
    503 nothing is certain; send all again.
    """
    content = await take(body, len(await request.body()), store, models, door, settings)
    return Response(content, media_type="application/json")


async def take(body: object, size: int, store: Store, models: Models, door: Door, settings: Settings) -> bytes:
    """Store the events of a decoded body of `size` bytes, and give the EventsOut that answers it, as JSON.

    Raises ServiceErrors for what the body is not, for a single event that is refused, and where the store fails.
    """
    if not models.bundles:
        raise ModelNotReady("no model is loaded, so no event is known; put one into the artifacts directory, restart")
    batch = _events(body, settings.batch_events)
    is_alone = batch[0] is body
    now_ms = unix_ms()
    limit = settings.event_bytes if size > settings.event_bytes else None
    if is_alone and limit is not None:
        raise TooLarge(f"an event may have {limit} bytes; keep to what models and reports read")
    outcomes = [_judge(models.catalogue, door, event, limit, now_ms) for event in batch]
    visitors = Visitors(store)
    with tracing.stage("store"):
        outcomes = await _keep(visitors, outcomes, now_ms)
        outcomes = await _keep_said(visitors, outcomes, now_ms)
        await _join(Persons(store), outcomes, now_ms)
        counts = Counter(map(type, outcomes))
        if counts[Refused]:
            await _quarantine(Quarantine(store), batch, outcomes, now_ms, settings.quarantine_length)
    for kind, status in _STATUS.items():
        metrics.events(status).add(counts[kind])
    models.intake.add(batch, outcomes, now_ms)
    if is_alone and isinstance(outcomes[0], Refused):
        raise RefusedEvent(f"{outcomes[0].reason}: {outcomes[0].message}")
    results = b",".join(map(_result, outcomes))
    return b'{"accepted":%d,"ignored":%d,"refused":%d,"results":[%b]}' % (
        counts[Accepted],
        counts[Ignored],
        counts[Refused],
        results,
    )


def _events(body: object, most: int) -> Sequence[object]:
    if not isinstance(body, dict):
        raise InvalidRequest([Place("", 'send one event as an object, or many as {"batch": [...]}')])
    if "batch" not in body:
        return [body]
    if not isinstance(body["batch"], list) or not body["batch"]:
        raise InvalidRequest([Place("/batch", "must be a list of at least one event")])
    if len(body["batch"]) > most:
        raise TooLarge(f"{len(body['batch'])} events are more than {most}; send several batches")
    return body["batch"]


def _judge(catalogue: Catalogue, door: Door, event: Any, limit: int | None, now_ms: int) -> Outcome:
    if limit is not None and len(_ENCODER.encode(event)) > limit:
        return Refused("size", f"an event may have {limit} bytes; keep to what models and reports read")
    outcome = ingest.parse(catalogue, event, now_ms)
    if isinstance(outcome, Refused) or not doors.speaks(event):
        return outcome
    return doors.take(door, event, outcome, now_ms, lambda what, became: metrics.said(what, became).add(1))


async def _keep(visitors: Visitors, outcomes: list[Outcome], now_ms: int) -> list[Outcome]:
    """Store what was accepted; what the store cannot hold becomes refused, or is told if it is the traits alone."""
    additions = _by_visitor(outcomes)
    if not additions:
        return outcomes
    began = perf_counter()
    try:
        lost = await visitors.append(additions, now_ms)
    finally:
        metrics.redis_seconds("write").add(perf_counter() - began)
    if not lost:
        return outcomes
    return [
        _without(outcome, lost[outcome.visitor_id])
        if isinstance(outcome, Accepted) and outcome.visitor_id in lost
        else outcome
        for outcome in outcomes
    ]


async def _keep_said(visitors: Visitors, outcomes: list[Outcome], now_ms: int) -> list[Outcome]:
    """Store what was said of persons."""
    parts: dict[str, list[bytes]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Accepted) and outcome.said:
            parts.setdefault(outcome.visitor_id, []).append(outcome.said)
    if not parts:
        return outcomes
    lost = await visitors.append_said({name: b"".join(said) for name, said in parts.items()}, now_ms)
    return [
        _without_said(outcome)
        if isinstance(outcome, Accepted) and outcome.said and outcome.visitor_id in lost
        else outcome
        for outcome in outcomes
    ]


def _without_said(outcome: Accepted) -> Outcome:
    """What became of an event whose visitor could not be given what it says of a person."""
    advice = "the visitor's key of identifiers in the feature cache holds something else; delete it"
    if outcome.events or outcome.traits:
        return msgspec.structs.replace(outcome, message=f"its identifiers and consents are not kept: {advice}")
    return Refused("unfit", advice)


async def _join(persons: Persons, outcomes: Sequence[Outcome], now_ms: int) -> None:
    """Join anonymous visitors into those they logged in as, after all that the events left is stored."""
    logins = dict.fromkeys(
        outcome.login for outcome in outcomes if isinstance(outcome, Accepted) and outcome.login is not None
    )
    if logins:
        for became in await persons.join(list(logins), now_ms):
            metrics.JOINS.labels(became).inc()


def _without(outcome: Accepted, lost: History) -> Outcome:
    """What became of an event whose visitor could not be given all of its records."""
    if lost.events and outcome.events:
        return Refused("unfit", "the visitor's key of events in the feature cache holds something else; delete it")
    if not lost.traits or not outcome.traits:
        return outcome
    advice = "the visitor's key of traits in the feature cache holds something else; delete it"
    if outcome.events:
        return msgspec.structs.replace(outcome, message=f"its traits are not kept: {advice}")
    return Refused("unfit", advice)


async def _quarantine(
    quarantine: Quarantine, batch: Sequence[object], outcomes: Sequence[Outcome], now_ms: int, length: int
) -> None:
    refused = [
        Quarantined(outcome.reason, outcome.message, now_ms, ingest.visitor_ids(event), _told(event))
        for event, outcome in zip(batch, outcomes, strict=True)
        if isinstance(outcome, Refused) and outcome.reason != "size"
    ]
    if refused and not await quarantine.add(refused[-length:], length):
        logger.warning("%d refused events are not kept: the key of the quarantine holds something else", len(refused))


def _told(event: object) -> str:
    """An event as JSON, without addresses and numbers of people."""
    return to_json(identity.redacted(event)).decode()


def _by_visitor(outcomes: Sequence[Outcome]) -> Mapping[str, History]:
    parts: dict[str, list[Accepted]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Accepted) and (outcome.events or outcome.traits):
            parts.setdefault(outcome.visitor_id, []).append(outcome)
    return {visitor_id: _together(kept) for visitor_id, kept in parts.items()}


def _together(kept: Sequence[Accepted]) -> History:
    if len(kept) == 1:
        return History(kept[0].events, kept[0].traits)
    return History(b"".join([one.events for one in kept]), b"".join([one.traits for one in kept]))


def _result(outcome: Outcome) -> bytes:
    if isinstance(outcome, Accepted) and outcome.message is None:
        return _WHOLLY_ACCEPTED
    reason = {"reason": outcome.reason} if isinstance(outcome, Refused) else {}
    return _ENCODER.encode({"status": _STATUS[type(outcome)], **reason, "message": outcome.message})
