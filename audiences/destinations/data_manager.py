"""Owns the destination Google Data Manager: audiences as Customer Match lists of Google Ads, by the official client.

Google takes a request as a whole or not at all, and works it off later, within minutes or a day. So an outcome says
that a request has the member, and names the request; `review` asks what became of requests that were still under way.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, Literal, NamedTuple

from pydantic import Field

from audiences.destinations import customer_match
from audiences.destinations.customer_match import (
    BUSY,
    DAY_MS,
    DESCRIPTION,
    HASH,
    LONGEST_STAY_DAYS,
    CustomerMatch,
    Upload,
    name_of,
    settled,
    takes_no_contacts,
    uploads,
)
from audiences.destinations.protocol import Busy, DestinationError, Limits, Outcome, Person, Rejected
from service.core.errors import PropensityError

SCOPE: Final = "https://www.googleapis.com/auth/datamanager"
MEMBERS: Final = 10_000  # a request
IDENTIFIERS_OF_A_MEMBER: Final = 10
REQUESTS_A_MINUTE: Final = 300  # that change something; as many that read
REQUESTS_OF_A_BATCH: Final = 5  # one, but where people have many identifiers or Google names somebody it does not take
READS: Final = 250  # of the state of requests, at a time
FIELDS: Final = {"google.email": "email_address", "google.phone": "phone_number"}  # of UserIdentifier
ADDITION: Final = "addition"
REMOVAL: Final = "removal"
ANSWER: Final = re.compile(rf"({ADDITION}|{REMOVAL}) (.+?): [A-Z]")
REASON: Final = "PROCESSING_ERROR_REASON_"
PASSING: Final = {"INTERNAL_ERROR"}  # reasons for which a member may be taken the next time
NO_WORD: Final = {"INVALID_REQUEST_ID", "REQUEST_TOO_OLD", "NOT_FOUND"}  # of a request that Google knows nothing of
MEMBER: Final = re.compile(r"audience_members\[(\d+)\]")
ADVICE: Final = {
    "ACCESS_TOKEN_SCOPE_INSUFFICIENT": f"make credentials with the scope {SCOPE}",
    "INVALID_USER_LIST_ID": "the list was deleted, or is of another account",
    "NOT_ALLOWLISTED": "the account may not use Customer Match yet",
    "PERMISSION_DENIED": "give the user access to the account, or set login_customer_id",
    "SERVICE_DISABLED": "enable the Data Manager API in the Google Cloud project of the credentials",
    "TERMS_AND_CONDITIONS_NOT_SIGNED": "accept the customer data terms in Google Ads",
    "USER_PROJECT_DENIED": "name a project that may use the API in GOOGLE_CLOUD_QUOTA_PROJECT",
}


class Options(customer_match.Options):
    """Those of Customer Match, and what this API has of its own."""

    customer_match_terms: Literal["accepted"] = Field(
        description="That the account has accepted Google's terms of Customer Match, as each upload says."
    )
    endpoint: str = Field("datamanager.googleapis.com", description="Host of the API; another one only for tests.")


class Clients(NamedTuple):
    """One for each service."""

    lists: Any
    members: Any


class Status(NamedTuple):
    """How far Google is with a request, and how many members it did not take, and why."""

    name: str
    wrong: Mapping[str, int]

    @property
    def is_over(self) -> bool:
        """Whether Google has worked it off, well or not."""
        return self.name in {"SUCCESS", "PARTIAL_SUCCESS", "FAILED"}

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{count:,} {reason}" for reason, count in self.wrong.items())])


class Sent(NamedTuple):
    """What an answer of ours says: the requests that a batch went in, and whether they add or remove."""

    operation: str
    requests: Sequence[str]

    @classmethod
    def read(cls, answer: str) -> Sent:
        """The same of the words; there are no requests in those of anything else."""
        match = ANSWER.match(answer)
        return cls(match[1], match[2].split(", ")) if match else cls("", ())

    def told(self, how: object) -> str:
        """In words, which `read` understands."""
        return f"{self.operation} {', '.join(self.requests)}: {how}"

    def end(self, statuses: Sequence[Status | None]) -> Outcome | None:
        """What became of it. None where there is a request of which Google does not tell that yet."""
        known = [one for one in statuses if one and one.is_over]
        if not known or len(known) < len(statuses):
            return None
        worst = max(known, key=lambda one: ("SUCCESS", "PARTIAL_SUCCESS", "FAILED").index(one.name))
        if worst.name == "SUCCESS":
            return Outcome(True, self.told(worst))
        # Google does not say whom it did not take. Of a removal one may have withdrawn, so all are removed again.
        is_lost = worst.name == "FAILED" or self.operation == REMOVAL or any(PASSING & set(one.wrong) for one in known)
        return Outcome(not is_lost, self.told(worst), final=is_lost)


class Refused(Rejected):
    """A request that Google refused: for which reasons, and whom of its members it names, by place."""

    def __init__(self, message: str, reasons: set[str], members: Mapping[int, str]) -> None:
        super().__init__(message)
        self.reasons = reasons
        self.members = members


def build(name: str, options: Options) -> DataManager:
    """The destination. Raises PropensityError where the extra is missing or there are no credentials."""
    try:
        from google.ads import datamanager_v1
        from google.api_core.client_options import ClientOptions
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{name}: the kind google-data-manager needs {error.name}, which is not installed; "
            "install it with pip install 'propensity[google-data-manager]'"
        ) from None
    credentials = customer_match.credentials(name, options, SCOPE)
    given = {"credentials": credentials, "client_options": ClientOptions(api_endpoint=options.endpoint)}
    clients = Clients(datamanager_v1.UserListServiceClient(**given), datamanager_v1.IngestionServiceClient(**given))
    # At DEBUG the client logs whole requests, hashes included; clients read the level from the environment when made.
    logging.getLogger("google.ads.datamanager_v1").setLevel(logging.WARNING)
    return DataManager(name, options, clients, credentials)


class DataManager(CustomerMatch):
    """By the Data Manager API: a request for each batch, or a few."""

    limits = Limits(MEMBERS, REQUESTS_A_MINUTE // REQUESTS_OF_A_BATCH, 60.0)
    forms: tuple[str, ...] = tuple(FIELDS)
    late_ms = DAY_MS  # Google names no longest time; jobs of the Google Ads API take a day at most

    def __init__(self, name: str, options: Options, clients: Clients, credentials: Any) -> None:
        super().__init__(name, options, credentials)
        self._clients = clients
        self._asked: dict[str, Status | None] = {}  # in a review that took more than one go

    def review(self, answers: Sequence[str]) -> Sequence[Outcome | None]:
        """What became of answers that named requests under way, in their order; None where that is not known yet."""
        sent = [Sent.read(answer) for answer in answers]
        left = [one for one in dict.fromkeys(chain(*(one.requests for one in sent))) if one not in self._asked]
        for request in left[:READS]:
            self._asked[request] = self._status(request)
        if len(left) > READS:
            raise Busy(f"Google's Data Manager is asked of {READS} requests a minute; {len(left) - READS:,} left", 60.0)
        asked, self._asked = self._asked, {}
        return [one.end([asked[request] for request in one.requests]) for one in sent]

    def check(self) -> str:
        """Ask for a list of the account, of which there may be none."""
        self._lists("list_user_lists", page_size=1)
        return f"Google's Data Manager shows the lists of the account {self._options.customer_id}"

    # --- lists ---

    def _found(self, name: str) -> str | None:
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        pages = self._lists("list_user_lists", filter=f'display_name = "{quoted}"')
        with _told():
            lists = [one for one in pages if not one.read_only]  # asks for further pages itself
        for one in lists:
            is_contacts = [key.name for key in one.ingested_user_list_info.upload_key_types] == ["CONTACT_ID"]
            if is_contacts and one.membership_status.name != "CLOSED":
                stay = one.membership_duration  # none: for as long as may be
                return self._usable(name, str(one.name), LONGEST_STAY_DAYS if stay is None else stay.days)
        if lists:
            raise takes_no_contacts(name)
        return None

    def _made(self, name: str) -> str:
        wanted = {
            "display_name": name,
            "description": DESCRIPTION,
            "membership_duration": datetime.timedelta(days=self._options.membership_days),
            "ingested_user_list_info": {
                "upload_key_types": ["CONTACT_ID"],
                "contact_id_info": {"data_source_type": "DATA_SOURCE_TYPE_FIRST_PARTY"},
            },
        }
        return str(self._lists("create_user_list", user_list=wanted).name)

    # --- members ---

    def _upload(self, list_id: str, people: Sequence[Person], *, removing: bool) -> list[Outcome]:
        entries, refused = uploads(people, FIELDS, IDENTIFIERS_OF_A_MEMBER)
        number = list_id.rpartition("/")[2]  # also of the resource names of the Google Ads API
        waiting = [entries[start : start + MEMBERS] for start in range(0, len(entries), MEMBERS)]
        requests: list[str] = []
        taken: set[int] = set()
        asked = 0
        while waiting:
            part, asked = waiting.pop(0), asked + 1
            try:
                requests.append(self._send(number, part, removing))
                taken.update(upload.place for upload in part)
            except Refused as error:
                if not error.members or asked == REQUESTS_OF_A_BATCH:
                    if requests:
                        raise Busy(f"{error}; a part of the batch was taken before") from None
                    raise
                # Google takes nobody of a request in which it does not take one.
                refused |= {part[place].place: Outcome(False, words) for place, words in error.members.items()}
                if others := [upload for place, upload in enumerate(part) if place not in error.members]:
                    waiting.insert(0, others)
        sent = Sent(REMOVAL if removing else ADDITION, requests)
        outcome = Outcome(True, sent.told("PROCESSING"), final=False)
        return settled(len(people), taken, refused, outcome, removing=removing)

    def _send(self, number: str, entries: Sequence[Upload], removing: bool) -> str:
        """Send entries in one request; Google's id of it."""
        from google.ads import datamanager_v1 as api

        request = api.RemoveAudienceMembersRequest() if removing else api.IngestAudienceMembersRequest()
        raw = type(request).pb(request)
        raw.encoding = api.Encoding.HEX
        where = raw.destinations.add(product_destination_id=number)
        where.operating_account.account_type = api.ProductAccount.AccountType.GOOGLE_ADS
        where.operating_account.account_id = self._options.customer_id
        if self._options.login_customer_id:
            where.login_account.account_type = api.ProductAccount.AccountType.GOOGLE_ADS
            where.login_account.account_id = self._options.login_customer_id
        for entry in entries:
            data = raw.audience_members.add().composite_data.user_data
            for field, value in entry.identifiers:
                setattr(data.user_identifiers.add(), field, value)
        if not removing:  # who is removed may have agreed to nothing
            raw.consent.ad_user_data = api.ConsentStatus.CONSENT_GRANTED
            raw.consent.ad_personalization = api.ConsentStatus.CONSENT_GRANTED
            raw.terms_of_service.customer_match_terms_of_service_status = api.TermsOfServiceStatus.ACCEPTED
        method = "remove_audience_members" if removing else "ingest_audience_members"
        return str(self._call(self._clients.members, method, request).request_id)

    def _status(self, request: str) -> Status | None:
        """How far Google is with a request; None where it knows nothing of it."""
        try:
            answer = self._call(self._clients.members, "retrieve_request_status", {"request_id": request})
        except Refused as error:
            if error.reasons & NO_WORD:
                return None
            raise
        for one in type(answer).pb(answer).request_status_per_destination:  # of which our requests have one
            counts = one.error_info.error_counts
            wrong = {name_of(count, "reason").removeprefix(REASON): count.record_count for count in counts}
            return Status(name_of(one, "request_status"), wrong)
        return None

    # --- requests ---

    def _lists(self, method: str, **fields: Any) -> Any:
        """A request about lists of the account. It says in a header through which manager, others in a destination."""
        manager = self._options.login_customer_id
        through = [("login-account", _account(manager))] if manager else []
        request = {"parent": _account(self._options.customer_id), **fields}
        return self._call(self._clients.lists, method, request, metadata=through)

    def _call(self, client: Any, method: str, request: Any, **named: Any) -> Any:
        """One request, not tried again here, with a deadline: left to itself the client has none for lists."""
        self._refresh()
        with _told():
            return getattr(client, method)(request=request, retry=None, timeout=self._options.timeout_s, **named)


