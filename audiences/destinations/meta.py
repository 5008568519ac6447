"""Owns the destination Meta: audiences as customer file custom audiences, by the official SDK.

Meta takes hashes in rows and matches them later, within a day; its answer says how many rows it received and how many
of them it could not read.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from audiences.destinations import options as base
from audiences.destinations.options import Secret
from audiences.destinations.protocol import Busy, DestinationError, Limits, Outcome, Person, Purpose, Rejected
from service.core.errors import PropensityError

MEMBERS: Final = 10_000  # rows a request
KEYS: Final = {"meta.email": "EMAIL", "meta.phone": "PHONE", "meta.external_id": "EXTERN_ID"}
FLAGGED: Final = 471  # the status of an audience that Meta lets nobody change until an appeal
SOME_PAGE: Final = 200  # audiences a page of a listing
PASSING: Final = {1, 2}  # errors of the API itself that may pass
THROTTLED: Final = {4, 17, 32, 341, 613, *range(80000, 80015)}  # of an app, a user, an account; 80003: custom audiences
HASH: Final = re.compile(r"[0-9a-f]{64}")


def _account(value: object) -> object:
    text = str(value).removeprefix("act_")
    if not re.fullmatch(r"\d+", text):
        raise ValueError("write the number of the ad account, as Ads Manager shows it")
    return text


def _private(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in {"127.0.0.1", "localhost"}):
        raise ValueError("write an address that begins with https://")
    return url.rstrip("/")


class Options(base.Options):
    """Which ad account, on whose behalf, and how audiences are made."""

    ad_account_id: Annotated[str, BeforeValidator(_account)] = Field(description="The ad account that owns the lists.")
    access_token: Secret = Field(description="Of a system user, with the permission `ads_management`.")
    app_secret: Secret | None = Field(None, description="Of the app; proves each request where the app demands it.")
    customer_file_source: Literal["USER_PROVIDED_ONLY", "PARTNER_PROVIDED_ONLY", "BOTH_USER_AND_PARTNER_PROVIDED"] = (
        Field("USER_PROVIDED_ONLY", description="Where the addresses come from, as Meta wants to know of each list.")
    )
    prefix: str = Field("Propensity ", description="Put before the name of an audience to name its list.")
    timeout_s: float = Field(60, gt=0, le=600, description="Seconds that one request may take.")
    endpoint: Annotated[str, AfterValidator(_private)] = Field(
        "https://graph.facebook.com", description="Address of the Graph API; another one only for tests."
    )


class Row(NamedTuple):
    """One entry of an upload: at most one hash of each key, the empty text where there is none."""

    place: int  # of the person in the batch
    values: tuple[str, ...]


def build(name: str, options: Options) -> Meta:
    """The destination. Raises PropensityError where the extra is missing."""
    try:
        from facebook_business.api import FacebookAdsApi
        from facebook_business.session import FacebookSession
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{name}: the kind meta needs {error.name}, which is not installed; "
            "install it with pip install 'propensity[meta]'"
        ) from None
    session = FacebookSession(
        app_secret=options.app_secret.get_secret_value() if options.app_secret else None,
        access_token=options.access_token.get_secret_value(),
        timeout=options.timeout_s,
    )
    session.GRAPH = options.endpoint
    # The SDK takes every body that is no JSON for success, whatever its status (26.0.3), and trips over some errors.
    session.requests.hooks["response"].append(_answered)
    logging.getLogger("urllib3.connectionpool").addFilter(_has_no_token)
    return Meta(name, options, FacebookAdsApi(session))


class Meta:
    """Customer file custom audiences of one ad account."""

    purpose = Purpose.ADS
    # The smallest tier has 5,000 requests an hour; a batch takes two where people have several addresses.
    limits = Limits(MEMBERS, 40, 60.0)
    forms: tuple[str, ...] = tuple(KEYS)
    fields: tuple[str, ...] = ()

    def __init__(self, name: str, options: Options, api: Any) -> None:
        self.name = name
        self._options = options
        self._api = api

    # --- the protocol ---

    def open(self, audience: str) -> str:
        """The number of the custom audience called prefix + audience; of several the one that was made first."""
        from facebook_business.adobjects.adaccount import AdAccount

        name = self._options.prefix + audience
        account = AdAccount(f"act_{self._options.ad_account_id}", api=self._api)
        with _told():
            every = account.get_custom_audiences(
                fields=["id", "name", "subtype", "operation_status"], params={"limit": SOME_PAGE}
            )
            found = [one for one in every if one.get("name") == name and one.get("subtype") == "CUSTOM"]
            if not found:
                made = account.create_custom_audience(
                    params={
                        "name": name,
                        "subtype": "CUSTOM",
                        "description": "Kept in step by Propensity; changes made by hand are overwritten.",
                        "customer_file_source": self._options.customer_file_source,
                    }
                )
                return str(made["id"])
        first = min(found, key=lambda one: int(one["id"]))
        if dict(first.get("operation_status") or {}).get("code") == FLAGGED:
            raise Rejected(f"Meta has flagged the audience {name!r} and takes no changes; appeal in Audience Manager")
        return str(first["id"])

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Upload the rows of people."""
        return self._upload(list_id, people, removing=False)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Take off the list whom Meta finds by one of the hashes."""
        return self._upload(list_id, people, removing=True)

    def check(self) -> str:
        """Ask for the ad account's name."""
        from facebook_business.adobjects.adaccount import AdAccount

        with _told():
            account = AdAccount(f"act_{self._options.ad_account_id}", api=self._api).api_get(fields=["name"])
        return f"Meta shows the ad account {self._options.ad_account_id}, {account.get('name')!r}"

    # --- requests ---

    def _upload(self, list_id: str, people: Sequence[Person], *, removing: bool) -> list[Outcome]:
        rows, outcomes = _rows(people)
        parts = [rows[start : start + MEMBERS] for start in range(0, len(rows), MEMBERS)]
        number = secrets.randbits(62) + 1
        for sequence, part in enumerate(parts, 1):
            session = {
                "session_id": number,
                "batch_seq": sequence,
                "last_batch_flag": sequence == len(parts),
                "estimated_num_total": len(rows),
            }
            try:
                answer = self._send(list_id, part, session, removing)
            except Rejected as error:
                if sequence == 1:
                    raise
                raise Busy(f"{error}; a part of the batch was taken before") from None
            for row, outcome in zip(part, _outcomes(part, number, answer), strict=True):
                # Who has one row on a list must be removable, and is removed when all of them are.
                if row.place not in outcomes or outcome.accepted != removing:
                    outcomes[row.place] = outcome
        return [outcomes[place] for place in range(len(people))]

    def _send(self, list_id: str, rows: Sequence[Row], session: Mapping[str, Any], removing: bool) -> dict[str, Any]:
        from facebook_business.adobjects.customaudience import CustomAudience

        columns = [column for column in range(len(KEYS)) if any(row.values[column] for row in rows)]
        keys = [list(KEYS.values())[column] for column in columns]
        data = [[row.values[column] for column in columns] for row in rows]
        form = {"schema": keys, "users": data, "is_raw": True, "pre_hashed": True, "session": dict(session)}
        with _told():
            if removing:
                # The SDK's remove_users puts the rows into the URL, which Meta closes from 300 of them on (its issue
                # 717); the Graph API takes a POST that says it is a DELETE.
                params = CustomAudience.format_params(**form) | {"method": "delete"}
                response = self._api.call("POST", (list_id, "users"), params=params)
            else:
                response = CustomAudience(list_id, api=self._api).add_users(**form)
        return dict(response.json())


