"""Visitors: what is known of one, and forgetting it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from service import tracing
from service.api.state import CurrentModels, CurrentStore
from service.consent import Identities
from service.core import events
from service.core.bundle import Bundle
from service.core.events import TRAIT_TEXT
from service.errors import answers
from service.history import MOST_EVENTS, History, compact_traits
from service.ingest import LONGEST_ID, Catalogue
from service.models import Models
from service.persons import Persons
from service.scoring import evaluate, iso_8601, unix_ms


class AnythingConvertor(Convertor[str]):
    """The rest of the path, line breaks too; Starlette's own `path` stops at them and would name another visitor."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        """The text itself."""
        return value

    def to_string(self, value: str) -> str:
        """The text itself."""
        return value


register_url_convertor("anything", AnythingConvertor())

router = APIRouter(prefix="/v1/visitors", tags=["visitors"])

VisitorId = Annotated[
    str,
    Path(min_length=1, max_length=LONGEST_ID, description="The visitor's id; percent-encode what a path cannot hold."),
]


class EventsKnown(BaseModel):
    """The events that are kept."""

    total: int
    kinds: dict[str, int] = Field(description="How many of each kind, by its name in the catalogue.")
    first: str | None = Field(description="RFC 3339 in UTC; null without events.")
    last: str | None


class TraitKnown(BaseModel):
    """The latest value of a trait."""

    value: str | float | None = Field(description="null for a text that no model lists among its categories.")
    since: str


class IdentityOut(BaseModel):
    """Under which ids a person is known, what can be matched with platforms, and what was agreed to."""

    visitor_id: str = Field(description="The visitor itself, or whom it was joined into when it logged in.")
    joined: list[str] = Field(description="Anonymous visitors who are joined into that one.")
    forms: list[str] = Field(description="Identifiers that are known, by their form; the hashes are not shown.")
    rules: str | None = Field(description="Version of the rules of the oldest hash; null without any.")
    consents: dict[str, bool] = Field(description="By purpose; false where nothing was said.")


class VisitorOut(BaseModel):
    """What is known of a visitor at this moment."""

    visitor_id: str = Field(description="The visitor that was asked for.")
    at: str = Field(description="The moment that all of this holds for, RFC 3339 in UTC with milliseconds.")
    events: EventsKnown
    traits: dict[str, TraitKnown]
    features: dict[str, dict[str, float | None]] = Field(
        description="By model, what it would be asked with now and without a context; null is a missing value."
    )
    identity: IdentityOut


@router.get("/{visitor_id:anything}", responses=answers(404, 422, 503), summary="What is known of a visitor")
async def get_visitor(visitor_id: VisitorId, store: CurrentStore, models: CurrentModels) -> VisitorOut:
    """Events by kind, traits, the features of now, identifiers and consents, of all ids of the person together.

    A visitor who was never seen has none, which is no error.
    """
    with tracing.stage("store"):
        [history] = await store.read([visitor_id])
        person = await Persons(store).family(visitor_id)
        [known] = await Identities(store).read([person.visitor_id])
    now_ms = unix_ms()
    return VisitorOut(
        visitor_id=visitor_id,
        at=iso_8601(now_ms),
        events=_events(models.catalogue, history, now_ms),
        traits=dict(_traits(models, history, now_ms)),
        features={name: _features(bundle, history, now_ms) for name, bundle in models.bundles.items()},
        identity=IdentityOut(
            visitor_id=person.visitor_id,
            joined=list(person.joined),
            forms=list(known.identifiers),
            rules=known.rules or None,
            consents=dict(known.consents),
        ),
    )


@router.delete("/{visitor_id:anything}", status_code=204, responses=answers(404, 422, 503), summary="Forget a visitor")
async def erase_visitor(visitor_id: VisitorId, store: CurrentStore) -> Response:
    """Erase events, traits, identifiers, consents and quarantined events, of all ids of the person.

    204 also where nothing was known.
    """
    with tracing.stage("store"):
        await Persons(store).erase(visitor_id)
    return Response(status_code=204)


def _events(catalogue: Catalogue, history: History, now_ms: int) -> EventsKnown:
    kept = events.from_bytes(events.compact(history.events, MOST_EVENTS))
    kept = kept[(kept["ts_ms"] >= 0) & (kept["ts_ms"] <= now_ms)]
    kinds = Counter(catalogue.names.get(code, f"code {code}") for code in kept["kind"].tolist())
    moments = [iso_8601(int(kept["ts_ms"][place])) for place in ((0, -1) if len(kept) else ())]
    first, last = moments or (None, None)
    return EventsKnown(total=len(kept), kinds=dict(kinds), first=first, last=last)


def _traits(models: Models, history: History, now_ms: int) -> Iterator[tuple[str, TraitKnown]]:
    kept = events.from_bytes(compact_traits(history.traits, now_ms))
    kept = kept[(kept["ts_ms"] >= 0) & (kept["ts_ms"] <= now_ms)]
    for name, (identifier, _) in models.catalogue.traits.items():
        for record in kept[kept["id"] == identifier]:
            value = (
                _text(models, name, int(record["attribute"]))
                if record["kind"] == TRAIT_TEXT
                else float(record["value"])
            )
            yield name, TraitKnown(value=value, since=iso_8601(int(record["ts_ms"])))


def _text(models: Models, trait: str, attribute: int) -> str | None:
    """The category with this hash, which is all that is kept of it."""
    listed = (
        category
        for bundle in models.bundles.values()
        for feature in bundle.spec.traits.values()
        if feature.trait == trait
        for category in feature.codes
    )
    return next((category for category in listed if events.hash32(category) == attribute), None)


def _features(bundle: Bundle, history: History, now_ms: int) -> dict[str, float | None]:
    row = evaluate(bundle.plan, [history], now_ms, [{}]).matrix[0]
    return {
        name: None if math.isnan(value) else value
        for name, value in zip(bundle.spec.names, np.asarray(row).tolist(), strict=True)
    }
