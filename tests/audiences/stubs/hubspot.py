"""HubSpot as its documentation says it answers: contacts, properties, static lists and tasks, with every rule checked.

Rules: "API usage guidelines and limits" (100 records a batch, rolling limit, policies of a 429), "Error handling" (207
and its errors), "Properties" (types, groups, unique values), "Lists (Segments) API" and "Activities | Tasks".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.audiences.stubs.platform import Answer, Platform, Refused, Request

TOKEN = "pat-eu1-token"
MOMENT = "2026-11-24T12:00:00.000Z"
TYPES = {
    "string": {"text", "textarea"},
    "number": {"number"},
    "enumeration": {"select", "radio", "checkbox", "booleancheckbox"},
    "bool": {"booleancheckbox"},
    "date": {"date"},
    "datetime": {"date"},
}
TASK = {
    "hs_timestamp": "datetime",
    "hs_task_subject": "string",
    "hs_task_body": "string",
    "hs_task_status": "enumeration",
    "hs_task_priority": "enumeration",
    "hs_task_type": "enumeration",
    "hubspot_owner_id": "string",
}
CHOICES = {
    "hs_task_status": {"NOT_STARTED", "IN_PROGRESS", "WAITING", "DEFERRED", "COMPLETED"},
    "hs_task_priority": {"NONE", "LOW", "MEDIUM", "HIGH"},
    "hs_task_type": {"EMAIL", "CALL", "TODO"},
}


class HubSpot(Platform):
    """One account."""

    def __init__(self, unique: str | None = "external_id") -> None:
        super().__init__()
        self.contacts: dict[str, dict[str, str]] = {}
        self.tasks: dict[str, dict[str, str]] = {}
        self.associations: dict[str, list[str]] = {}  # task -> contacts
        self.lists: dict[str, dict[str, Any]] = {}
        self.members: dict[str, set[str]] = {}
        self.groups = {"contacts": {"contactinformation"}, "tasks": {"task"}}
        self.properties: dict[str, dict[str, dict[str, Any]]] = {
            "contacts": {"email": _property("email", "string")},
            "tasks": {name: _property(name, type) for name, type in TASK.items()},
        }
        if unique:
            self.properties["contacts"][unique] = _property(unique, "string", unique=True)
        self._next = 100

    def contact(self, **values: str) -> str:
        """Make a contact, as people at work in the CRM do; its id."""
        id = self._id()
        self.contacts[id] = dict(values)
        return id

    def handle(self, request: Request) -> Answer:
        said = request.headers.get("authorization", "")
        self.rule(said.startswith("Bearer "), "every request has the header Authorization: Bearer TOKEN", 401)
        self.rule(said == f"Bearer {TOKEN}", "Authentication credentials not found", 401, kept=False)
        if request.body is not None:
            kind = request.headers.get("content-type", "")
            self.rule(kind.startswith("application/json"), f"the body is JSON, not {kind}", 415)
        for method, path, handler in (
            ("POST", r"/crm/v3/objects/(contacts|tasks)/batch/read", self._read),
            ("POST", r"/crm/v3/objects/contacts/batch/update", self._update),
            ("POST", r"/crm/v3/objects/tasks/batch/create", self._create_tasks),
            ("GET", r"/crm/v3/properties/(\w+)/groups/(\w+)", self._group),
            ("POST", r"/crm/v3/properties/(\w+)/groups", self._create_group),
            ("GET", r"/crm/v3/properties/(\w+)/(\w+)", self._get_property),
            ("POST", r"/crm/v3/properties/(\w+)", self._create_property),
            ("GET", r"/crm/v3/lists/object-type-id/0-1/name/(.+)", self._list_by_name),
            ("POST", r"/crm/v3/lists/?", self._create_list),
            ("PUT", r"/crm/v3/lists/(\d+)/memberships/(add|remove)", self._memberships),
        ):
            found = re.fullmatch(path, request.path)
            if found and method == request.method:
                return handler(request, *found.groups())
        self.rule(False, f"there is no {request}", 404)
        raise AssertionError

    def refusal(self, status: int, said: str, category: str | None = None) -> Answer:
        named = {401: "INVALID_AUTHENTICATION", 404: "OBJECT_NOT_FOUND", 409: "CONFLICT"}
        body = {"status": "error", "message": said, "correlationId": "aeb5f871-7f07-4993-9211-075dc63e7cbf"}
        return Answer(status, {**body, "category": category or named.get(status, "VALIDATION_ERROR")})

    def too_many(self) -> Answer:
        body = {
            "status": "error",
            "message": "You have reached your ten_secondly_rolling limit.",
            "errorType": "RATE_LIMIT",
            "correlationId": "c033cdaa-2c40-4a64-ae48-b4cec88dad24",
            "policyName": "TEN_SECONDLY_ROLLING",
        }
        return Answer(429, body)

    # --- objects ---

    def _read(self, request: Request, kind: str) -> Answer:
        inputs = self._inputs(request)
        body = request.body
        wanted, records = self.properties[kind], self.contacts if kind == "contacts" else self.tasks
        key = body.get("idProperty")
        self.rule(key is None or wanted.get(key, {}).get("hasUniqueValue"), f"idProperty {key} has no unique values")
        history = body.get("propertiesWithHistory") or []
        self.rule(not history or len(inputs) <= 50, "at most 50 inputs where property histories are asked for")
        by = {values.get(key, ""): id for id, values in records.items()} if key else {id: id for id in records}
        found, missing = [], []
        for one in inputs:
            if (id := by.get(one["id"])) is None:
                missing.append(one["id"])
            else:
                asked = {name: records[id].get(name) for name in body.get("properties", ()) if name in wanted}
                found.append(_record(id, asked))
        if not missing:
            return _batch(found)
        named = kind.upper().removesuffix("S")
        said = f"Could not get some {named} objects, they may be deleted or not exist. Check that ids are valid."
        return _batch(found, [_error("OBJECT_NOT_FOUND", said, ids=missing)])

    def _update(self, request: Request) -> Answer:
        found, missing = [], []
        inputs = self._inputs(request)
        for one in inputs:
            self.rule(one.get("properties"), "an update without properties")
            self._check("contacts", one["properties"])
        for one in inputs:
            if one["id"] in self.contacts:
                self.contacts[one["id"]].update(one["properties"])
                found.append(_record(one["id"], one["properties"]))
            else:
                missing.append(one["id"])
        return _batch(
            found, [_error("OBJECT_NOT_FOUND", "Could not get some CONTACT objects", ids=missing)] * bool(missing)
        )

    def _create_tasks(self, request: Request) -> Answer:
        made, errors = [], []
        inputs = self._inputs(request, ids=False)
        traces = [one.get("objectWriteTraceId") for one in inputs]
        self.rule(len({*traces}) == len(traces), "each input has an objectWriteTraceId of its own")
        unique = [name for name, one in self.properties["tasks"].items() if one["hasUniqueValue"]]
        for one, trace in zip(inputs, traces, strict=True):
            values = one.get("properties", {})
            self.rule(values.get("hs_timestamp"), "hs_timestamp is required")
            self._check("tasks", values)
            contacts = [self._associated(association) for association in one.get("associations", ())]
            taken = any(task.get(name) == values.get(name) for name in unique for task in self.tasks.values())
            if taken:
                errors.append(_error("CONFLICT", "a task with this value exists", objectWriteTraceId=[trace]))
            elif not all(id in self.contacts for id in contacts):
                errors.append(_error("VALIDATION_ERROR", "no such contact", objectWriteTraceId=[trace]))
            else:
                id = self._id()
                self.tasks[id], self.associations[id] = dict(values), contacts
                made.append({**_record(id, values), "objectWriteTraceId": trace})
        return _batch(made, errors, status=201)

    def _associated(self, association: Mapping[str, Any]) -> str:
        (kind,) = association["types"]
        defined = kind["associationCategory"] == "HUBSPOT_DEFINED" and kind["associationTypeId"] == 204
        self.rule(defined, "a task goes with a contact by the HUBSPOT_DEFINED type 204")
        return str(association["to"]["id"])

    def _inputs(self, request: Request, ids: bool = True) -> list[dict[str, Any]]:
        inputs: list[dict[str, Any]] = request.body["inputs"]
        self.rule(inputs, "a batch has an input at least")
        self.rule(len(inputs) <= 100, "The maximum number of inputs supported in a batch is 100")
        named = [one.get("id") for one in inputs] if ids else []
        self.rule(len({*named}) == len(named), "Duplicate IDs found in batch input")
        self.rule(all(isinstance(id, str) for id in named), "ids are strings")
        return inputs

    def _check(self, kind: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            own = self.properties[kind].get(name)
            self.rule(own, f'Property "{name}" does not exist (PROPERTY_DOESNT_EXIST)')
            self.rule(isinstance(value, str), f"the value of {name} is a string")
            assert own
            if own["type"] == "number" and value:
                self.rule(_is_number(value), f"{value} was not a valid number (INVALID_INTEGER)")
            if name in CHOICES and value:
                self.rule(value in CHOICES[name], f"{value} was not one of the allowed options (INVALID_OPTION)")

    # --- properties ---

    def _get_property(self, request: Request, kind: str, name: str) -> Answer:
        found = self.properties[kind].get(name)
        return Answer(200, found) if found else self.refusal(404, f"Property {name} does not exist")

    def _create_property(self, request: Request, kind: str) -> Answer:
        body = request.body
        for key in ("name", "label", "type", "fieldType", "groupName"):
            self.rule(body.get(key), f"a property has a {key}")
        self.rule(re.fullmatch(r"[a-z][a-z0-9_]*", body["name"]), "a name is of small letters, digits and underscores")
        self.rule(body["fieldType"] in TYPES.get(body["type"], ()), f"no {body['fieldType']} of type {body['type']}")
        self.rule(body["groupName"] in self.groups[kind], f"there is no group {body['groupName']}")
        self.rule(body["name"] not in self.properties[kind], f"A property named {body['name']} already exists", 409)
        uniques = sum(one["hasUniqueValue"] for one in self.properties[kind].values())
        self.rule(not body.get("hasUniqueValue") or uniques < 10, "at most 10 properties with unique values")
        made = {**_property(body["name"], body["type"], bool(body.get("hasUniqueValue"))), "label": body["label"]}
        self.properties[kind][body["name"]] = made
        return Answer(201, made)

    def _group(self, request: Request, kind: str, name: str) -> Answer:
        if name not in self.groups[kind]:
            return self.refusal(404, f"no group {name}")
        return Answer(200, {"name": name, "label": name, "displayOrder": 1, "archived": False})

    def _create_group(self, request: Request, kind: str) -> Answer:
        body = request.body
        self.rule(body.get("name") and body.get("label"), "a group has a name and a label")
        self.rule(body["name"] not in self.groups[kind], "the group exists", 409)
        self.groups[kind].add(body["name"])
        return Answer(201, {**body, "displayOrder": 1, "archived": False})

    # --- lists ---

    def _list_by_name(self, request: Request, name: str) -> Answer:
        found = next((one for one in self.lists.values() if one["name"] == name), None)
        return Answer(200, {"list": found}) if found else self.refusal(404, f"List {name} does not exist")

    def _create_list(self, request: Request) -> Answer:
        body = request.body
        for key in ("name", "objectTypeId", "processingType"):
            self.rule(body.get(key), f"a list has a {key}")
        self.rule(body["processingType"] in ("MANUAL", "DYNAMIC", "SNAPSHOT"), "no such processingType")
        self.rule(all(one["name"] != body["name"] for one in self.lists.values()), "a list of this name exists")
        id = self._id()
        keys = ("name", "objectTypeId", "processingType")
        self.lists[id] = {
            "listId": id,
            "listVersion": 1,
            "processingStatus": "COMPLETE",
            **{key: body[key] for key in keys},
        }
        self.members[id] = set()
        return Answer(200, {"list": self.lists[id]})

    def _memberships(self, request: Request, id: str, what: str) -> Answer:
        if id not in self.lists:
            raise Refused(self.refusal(404, f"List does not exist with ID {id}."))
        self.rule(self.lists[id]["processingType"] in ("MANUAL", "SNAPSHOT"), "the list is dynamic")
        ids: Sequence[str] = request.body
        self.rule(isinstance(ids, list) and ids, "the body is a list of ids")
        self.rule(len(ids) <= 100_000, "at most 100,000 ids")
        self.rule(all(isinstance(one, str) for one in ids), "ids of records are strings")
        known = [one for one in ids if one in self.contacts]
        missing = [one for one in ids if one not in self.contacts]
        changed = [one for one in known if (one in self.members[id]) == (what == "remove")]
        self.members[id] = self.members[id] | {*known} if what == "add" else self.members[id] - {*known}
        said = {"recordsIdsAdded": [], "recordIdsRemoved": [], "recordIdsMissing": missing}
        return Answer(200, {**said, "recordsIdsAdded" if what == "add" else "recordIdsRemoved": changed})

    def _id(self) -> str:
        self._next += 1
        return str(self._next)


def _property(name: str, type: str, unique: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": type,
        "fieldType": "number" if type == "number" else "text",
        "description": "",
        "groupName": "contactinformation",
        "options": [],
        "hasUniqueValue": unique,
    }


def _record(id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": id, "properties": dict(values), "createdAt": MOMENT, "updatedAt": MOMENT, "archived": False}


def _batch(results: list[Any], errors: Sequence[Any] = (), status: int = 200) -> Answer:
    body = {"status": "COMPLETE", "results": results, "startedAt": MOMENT, "completedAt": MOMENT}
    return Answer(207, {**body, "numErrors": len(errors), "errors": list(errors)}) if errors else Answer(status, body)


def _error(category: str, message: str, **context: list[Any]) -> dict[str, Any]:
    return {"status": "error", "category": category, "message": message, "context": context}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
