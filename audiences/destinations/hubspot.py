"""HubSpot by its official client: contacts keep score and segment, a static list is an audience, champions are tasks.

People are contacts that a property with unique values, the customer's own id of a user, tells apart. No contact is ever
made here. On a contact we also keep `propensity_lists`, the lists that we put it on: once it is on none any more, its
fields are cleared, so that nobody who left, or withdrew consent, keeps a score in the CRM.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

import hubspot
from hubspot.crm import contacts, lists, properties
from hubspot.crm.objects import tasks
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from audiences.destinations import options
from audiences.destinations.crm import FORM, LISTS, NOBODY, TOLD, Client, added, after_s, property_of, removed
from audiences.destinations.protocol import Busy, Limits, Outcome, Person, Purpose, Rejected
from service.core.segments import SEGMENTS

BATCH: Final = 100  # "API usage guidelines and limits": records of a batch request
CALLS: Final = 5  # requests that one batch takes at most: contacts, tasks that are there, new tasks, fields, list
FIRST: Final = 10  # requests that a process begins with, to look at properties
CONTACTS: Final = "0-1"  # type of object of a contact
TASK_TO_CONTACT: Final = 204  # "Associations": type of the association of a task with a contact

GROUP: Final = "propensity"
ENTERINGS: Final = "propensity_enterings"
NUMBERS: Final = ("propensity", "propensity_percentile", ENTERINGS)
KEY: Final = "propensity_key"  # of a task
_HOUR: Final = 3600.0

_REFUSALS: Final = (
    contacts.ApiException,
    lists.ApiException,
    properties.ApiException,
    tasks.ApiException,
)
# How long the policies of a 429 ask to wait, where no Retry-After says it; the day ends at midnight of the account.
_POLICIES: Final[Mapping[str, float]] = {"TEN_SECONDLY_ROLLING": 10.0, "SECONDLY": 1.0, "DAILY": _HOUR}


class Task(BaseModel):
    """A task for sales, made each time that a contact enters a segment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    segment: str = Field("champions", description="Who enters it gets a task.")
    subject: str = Field("Call: now a champion", min_length=1, description="Title of the task.")
    body: str = Field("", description="Notes of the task.")
    type: Literal["CALL", "EMAIL", "TODO"] = Field("CALL", description="CALL, EMAIL or TODO.")
    priority: Literal["LOW", "MEDIUM", "HIGH"] = Field("HIGH", description="LOW, MEDIUM or HIGH.")
    due_hours: float = Field(24, ge=0, description="Hours from now until the task is due.")
    owner_id: str | None = Field(None, description="HubSpot's id of the owner; nobody's unless given.")

    @field_validator("segment")
    @classmethod
    def _known(cls, segment: str) -> str:
        if segment not in SEGMENTS:
            raise ValueError(f"write one of {', '.join(SEGMENTS)}")
        return segment


class Options(options.Options):
    """What `destinations.yaml` says of a HubSpot account."""

    token: options.Secret = Field(description="Access token of a private app.")
    id_property: str = Field("external_id", description="The contacts' property with your user ids; unique values.")
    prefix: str = Field("Propensity ", description="Put before the name of an audience to name its list.")
    fields: tuple[options.Kept, ...] = Field(
        ("propensity", "segment"), description="Fields that contacts keep; [] for lists alone."
    )
    task: Task | None = Field(None, description="A task for sales when a contact enters a segment; none unless given.")
    requests_per_10s: int = Field(100, ge=FIRST + CALLS, description="Requests that the account's plan allows in 10 s.")
    timeout_s: float = Field(30, gt=0, description="Seconds to wait for an answer.")
    endpoint: str = Field("https://api.hubapi.com", description="Address of the API.")

    @model_validator(mode="after")
    def _segment_is_kept(self) -> Options:
        if self.task and "segment" not in self.fields:
            raise ValueError("task needs the field segment, which says who entered; add segment to fields")
        return self


class Contact(NamedTuple):
    """A contact as it was read: its id, and what it keeps of ours."""

    id: str
    kept: Mapping[str, str | None]

    @property
    def lists(self) -> frozenset[str]:
        """Our lists that it is on."""
        return frozenset(filter(None, (self.kept.get(LISTS) or "").split(";")))

    @property
    def enterings(self) -> int:
        """How often it entered the segment that makes a task."""
        return int(float(self.kept.get(ENTERINGS) or 0))