def _account(customer_id: str) -> str:
    return f"accountTypes/GOOGLE_ADS/accounts/{customer_id}"


# --- errors ---


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the client raises into what the synchronisation understands, without what was sent."""
    from google.api_core.exceptions import GoogleAPICallError

    try:
        yield
    except GoogleAPICallError as error:
        raise _error(error) from None


def _error(error: Any) -> DestinationError:
    code = error.grpc_status_code.name if error.grpc_status_code else "UNKNOWN"
    violations = [one for detail in _details(error, "BadRequest") for one in detail.field_violations]
    reasons = {code, error.reason or code, *(one.reason for one in violations if one.reason)}
    message = _words(error, code, violations) + _advice(reasons) + _id(error)
    if code in BUSY:
        return Busy(message, _delay_s(error))
    members: dict[int, str] = {}
    for one in violations:
        match = MEMBER.search(one.field)
        if not match:  # something is wrong with the request itself
            return Refused(message, reasons, {})
        members.setdefault(int(match[1]), _said(one))
    return Refused(message, reasons, members)


def _words(error: Any, code: str, violations: Sequence[Any]) -> str:
    said = [_said(one) for one in violations[:3]] or [_short(error.message or "")]
    quota = (error.metadata or {}).get("quota_limit")
    heads = dict.fromkeys([code, error.reason or code])
    return ": ".join(["Google's Data Manager", *heads, *([quota] if quota else []), "; ".join(said)])


def _said(violation: Any) -> str:
    return ": ".join(filter(None, [violation.reason, _short(violation.description or violation.field)]))


def _advice(reasons: set[str]) -> str:
    return "".join(f"; {advice}" for reason, advice in ADVICE.items() if reason in reasons)


def _id(error: Any) -> str:
    return "".join(f" (request {one.request_id})" for one in _details(error, "RequestInfo"))


def _short(words: str) -> str:
    return HASH.sub("…", " ".join(words.split()))[:200]


def _details(error: Any, kind: str) -> list[Any]:
    return [one for one in error.details if type(one).__name__ == kind]


def _delay_s(error: Any) -> float | None:
    delays = [one.retry_delay.seconds + one.retry_delay.nanos / 1e9 for one in _details(error, "RetryInfo")]
    return max(delays, default=0.0) or None
