"""Klaviyo by its official client: profiles keep score and segment, a list is an audience.

People are profiles that their `external_id`, the customer's own id of a user, tells apart. No profile is ever made,
and no consent to be written to is given or taken. On a profile we also keep `propensity_lists`, the lists that we put
it on: once it is on none any more, what we keep on it is removed, so that nobody who left, or withdrew consent, keeps
a score.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import klaviyo_api
import openapi_client
from openapi_client.rest import RESTClientObject
from pydantic import Field

from audiences.destinations import options
from audiences.destinations.crm import FORM, LISTS, NOBODY, TOLD, Client, added, after_s, property_of, removed
from audiences.destinations.protocol import Busy, Limits, Outcome, Person, Purpose, Rejected

MEMBERS: Final = 1000  # "Add Profiles to List", "Remove Profiles from List": profiles a request
PAGE: Final = 100  # "Get Profiles": profiles a page
FILTER: Final = 6000  # characters of an encoded filter: an address longer than 8 kB is refused by many servers


class Options(options.Options):
    """What `destinations.yaml` says of a Klaviyo account."""

    api_key: options.Secret = Field(description="Private API key.")
    prefix: str = Field("Propensity ", description="Put before the name of an audience to name its list.")
    fields: tuple[options.Kept, ...] = Field(
        ("propensity", "segment"), description="Fields that profiles keep; [] for lists alone."
    )
    job_wait_s: float = Field(120, gt=0, description="Seconds to wait for an import of fields; then it is tried again.")
    job_poll_s: float = Field(1, gt=0, description="Seconds between two looks at an import.")
    timeout_s: float = Field(30, gt=0, description="Seconds to wait for an answer.")
    endpoint: str = Field("https://a.klaviyo.com", description="Address of the API.")


class Profile(NamedTuple):
    """A profile as it was read: its id, and our lists that it is on."""

    id: str
    lists: frozenset[str]


def build(name: str, given: Options) -> Klaviyo:
    """The destination of these options."""
    return Klaviyo(name, given)


class Klaviyo:
    """An account; see `protocol.Destination`."""

    purpose = Purpose.EMAIL
    forms: tuple[str, ...] = (FORM,)
    # A batch is up to ten requests for profiles (75 a second, 750 a minute), and one or a few of each other kind (10 a
    # second, 150 a minute): a batch a second stays within all of them.
    limits = Limits(members=MEMBERS, requests=1, seconds=1.0)

    def __init__(self, name: str, given: Options) -> None:
        self.name = name
        self.fields: tuple[str, ...] = given.fields
        self._given = given
        api = klaviyo_api.KlaviyoAPI(
            given.api_key.get_secret_value(),
            max_retries=1,  # of its own; the synchronisation tries again
            test_host=given.endpoint,
            options={"USE_DICTIONARY_FOR_RESPONSE_DATA": True},
        )
        api.configuration.retries = False
        api.api_client.rest_client = RESTClientObject(api.configuration)  # which alone reads `retries`
        self._ask = Client("Klaviyo", given.timeout_s, (openapi_client.ApiException,), _mapped).ask
        self._lists = api.Lists
        self._profiles = api.Profiles

    # --- what the synchronisation asks ---

    def open(self, audience: str) -> str:
        """The id of the audience's list: the oldest of its name, else a new one."""
        name = f"{self._given.prefix}{audience}"
        if found := self._named(name):
            return str(found[0]["id"])
        new = {"data": {"type": "list", "attributes": {"name": name}}}
        return str(self._ask("making a list", self._lists.create_list, new)["data"]["id"])

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> list[Outcome]:
        """Give profiles their fields, then put them on the list: what the list triggers finds the fields there."""
        found = self._read(people)
        wanted = {profile.id: (profile, person) for person in people for profile in _of(person, found)}
        refused = self._import(
            [self._values(profile, person, profile.lists | {list_id}) for profile, person in wanted.values()]
        )
        self._change(
            "putting on a list", self._lists.add_profiles_to_list, list_id, (id for id in wanted if id not in refused)
        )
        return [added("profile", _of(person, found), refused) for person in people]

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> list[Outcome]:
        """Take profiles off the list, and remove the fields of who is on no list of ours any more.

        A list that is gone has nobody, which is what is wanted.
        """
        found = self._read(people)
        leaving = {profile.id: profile for person in people for profile in _of(person, found)}
        self._change("taking off a list", self._lists.remove_profiles_from_list, list_id, leaving, missing=True)
        refused = self._import([self._left(profile, profile.lists - {list_id}) for profile in leaving.values()])
        return [removed("profile", _of(person, found), refused) for person in people]

    def check(self) -> str:
        """Read what a synchronisation reads first: a list, and profiles."""
        self._named(self._given.prefix)
        self._read([NOBODY])
        return "Klaviyo shows lists and profiles"

    def _named(self, name: str) -> Any:
        wanted = f"equals(name,{json.dumps(name, ensure_ascii=False)})"
        return self._ask("looking for a list", self._lists.get_lists, filter=wanted, sort="created")["data"]

    # --- profiles ---

    def _read(self, people: Sequence[Person]) -> dict[str, list[Profile]]:
        """Profiles by their external id; Klaviyo allows several of one."""
        found: dict[str, list[Profile]] = {}
        for ids in _filters(sorted({id for person in people for id in person.identifiers.get(FORM, ())})):
            for record in self._pages(
                "reading profiles",
                self._profiles.get_profiles,
                filter=f"any({FORM},[{','.join(ids)}])",
                fields_profile=[FORM, "properties"],
            ):
                own = record["attributes"]
                lists = (own.get("properties") or {}).get(LISTS) or ()
                found.setdefault(own[FORM], []).append(Profile(record["id"], frozenset(map(str, lists))))
        return found

    def _values(self, profile: Profile, person: Person, on: Iterable[str]) -> dict[str, Any]:
        values = {property_of(field): _value(person.fields.get(field)) for field in self.fields}
        return {"type": "profile", "id": profile.id, "attributes": {"properties": {**values, LISTS: sorted(on)}}}

    def _left(self, profile: Profile, rest: Iterable[str]) -> dict[str, Any]:
        if on := sorted(rest):
            return {"type": "profile", "id": profile.id, "attributes": {"properties": {LISTS: on}}}
        gone = [*map(property_of, self.fields), LISTS]
        return {"type": "profile", "id": profile.id, "attributes": {}, "meta": {"patch_properties": {"unset": gone}}}

    def _change(
        self, what: str, call: Callable[..., Any], list_id: str, ids: Iterable[str], missing: bool = False
    ) -> None:
        members = [{"type": "profile", "id": id} for id in ids]
        for start in range(0, len(members), MEMBERS):
            self._ask(what, call, list_id, {"data": members[start : start + MEMBERS]}, missing=missing)

    # --- the import of fields ---

    def _import(self, profiles: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Update profiles by their ids and wait for the end; says of which ones it failed, and why."""
        if not profiles or not self.fields:
            return {}
        wanted = {"type": "profile-bulk-import-job", "attributes": {"profiles": {"data": list(profiles)}}}
        job = self._ask("importing fields", self._profiles.bulk_import_profiles, {"data": wanted})["data"]
        job = self._finished(job)
        if not job["attributes"].get("failed_count"):
            return {}
        refused: dict[str, str] = {}
        for error in self._pages(
            "reading errors of an import", self._profiles.get_errors_for_bulk_import_profiles_job, job["id"]
        ):
            own = error["attributes"]
            place = re.search(r"/profiles/data/(\d+)", (own.get("source") or {}).get("pointer") or "")
            meant = [profiles[int(place[1])]] if place else profiles  # of whom it does not say, may be anybody
            refused |= {one["id"]: f"{own['code']}: {own['detail']}"[:TOLD] for one in meant}
        return refused

    def _finished(self, job: Any) -> Any:
        """The job at its end. Raises Busy where that does not come in time."""
        end_s = time.monotonic() + self._given.job_wait_s
        while (status := job["attributes"]["status"]) in ("queued", "processing"):
            if time.monotonic() > end_s:
                raise Busy(f"Klaviyo: the import {job['id']} is still {status} after {self._given.job_wait_s:g} s")
            time.sleep(self._given.job_poll_s)
            job = self._ask("looking at an import", self._profiles.get_bulk_import_profiles_job, job["id"])["data"]
        if status != "complete":
            raise Busy(f"Klaviyo: the import {job['id']} was {status}")
        return job

    # --- asking ---

    def _pages(self, what: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Iterator[Any]:
        cursor: dict[str, Any] = {}
        while True:
            answer = self._ask(what, call, *arguments, page_size=PAGE, **named, **cursor)
            yield from answer["data"]
            following = (answer.get("links") or {}).get("next")
            if not following:
                return
            cursor = {"page_cursor": parse_qs(urlsplit(following).query)["page[cursor]"][0]}


def _mapped(what: str, error: Any) -> Busy | Rejected:
    """What a refusal means, in Klaviyo's words."""
    first = _first(error.body)
    said = f"Klaviyo, {what}: {error.status} {str(first.get('detail') or error.reason)[:TOLD]}"
    if first.get("id"):
        said = f"{said} ({first['id']})"
    if error.status == 429 or error.status >= 500:
        return Busy(said, after_s(error.headers))
    hints = {401: "; is api_key right?", 403: "; does the key have the scopes of docs/destinations/klaviyo.md?"}
    return Rejected(said + hints.get(error.status, ""))


def _first(body: str | None) -> dict[str, Any]:
    """The first error of a body of JSON:API; nothing of another."""
    try:
        first = json.loads(body or "")["errors"][0]
    except (ValueError, LookupError, TypeError):
        return {}
    return first if isinstance(first, dict) else {}


def _of(person: Person, found: Mapping[str, Sequence[Profile]]) -> list[Profile]:
    return [profile for id in person.identifiers.get(FORM, ()) for profile in found.get(id, ())]


def _value(value: str | float | None) -> str | float | None:
    """A value as Klaviyo takes it. Scores are float32, which seven digits hold."""
    if value is None or isinstance(value, str):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _filters(ids: Iterable[str]) -> Iterator[list[str]]:
    """Quoted ids in as many lists as pages and addresses ask for."""
    some: list[str] = []
    length = 0
    for id in ids:
        quoted = json.dumps(id, ensure_ascii=False)
        own = len(quote(quoted)) + 3
        if some and (len(some) == PAGE or length + own > FILTER):
            yield some
            some, length = [], 0
        some.append(quoted)
        length += own
    if some:
        yield some