def build(name: str, given: Options) -> HubSpot:
    """The destination of these options."""
    return HubSpot(name, given)


class HubSpot:
    """An account; see `protocol.Destination`."""

    purpose = Purpose.CRM
    forms: tuple[str, ...] = (FORM,)

    def __init__(self, name: str, given: Options) -> None:
        self.name = name
        self.fields: tuple[str, ...] = given.fields
        # A batch is several requests of the platform, and the limits count batches.
        self.limits = Limits(members=BATCH, requests=(given.requests_per_10s - FIRST) // CALLS, seconds=10.0)
        self._given = given
        self._prepared = False
        # The client would try three times by itself; that is the synchronisation's.
        crm = hubspot.HubSpot(access_token=given.token.get_secret_value(), host=given.endpoint, retry=False).crm
        self._ask = Client("HubSpot", given.timeout_s, _REFUSALS, _mapped).ask
        self._contacts = crm.contacts.batch_api
        self._tasks = crm.objects.tasks.batch_api
        self._lists = crm.lists.lists_api
        self._memberships = crm.lists.memberships_api
        self._properties = crm.properties.core_api
        self._groups = crm.properties.groups_api

    # --- what the synchronisation asks ---

    def open(self, audience: str) -> str:
        """The id of the audience's list."""
        self._prepare()
        name = f"{self._given.prefix}{audience}"
        found = self._list(name) or self._new_list(name)
        if found.processing_type != "MANUAL":
            raise Rejected(f"HubSpot: the list {name!r} is {found.processing_type}, not static; rename or delete it")
        return str(found.list_id)

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> list[Outcome]:
        """Give contacts their fields, and tasks if they are due, then put them on the list."""
        self._prepare()
        found = self._read(people)
        wanted = {contact.id: (contact, person) for person in people for contact in _of(person, found)}
        refused = self._make_tasks(wanted.values()) if self._given.task else {}
        refused |= self._write(
            {
                id: self._values(contact, person, contact.lists | {list_id})
                for id, (contact, person) in wanted.items()
                if id not in refused
            }
        )
        refused |= self._put(list_id, [id for id in wanted if id not in refused])
        return [added("contact", _of(person, found), refused) for person in people]

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> list[Outcome]:
        """Take contacts off the list, and clear the fields of who is on no list of ours any more.

        A list that is gone has nobody, which is what is wanted.
        """
        self._prepare()
        found = self._read(people)
        leaving = {contact.id: contact for person in people for contact in _of(person, found)}
        if leaving:
            self._ask("taking off a list", self._memberships.remove, int(list_id), [*leaving], missing=True)
        refused = self._write({id: self._left(contact, list_id) for id, contact in leaving.items()})
        return [removed("contact", _of(person, found), refused) for person in people]

    def check(self) -> str:
        """Read what a synchronisation reads first: the property that tells contacts apart, a list, and contacts."""
        self._require_ids()
        self._list(self._given.prefix)
        self._read([NOBODY])
        return f"HubSpot shows contacts by {self._given.id_property}, and lists"

    # --- contacts ---

    def _read(self, people: Sequence[Person]) -> dict[str, Contact]:
        """Contacts by the id that they have as `id_property`."""
        ids = sorted({id for person in people for id in person.identifiers.get(FORM, ())})
        found = {}
        for some in _batches(ids):
            answer = self._ask(
                "reading contacts",
                self._contacts.read,
                contacts.BatchReadInputSimplePublicObjectId(
                    id_property=self._given.id_property,
                    inputs=[{"id": id} for id in some],
                    properties=[self._given.id_property, *self._ours()],
                    properties_with_history=[],
                ),
            )
            _only_missing(answer)
            for record in answer.results:
                found[record.properties[self._given.id_property]] = Contact(record.id, record.properties)
        return found

    def _write(self, values: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Update contacts by their ids; says of which ones it failed, and why."""
        refused: dict[str, str] = {}
        for some in _batches((id, own) for id, own in values.items() if own):
            answer = self._ask(
                "updating contacts",
                self._contacts.update,
                {"inputs": [{"id": id, "properties": dict(own)} for id, own in some]},
            )
            taken = {record.id for record in answer.results}
            reasons = {id: _told(error) for error in _errors(answer) for id in (error.context or {}).get("ids", ())}
            refused |= {id: reasons.get(id, "the update did not take it") for id, _ in some if id not in taken}
        return refused

    def _put(self, list_id: str, ids: Sequence[str]) -> dict[str, str]:
        """Put contacts on a list; says which ones are no more."""
        if not ids:
            return {}
        answer = self._ask("putting on a list", self._memberships.add, int(list_id), list(ids))
        return {str(id): "the contact is no more" for id in answer.record_ids_missing or ()}

    def _values(self, contact: Contact, person: Person, on: Iterable[str]) -> dict[str, str]:
        values = {property_of(field): _text(person.fields.get(field, "")) for field in self.fields}
        if self.fields:
            values[LISTS] = _joined(on)
        if self._enters(contact, person):
            values[ENTERINGS] = str(contact.enterings + 1)
        return values

    def _left(self, contact: Contact, list_id: str) -> dict[str, str]:
        rest = contact.lists - {list_id}
        if rest or not self.fields:
            return {LISTS: _joined(rest)} if self.fields else {}
        return {property_of(field): "" for field in self.fields} | {LISTS: ""}

    def _ours(self) -> list[str]:
        return [
            *map(property_of, self.fields),
            *([LISTS] if self.fields else []),
            *([ENTERINGS] if self._given.task else []),
        ]

    # --- tasks ---

    def _enters(self, contact: Contact, person: Person) -> bool:
        """Whether a person is in the segment of tasks, and was not when the contact was last written."""
        task = self._given.task
        return (
            task is not None
            and person.fields.get("segment") == task.segment
            and contact.kept.get(property_of("segment")) != task.segment
        )

    def _make_tasks(self, wanted: Iterable[tuple[Contact, Person]]) -> dict[str, str]:
        """One task for each contact that enters; says of which ones it failed.

        Its key counts the contact's enterings, and the count goes up with the segment, in one update after this. So a
        batch that is sent again finds the task that it made, even if a salesperson has meanwhile closed it.
        """
        due = {
            f"{contact.id}-{contact.enterings + 1}": contact.id
            for contact, person in wanted
            if self._enters(contact, person)
        }
        refused: dict[str, str] = {}
        for some in _batches(sorted(set(due) - self._made(due))):
            answer = self._ask(
                "making tasks", self._tasks.create, {"inputs": [self._task(key, due[key]) for key in some]}
            )
            for error in _errors(answer):
                if error.category != "CONFLICT":  # else another process made it meanwhile
                    keys = (error.context or {}).get("objectWriteTraceId", some)
                    refused |= {due[key]: f"no task: {_told(error)}" for key in keys}
        return refused

    def _made(self, keys: Iterable[str]) -> set[str]:
        made = set()
        for some in _batches(sorted(keys)):
            answer = self._ask(
                "reading tasks",
                self._tasks.read,
                tasks.BatchReadInputSimplePublicObjectId(
                    id_property=KEY,
                    inputs=[{"id": key} for key in some],
                    properties=[KEY],
                    properties_with_history=[],
                ),
            )
            _only_missing(answer)
            made |= {record.properties[KEY] for record in answer.results}
        return made

    def _task(self, key: str, contact_id: str) -> dict[str, Any]:
        task = self._given.task
        assert task
        due_ms = int(1000 * (time.time() + task.due_hours * _HOUR))
        values = {
            KEY: key,
            "hs_timestamp": str(due_ms),
            "hs_task_subject": task.subject,
            "hs_task_body": task.body,
            "hs_task_status": "NOT_STARTED",
            "hs_task_priority": task.priority,
            "hs_task_type": task.type,
            **({"hubspot_owner_id": task.owner_id} if task.owner_id else {}),
        }
        kind = {"associationCategory": "HUBSPOT_DEFINED", "associationTypeId": TASK_TO_CONTACT}
        return {
            "properties": values,
            "associations": [{"to": {"id": contact_id}, "types": [kind]}],
            "objectWriteTraceId": key,  # what an error of this one task names
        }

    # --- lists and properties ---

    def _list(self, name: str) -> Any:
        answer = self._ask("looking for a list", self._lists.get_by_name, name, CONTACTS, missing=True)
        return answer and answer.list

    def _new_list(self, name: str) -> Any:
        wanted = lists.ListCreateRequest(name=name, object_type_id=CONTACTS, processing_type="MANUAL")
        return self._ask("making a list", self._lists.create, wanted).list

    def _prepare(self) -> None:
        """Once in a process, make the properties that are missing: options may say more than when a list was made."""
        if self._prepared:
            return
        self._require_ids()
        for name in self._ours():
            self._ensure("contacts", name, "number" if name in NUMBERS else "string")
        if self._given.task:
            self._ensure("tasks", KEY, "string", unique=True)
        self._prepared = True

    def _require_ids(self) -> None:
        unique = self._property("contacts", self._given.id_property)
        if unique is None or not unique.has_unique_value:
            raise Rejected(
                f"HubSpot: contacts have no property {self._given.id_property} with unique values; make one "
                "(Settings, Properties, 'Require unique values') and fill it with your user ids, "
                "or name the one that you have as id_property"
            )

    def _ensure(self, kind: str, name: str, type: str, unique: bool = False) -> None:  # noqa: A002
        found = self._property(kind, name)
        if found is None:
            self._group(kind)
            wanted = properties.PropertyCreate(
                name=name,
                label=name.replace("_", " ").capitalize(),
                type=type,
                field_type="number" if type == "number" else "text",
                group_name=GROUP,
                has_unique_value=unique,
                description="Kept by Propensity; changes made by hand are overwritten.",
            )
            self._ask(f"making the property {name}", self._properties.create, kind, wanted)
        elif found.type != type or (unique and not found.has_unique_value):
            raise Rejected(
                f"HubSpot: the property {name} of {kind} is of type {found.type}; "
                f"it must be {type}{' with unique values' if unique else ''}: rename or delete it"
            )

    def _property(self, kind: str, name: str) -> Any:
        return self._ask(f"reading the property {name}", self._properties.get_by_name, kind, name, missing=True)

    def _group(self, kind: str) -> None:
        read, wanted = self._groups.get_by_name, properties.PropertyGroupCreate(name=GROUP, label="Propensity")
        if self._ask("reading a group of properties", read, kind, GROUP, missing=True) is None:
            self._ask("making a group of properties", self._groups.create, kind, wanted)


def _mapped(what: str, error: Any) -> Busy | Rejected:
    """What a refusal means, in HubSpot's words."""
    body = _parsed(error.body)
    said = f"HubSpot, {what}: {error.status} {str(body.get('message') or error.reason)[:TOLD]}"
    if body.get("correlationId"):
        said = f"{said} ({body['correlationId']})"
    if error.status in (409, 423, 429, 477) or error.status >= 500:  # a conflict: somebody else just did the same
        told_s = after_s(error.headers)
        return Busy(said, _POLICIES.get(str(body.get("policyName"))) if told_s is None else told_s)
    if error.status == 404 and body.get("category") == "OBJECT_NOT_FOUND" and what == "updating contacts":
        return Busy(said)  # a contact went away since it was read; the next attempt does not find it
    hints = {
        401: "; is the token right?",
        403: "; does the private app have the scopes of docs/destinations/hubspot.md?",
    }
    return Rejected(said + hints.get(error.status, ""))


def _parsed(body: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _errors(answer: Any) -> list[Any]:
    """The errors of an answer that says of each record how it went; none of another."""
    return list(getattr(answer, "errors", None) or ())


def _only_missing(answer: Any) -> None:
    """Accept that records were not found, and nothing else."""
    for error in _errors(answer):
        if error.category != "OBJECT_NOT_FOUND":
            raise Rejected(f"HubSpot, reading: {_told(error)}")


def _told(error: Any) -> str:
    return f"{error.category}: {error.message}"[:TOLD]


def _of(person: Person, found: Mapping[str, Contact]) -> list[Contact]:
    return [found[id] for id in person.identifiers.get(FORM, ()) if id in found]


def _joined(lists: Iterable[str]) -> str:
    """Ids of lists, in the order of their numbers; people can have written anything between them."""
    return ";".join(sorted(lists, key=lambda id: (len(id), id)))


def _text(value: str | float) -> str:
    """A value as HubSpot takes it; empty clears. Scores are float32, which seven digits hold."""
    if isinstance(value, str):
        return value
    return f"{value:.7g}" if math.isfinite(value) else ""


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, BATCH)):
        yield some
