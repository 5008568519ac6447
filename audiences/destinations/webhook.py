"""The destination `webhook`: additions and removals posted to an address of one's own, signed by Standard Webhooks.

A receiver knows people by `key` and answers 2xx; `{"rejected": {KEY: WHY}}` names the members that it does not take.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from pydantic import Field

from audiences.destinations.options import Kept
from audiences.destinations.protocol import KEY, Busy, Limits, Outcome, Person, Purpose
from audiences.signed import Endpoint, post

FORMS: Final = ("external_id", "google.email", "google.phone", "meta.email", "meta.phone", "meta.external_id")
FIELDS: Final[tuple[Kept, ...]] = ("segment",)


class Options(Endpoint):
    """Options of a webhook."""

    purpose: Purpose = Field(description="What people must have agreed to: ads, email, crm or analytics.")
    forms: tuple[str, ...] = Field(FORMS, description="Identifiers that are sent, beside the key.")
    fields: tuple[Kept, ...] = Field(
        FIELDS, description="Fields that are sent; a change of one sends the member again."
    )
    members: int = Field(1000, ge=1, le=100_000, description="Members a request.")
    requests_per_minute: int = Field(600, ge=1, description="Requests that the receiver wants in a minute at most.")


class WebhookDestination:
    """Posts batches."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.purpose = options.purpose
        self.limits = Limits(options.members, options.requests_per_minute, 60)
        self.forms = (KEY, *options.forms)
        self.fields: tuple[str, ...] = options.fields
        self._endpoint = options

    def open(self, audience: str) -> str:
        """A receiver knows a list by the audience's name."""
        return audience

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Post `audience.members_added`."""
        return self._post("audience.members_added", list_id, people, batch)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Post `audience.members_removed`."""
        return self._post("audience.members_removed", list_id, people, batch)

    def _post(self, kind: str, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        at = datetime.datetime.now(datetime.UTC)
        members = [_plain(person) for person in people]
        data = {"audience": list_id, "batch": batch, "members": members}
        body = msgspec.json.encode({"type": kind, "timestamp": at.isoformat(), "data": data})
        answer = post(self._endpoint, batch, body, at)
        refused = _refused(answer.body)
        return [Outcome(one.key not in refused, str(refused.get(one.key, answer.status))) for one in people]


def _plain(person: Person) -> dict[str, Any]:
    identifiers = {form: values for form, values in person.identifiers.items() if form != KEY}
    return {"key": person.key, "identifiers": identifiers, "fields": person.fields}


def _refused(body: bytes) -> Mapping[str, object]:
    """Members that the answer names as rejected; an answer of another form names none."""
    if not re.match(rb"\s*\{", body):
        return {}
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Busy("the receiver's answer begins like JSON and is none, so who was taken is not known") from None
    refused = answer.get("rejected") or {}
    if not isinstance(refused, Mapping):
        raise Busy('the receiver\'s "rejected" is no object of KEY: REASON, so who was taken is not known')
    return refused


def build(name: str, options: Options) -> WebhookDestination:
    """The destination of a name."""
    return WebhookDestination(name, options)
