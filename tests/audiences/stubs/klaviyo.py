"""Klaviyo as its reference of revision 2026-10-15 says it answers: lists, profiles, imports, with every rule checked.

Rules: "Get Lists", "Create List", "Get Profiles", "Bulk Import Profiles" and its jobs, "Add Profiles to List", "Remove
Profiles from List", and "Rate limits, status codes, and errors" (fixed windows of a second and a minute, each route).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tests.audiences.stubs.platform import Answer, Platform, Refused, Request

KEY = "pk_0123456789abcdef"
REVISION = "2026-10-15"
MOMENT = "2026-11-24T12:00:00+00:00"
# Requests in a second, and in a minute.
MEDIUM, LARGE = (10, 150), (75, 750)


class Klaviyo(Platform):
    """One account."""

    media = "application/vnd.api+json"

    def __init__(self, polls: int = 1, page: int = 100) -> None:
        super().__init__()
        self.profiles: dict[str, dict[str, Any]] = {}
        self.lists: dict[str, str] = {}
        self.members: dict[str, set[str]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.failing: dict[str, str] = {}  # profile -> why its import fails
        self.polls, self.page = polls, page  # looks until a job is done; profiles a page at most
        self._counts: Counter[tuple[str, int]] = Counter()
        self._next = 0

    def profile(self, external_id: str, **properties: Any) -> str:
        """Make a profile, as the shop does; its id."""
        id = self._id("01HP")
        self.profiles[id] = {"external_id": external_id, "properties": dict(properties)}
        return id

    def handle(self, request: Request) -> Answer:
        said = request.headers.get("authorization", "")
        self.rule(said.startswith("Klaviyo-API-Key "), "every request has Authorization: Klaviyo-API-Key KEY", 401)
        self.rule(said == f"Klaviyo-API-Key {KEY}", "The API key specified is invalid.", 401, kept=False)
        self.rule(request.headers.get("revision") == REVISION, f"every request has the header revision: {REVISION}")
        if request.body is not None:
            kind = request.headers.get("content-type", "")
            self.rule(kind in ("application/json", "application/vnd.api+json"), f"the body is JSON, not {kind}", 415)
        for method, path, rate, handler in (
            ("GET", r"/api/lists", LARGE, self._get_lists),
            ("POST", r"/api/lists", MEDIUM, self._create_list),
            ("POST", r"/api/lists/(\w+)/relationships/profiles", MEDIUM, self._add),
            ("DELETE", r"/api/lists/(\w+)/relationships/profiles", MEDIUM, self._remove),
            ("GET", r"/api/profiles", LARGE, self._get_profiles),
            ("POST", r"/api/profile-bulk-import-jobs", MEDIUM, self._import),
            ("GET", r"/api/profile-bulk-import-jobs/(\w+)", MEDIUM, self._job),
            ("GET", r"/api/profile-bulk-import-jobs/(\w+)/import-errors", MEDIUM, self._errors),
        ):
            found = re.fullmatch(path, request.path)
            if found and method == request.method:
                self._rate(f"{method} {path}", rate, request.at_s)
                return handler(request, *found.groups())
        self.rule(False, f"there is no {request}", 404)
        raise AssertionError

    def refusal(self, status: int, said: str) -> Answer:
        error = {
            "id": "3a8d9d0c-6b1f-4a3e-9a36-2f5d7f3e1f20",
            "status": status,
            "code": {401: "authentication_failed", 404: "not_found", 429: "throttled"}.get(status, "invalid"),
            "title": "Invalid input.",
            "detail": said,
            "source": {"pointer": "/data"},
        }
        return Answer(status, {"errors": [error]})

    def too_many(self) -> Answer:
        return self.refusal(429, "Request was throttled. Expected available in 3 seconds.")._replace(
            headers={"Retry-After": "3"}
        )

    def _rate(self, route: str, rate: tuple[int, int], at_s: float) -> None:
        for allowed, seconds in zip(rate, (1, 60), strict=True):
            window = (f"{route} {seconds}", int(at_s // seconds))
            self._counts[window] += 1
            if self._counts[window] > allowed:
                self.throttled += 1
                raise Refused(self.too_many())

    # --- lists ---

    def _get_lists(self, request: Request) -> Answer:
        self._page_size(request, 10)
        found = re.fullmatch(r'equals\(name,(".*")\)', request.query.get("filter", ""))
        self.rule(found, 'a filter of lists is equals(name,"...")')
        assert found
        self.rule(request.query.get("sort") in (None, "created", "-created", "id", "name"), "no such sort")
        named = [id for id, name in self.lists.items() if name == json.loads(found[1])]
        data = [{"type": "list", "id": id, "attributes": {"name": self.lists[id]}} for id in named[:10]]
        return Answer(200, {"data": data, "links": {"self": request.path, "next": None}})

    def _create_list(self, request: Request) -> Answer:
        data = request.body["data"]
        self.rule(data["type"] == "list" and data["attributes"].get("name"), "a list has a type and a name")
        id = self._id("L")
        self.lists[id], self.members[id] = data["attributes"]["name"], set()
        return Answer(
            201, {"data": {"type": "list", "id": id, "attributes": data["attributes"]}, "links": {"self": ""}}
        )

    def _add(self, request: Request, list_id: str) -> Answer:
        self.members[list_id] |= self._named(request, list_id)
        return Answer(204)

    def _remove(self, request: Request, list_id: str) -> Answer:
        self.members[list_id] -= self._named(request, list_id)
        return Answer(204)

    def _named(self, request: Request, list_id: str) -> set[str]:
        if list_id not in self.lists:
            raise Refused(self.refusal(404, f"A list with id {list_id} does not exist."))
        data = request.body["data"]
        self.rule(data, "a request names a profile at least")
        self.rule(len(data) <= 1000, "at most 1000 profiles a request")
        self.rule(all(one["type"] == "profile" for one in data), "members are of type profile")
        ids = [one["id"] for one in data]
        self.rule(len({*ids}) == len(ids), "a profile is named once")
        self.rule(all(id in self.profiles for id in ids), "profiles exist", 404)
        return {*ids}

    # --- profiles ---

    def _get_profiles(self, request: Request) -> Answer:
        size = self._page_size(request, 100)
        said = request.query.get("filter", "")
        self.rule(len(quote(said)) <= 8000, "URI Too Long", 414)
        found = re.fullmatch(r"any\(external_id,(\[.*\])\)", said)
        self.rule(found, "a filter of profiles is any(external_id,[...])")
        assert found
        fields = request.query.get("fields[profile]", "").split(",")
        self.rule({*fields} <= {"", "external_id", "properties", "email"}, f"no such fields: {fields}")
        wanted = {*json.loads(found[1])}
        named = [(id, own) for id, own in sorted(self.profiles.items()) if own["external_id"] in wanted]
        start = int(request.query.get("page[cursor]", "c0")[1:])
        data = [
            {"type": "profile", "id": id, "attributes": {key: own.get(key) for key in fields if key}}
            for id, own in named[start : start + size]
        ]
        following = f"{self.url}/api/profiles?filter={quote(said)}&page%5Bcursor%5D=c{start + size}"
        return Answer(200, {"data": data, "links": {"next": following if len(named) > start + size else None}})

    def _import(self, request: Request) -> Answer:
        data = request.body["data"]
        self.rule(data["type"] == "profile-bulk-import-job", "a job is of type profile-bulk-import-job")
        profiles = data["attributes"]["profiles"]["data"]
        self.rule(0 < len(profiles) <= 10_000, "at most 10,000 profiles a job")
        self.rule(len(json.dumps(request.body)) <= 5_000_000, "at most 5 MB a job", 413)
        self.rule(all(len(json.dumps(one)) <= 100_000 for one in profiles), "at most 100 KB a profile", 413)
        errors = []
        for place, one in enumerate(profiles):
            self.rule(one.get("type") == "profile" and "attributes" in one, "a profile has a type and attributes")
            self.rule(one.get("id") or one["attributes"].get("external_id"), "a profile has an identifier")
            if one.get("id") in self.failing:
                pointer = {"pointer": f"/data/attributes/profiles/data/{place}"}
                detail = {"code": "invalid", "title": "Invalid input.", "detail": self.failing[one["id"]]}
                errors.append({"type": "import-error", "id": f"e{place}", "attributes": {**detail, "source": pointer}})
            else:
                self._upsert(one)
        id = self._id("J")
        self.jobs[id] = {"polls": 0, "total": len(profiles), "errors": errors}
        return Answer(202, {"data": self._described(id), "links": {"self": ""}})

    def _upsert(self, one: Mapping[str, Any]) -> None:
        own = self.profiles.setdefault(one.get("id") or self._id("NEW"), {"external_id": None, "properties": {}})
        own["properties"].update(one["attributes"].get("properties") or {})
        for name in ((one.get("meta") or {}).get("patch_properties") or {}).get("unset") or ():
            own["properties"].pop(name, None)

    def _job(self, request: Request, id: str) -> Answer:
        self.rule(id in self.jobs, "no such job", 404)
        self.jobs[id]["polls"] += 1
        return Answer(200, {"data": self._described(id), "links": {"self": ""}})

    def _described(self, id: str) -> dict[str, Any]:
        job = self.jobs[id]
        done = job["polls"] >= self.polls
        status = "complete" if done else "processing" if job["polls"] else "queued"
        counts = {"total_count": job["total"], "completed_count": job["total"] if done else 0}
        failed = {"failed_count": len(job["errors"]) if done else 0}
        attributes = {"status": status, "created_at": MOMENT, **counts, **failed}
        return {"type": "profile-bulk-import-job", "id": id, "attributes": attributes}

    def _errors(self, request: Request, id: str) -> Answer:
        size = self._page_size(request, 100)
        start = int(request.query.get("page[cursor]", "c0")[1:])
        errors = self.jobs[id]["errors"]
        following = f"{self.url}{request.path}?page%5Bcursor%5D=c{start + size}"
        more = len(errors) > start + size
        return Answer(200, {"data": errors[start : start + size], "links": {"next": following if more else None}})

    def _page_size(self, request: Request, most: int) -> int:
        size = int(request.query.get("page[size]", min(most, 20)))
        self.rule(1 <= size <= most, f"a page has at most {most}")
        return min(size, self.page)

    def _id(self, before: str) -> str:
        self._next += 1
        return f"{before}{self._next:06d}"