def _rows(people: Sequence[Person]) -> tuple[list[Row], dict[int, Outcome]]:
    """Rows for people, and the outcome of whom there is nothing to send of, by place.

    Who has several addresses has several rows: the first of each key, the second of each, and so on.
    """
    rows: list[Row] = []
    outcomes: dict[int, Outcome] = {}
    for place, person in enumerate(people):
        held = [person.identifiers.get(form, ()) for form in KEYS]
        if not any(held):
            outcomes[place] = Outcome(False, f"not sent: has none of {', '.join(KEYS)}")
        elif not all(HASH.fullmatch(value) for values in held for value in values):
            outcomes[place] = Outcome(False, "not sent: an identifier is not 64 lower-case hex digits of SHA-256")
        else:
            rows += [Row(place, values) for values in zip_longest(*held, fillvalue="")]
    return rows, outcomes


def _outcomes(rows: Sequence[Row], session: int, answer: Mapping[str, Any]) -> list[Outcome]:
    """What Meta said of each row. It names samples of what it could not read, not all of it."""
    invalid = int(answer.get("num_invalid_entries") or 0)
    named = set(HASH.findall(json.dumps(answer.get("invalid_entry_samples")))) if invalid else set()
    taken = Outcome(
        True, f"session {session}: {answer.get('num_received', 'an unknown number')} received, {invalid} invalid"
    )
    refused = Outcome(False, f"session {session}: invalid entry")
    return [refused if named.intersection(row.values) else taken for row in rows]


# --- answers and errors ---


def _answered(response: Any, *_: Any, **__: Any) -> None:
    """Raise for what is not the JSON of a request that was carried out, before the SDK looks at it."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        message = f"Meta answered {response.status_code} with something that is no JSON object"
        lasts = 400 <= response.status_code < 500 and response.status_code != 429
        raise Rejected(message) if lasts else Busy(message, _delay_s(response.headers))
    if "error" in body or response.status_code >= 400 or body.get("success") is False:
        given = body.get("error")
        raise _error(response.status_code, given if isinstance(given, dict) else {}, response.headers)


def _error(status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> DestinationError:
    code = error.get("code")
    words = HASH.sub("…", str(error.get("error_user_msg") or error.get("message") or f"status {status}"))[:300]
    places = {"code": code, "subcode": error.get("error_subcode"), "trace": error.get("fbtrace_id")}
    where = ", ".join(f"{name} {value}" for name, value in places.items() if value is not None)
    message = f"Meta: {words}" + (f" ({where})" if where else "")
    passes = error.get("is_transient") is True or code in PASSING or code in THROTTLED
    if passes or status == 429 or status >= 500:
        return Busy(message, _delay_s(headers))
    return Rejected(message)


def _delay_s(headers: Mapping[str, str]) -> float | None:
    """The longest wait that the headers ask for: minutes by use case of a business, or seconds."""
    try:
        usage = json.loads(headers.get("X-Business-Use-Case-Usage") or "{}")
        minutes = [case.get("estimated_time_to_regain_access") or 0 for cases in usage.values() for case in cases]
        seconds = float(headers.get("Retry-After") or 0)
    except (ValueError, AttributeError, TypeError):
        return None
    return max([seconds, *(60.0 * minute for minute in minutes)]) or None


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the network raises into what the synchronisation understands: its words hold the address's token."""
    from requests import RequestException

    try:
        yield
    except RequestException as error:
        raise Busy(f"Meta does not answer: {type(error).__name__}") from None


def _has_no_token(record: logging.LogRecord) -> bool:
    """At DEBUG urllib3 writes addresses, and the SDK puts the access token into them."""
    return "access_token=" not in record.getMessage()
