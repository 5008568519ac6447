"""What both ways to Google's Customer Match have in common: on whose behalf, which lists, which hashes of people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from audiences.destinations import options as base
from audiences.destinations.options import Secret
from audiences.destinations.protocol import Busy, Outcome, Person, Purpose, Rejected
from service.core.errors import PropensityError

LONGEST_STAY_DAYS: Final = 540
DAY_MS: Final = 86_400_000
BUSY: Final = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "UNKNOWN"}
HASH: Final = re.compile(r"[0-9a-f]{64}")
DESCRIPTION: Final = "Kept in step by Propensity; changes made by hand are overwritten."  # of a list


def _digits(value: object) -> object:
    text = str(value).replace("-", "")
    if not re.fullmatch(r"\d{10}", text):
        raise ValueError("write the ten digits that Google Ads shows for the account, as 123-456-7890")
    return text


def _private(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in {"127.0.0.1", "localhost"}):
        raise ValueError("write an address that begins with https://")
    return url


Account = Annotated[str, BeforeValidator(_digits)]


class Options(base.Options):
    """Which account, on whose behalf, and how lists are made."""

    customer_id: Account = Field(description="The account that owns the lists.")
    login_customer_id: Account | None = Field(None, description="The manager account, where access goes through one.")
    client_id: str | None = Field(None, description="Of the OAuth client, with `client_secret` and `refresh_token`.")
    client_secret: Secret | None = Field(None, description="Of the OAuth client.")
    refresh_token: Secret | None = Field(None, description="Of the user who let the OAuth client in.")
    key_file: Path | None = Field(
        None, description="Key of a service account; without it and OAuth, Google's application default credentials."
    )
    prefix: str = Field("Propensity ", description="Put before the name of an audience to name its list.")
    membership_days: int = Field(
        LONGEST_STAY_DAYS, ge=1, le=LONGEST_STAY_DAYS, description="Days a member stays after it was added last."
    )
    timeout_s: float = Field(60, gt=0, le=600, description="Seconds that one request may take.")
    token_url: Annotated[str, AfterValidator(_private)] = Field(
        "https://oauth2.googleapis.com/token", description="Where OAuth refreshes; another one only for tests."
    )

    @model_validator(mode="after")
    def _one_identity(self) -> Self:
        given = [value is not None for value in (self.client_id, self.client_secret, self.refresh_token)]
        if any(given) and not all(given):
            raise ValueError("write client_id, client_secret and refresh_token together")
        if any(given) and self.key_file:
            raise ValueError("write either key_file or client_id, client_secret and refresh_token")
        return self


# --- credentials ---


def credentials(name: str, options: Options, scope: str) -> Any:
    """What Google knows us by. Raises PropensityError where there is nothing."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.oauth2 import credentials, service_account

    if options.client_id and options.client_secret and options.refresh_token:
        return credentials.Credentials(
            token=None,
            refresh_token=options.refresh_token.get_secret_value(),
            token_uri=options.token_url,
            client_id=options.client_id,
            client_secret=options.client_secret.get_secret_value(),
            scopes=[scope],
        )
    try:
        if options.key_file:
            return service_account.Credentials.from_service_account_file(str(options.key_file), scopes=[scope])
        return google.auth.default(scopes=[scope])[0]
    except OSError as error:
        raise PropensityError(f"{name}: key_file: {options.key_file}: {error.strerror}") from None
    except (GoogleAuthError, ValueError):
        raise PropensityError(
            f"{name}: no credentials for Google; write client_id, client_secret and refresh_token, "
            "or key_file, the key of a service account as Google gave it"
        ) from None


@contextmanager
def _told() -> Iterator[None]:
    from google.auth.exceptions import GoogleAuthError, TransportError

    try:
        yield
    except TransportError:
        raise Busy("Google's address for access tokens does not answer") from None
    except GoogleAuthError as error:
        words = str(error.args[0])[:200] if error.args else type(error).__name__
        if error.retryable:
            raise Busy(f"Google gives no access token just now: {words}") from None
        raise Rejected(f"Google gives no access token: {words}; renew the refresh token or the key file") from None


# --- lists ---


class CustomerMatch:
    """Customer Match lists of one account, by one of the APIs.

    One object serves one synchronisation, which sends nobody twice: what it sends cannot undo each other.
    """

    purpose = Purpose.ADS
    fields: tuple[str, ...] = ()

    def __init__(self, name: str, options: Options, credentials: Any) -> None:
        self.name = name
        self.keeps_ms = options.membership_days * DAY_MS
        self._credentials = credentials
        self._options = options

    def open(self, audience: str) -> str:
        """The resource name of the list called prefix + audience."""
        name = self._options.prefix + audience
        if found := self._found(name):
            return found
        try:
            return self._made(name)
        except Rejected:
            # Another synchronisation may have made it meanwhile: names are unique in an account.
            if found := self._found(name):
                return found
            raise

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Upload people, with their consent to both uses that Google asks about."""
        return self._upload(list_id, people, removing=False)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Take the identifiers of people off the list."""
        return self._upload(list_id, people, removing=True)

    def _found(self, name: str) -> str | None:
        """The resource name of the list of a name, None where there is none. Raises Rejected where it is of no use."""
        raise NotImplementedError

    def _made(self, name: str) -> str:
        """The resource name of a list that is made."""
        raise NotImplementedError

    def _upload(self, list_id: str, people: Sequence[Person], *, removing: bool) -> Sequence[Outcome]:
        """Send people, and tell how it stands."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Get an access token where there is none that holds, ahead of a request. Raises Busy and Rejected.

        Inside a request of gRPC a refused refresh could not be told from a broken network.
        """
        from google.auth.transport.requests import Request

        if not self._credentials.valid:
            with _told():
                self._credentials.refresh(partial(Request(), timeout=self._options.timeout_s))

    def _usable(self, name: str, resource: str, days: int) -> str:
        """The resource name of a list that is there, whose members must be sent again before it drops them."""
        if days < self._options.membership_days:
            raise Rejected(
                f"Google Ads has a list {name!r} whose members stay for {days} days; "
                f"set membership_days: {days}, or change the list in Google Ads"
            )
        return resource


# --- people ---


class Upload(NamedTuple):
    """One entry of a request: identifiers of one person, as (field, hash)."""

    place: int  # of the person in the batch
    identifiers: Sequence[tuple[str, str]]


def uploads(people: Sequence[Person], fields: Mapping[str, str], most: int) -> tuple[list[Upload], dict[int, Outcome]]:
    """Entries for people of at most so many identifiers; and the outcome of whom there is nothing to send, by place.

    `fields` has the names that the API gives the forms.
    """
    entries: list[Upload] = []
    refused: dict[int, Outcome] = {}
    for place, person in enumerate(people):
        identifiers = [(fields[form], value) for form in fields for value in person.identifiers.get(form, ())]
        if not identifiers:
            refused[place] = Outcome(False, f"not sent: has neither {' nor '.join(fields)}")
        elif not all(HASH.fullmatch(value) for _, value in identifiers):
            refused[place] = Outcome(False, "not sent: an identifier is not 64 lower-case hex digits of SHA-256")
        else:
            for start in range(0, len(identifiers), most):
                entries.append(Upload(place, identifiers[start : start + most]))
    return entries, refused


def settled(
    count: int, taken: set[int], refused: Mapping[int, Outcome], outcome: Outcome, *, removing: bool
) -> list[Outcome]:
    """The outcomes of so many people of whom some entries were taken, and of others some refused.

    Who has one entry there must be removable, and is removed when all of them are.
    """
    done = taken - set(refused) if removing else taken
    return [outcome if place in done else refused[place] for place in range(count)]


def takes_no_contacts(name: str) -> Rejected:
    """Of a list that is there, and of no use."""
    return Rejected(
        f"Google Ads has a list {name!r} that takes no e-mail addresses and phone numbers, or is closed; "
        "rename it or open it in Google Ads, or set another prefix"
    )


def name_of(message: Any, field: str) -> str:
    """The name of an enumeration's value in a protocol buffer; the digits of one that this client does not know."""
    value = getattr(message, field)
    known = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    return str(known[value].name) if value in known else str(value)
