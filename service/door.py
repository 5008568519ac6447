"""What an event says of a person, taken at the door: hashes, consents and logins are kept, the addresses are not. Pure.

1. **Identifiers** come with `identify` events, from `traits` or else from `context.traits`: `email`, and `phone` with
   the country of `country` or `address.country` there, or else of the setting `phone_region`. Each is normalised and
   hashed for every platform by `service.identity`. What is no address or number is not kept, which is counted and told.
2. **Consents** come with any event, in `context.consent.categoryPreferences`: true or false by category; the setting
   `consent_categories` says for which purposes each category stands. Of several categories of one purpose all must be
   true. An object without any category refuses all purposes, as Segment takes it.
3. **Logins** come with `identify` and `alias` events that have both a `userId` and another id: `anonymousId`, of an
   alias `previousId` before that. The other visitor is joined into the one of the `userId`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from service import consent, identity, ingest
from service.identity import Malformed, NoRegion
from service.ingest import LONGEST_ID, Accepted, Ignored
from service.joining import Login

_SPEAKING: Final = ("identify", "alias")
Count = Callable[[str, str], None]


class Door(NamedTuple):
    """How a deployment reads what is said: the region of its telephones, and its categories of consent by purpose."""

    region: str | None
    categories: Mapping[str, frozenset[str]]  # by purpose, in lower case

    @classmethod
    def of(cls, region: str | None, categories: Mapping[str, Sequence[str]] | None) -> Door:
        """The door for the settings `phone_region` and `consent_categories`."""
        known = consent.CATEGORIES if categories is None else categories
        return cls(
            region,
            {
                purpose: frozenset(name.casefold() for name, purposes in known.items() if purpose in purposes)
                for purpose in consent.PURPOSES
            },
        )


def speaks(event: Mapping[str, Any]) -> bool:
    """Whether an event says anything of a person. It has been parsed, and is sound."""
    if event.get("type") in _SPEAKING:
        return True
    context = event.get("context")
    return context is not None and "consent" in context


def take(
    door: Door, event: Mapping[str, Any], outcome: Accepted | Ignored, received_ms: int, count: Count
) -> Accepted | Ignored:
    """The outcome of a sound event with what it says of a person; `count` is told what became of each thing said."""
    ts_ms = ingest.timestamp_ms(event.get("timestamp"), received_ms)
    notes: list[str] = []
    is_identify = event.get("type") == "identify"
    records = list(_identifiers(door, event, ts_ms, notes, count)) if is_identify else []
    consents = _consents(door, event, notes, count)
    is_user = is_identify and _id_of(event.get("userId")) is not None
    if event.get("type") in _SPEAKING and any(map(identity.holds_personal, ingest.visitor_ids(event))):
        count("id", "address")
        notes.append(
            "its id looks like an e-mail address or a phone number, and ids are stored as they are: send another"
        )
    if consents or is_user:
        records.append(consent.statement(ts_ms, consents, is_user))
    login = _login(event, ts_ms) if event.get("type") in _SPEAKING else None
    message = "; ".join(notes) or None
    if not records and login is None:
        return outcome if message is None else _with_message(outcome, message)
    said = b"".join(records)
    if isinstance(outcome, Accepted):
        return msgspec.structs.replace(outcome, said=said, login=login, message=message)
    return Accepted(ingest.visitor_of(event), b"", b"", message, said, login)


def _with_message(outcome: Accepted | Ignored, message: str) -> Accepted | Ignored:
    told = message if isinstance(outcome, Accepted) else f"{outcome.message}; {message}"
    return msgspec.structs.replace(outcome, message=told)


def _identifiers(door: Door, event: Mapping[str, Any], ts_ms: int, notes: list[str], count: Count) -> Iterator[bytes]:
    context = event.get("context") or {}
    places = [place for place in (event.get("traits"), context.get("traits")) if isinstance(place, dict)]
    email, phone = (_first(places, name) for name in ("email", "phone"))
    if email is not None:
        yield from _hashes("email", identity.EMAILS, email, None, ts_ms, notes, count)
    if phone is not None:
        region = identity.region_of(_first(places, "country")) or _region_of_address(places) or door.region
        yield from _hashes("phone", identity.PHONES, phone, region, ts_ms, notes, count)


def _first(places: list[dict[str, Any]], name: str) -> Any:
    return next((place[name] for place in places if place.get(name) is not None), None)


def _region_of_address(places: list[dict[str, Any]]) -> str | None:
    address = _first(places, "address")
    return identity.region_of(address.get("country")) if isinstance(address, dict) else None


def _hashes(
    kind: str, forms: tuple[str, ...], value: object, region: str | None, ts_ms: int, notes: list[str], count: Count
) -> Iterator[bytes]:
    """A record for each hash that a value has, with all forms that it is the hash of."""
    text = None if isinstance(value, bool) else ingest.text_of(value)
    by_digest: dict[str, list[str]] = {}
    refusal: Malformed = Malformed("it must be a string")
    for form in forms:
        try:
            by_digest.setdefault(identity.hashed(form, text or "", region), []).append(form)
        except Malformed as error:
            refusal = error
    if not by_digest:
        count(kind, "no_region" if isinstance(refusal, NoRegion) else "malformed")
        notes.append(f"its {kind} is not kept: {refusal}")
        return
    count(kind, "kept")
    for digest, alike in by_digest.items():
        yield consent.identifier(ts_ms, alike, digest)


def _consents(door: Door, event: Mapping[str, Any], notes: list[str], count: Count) -> dict[str, bool]:
    given = (event.get("context") or {}).get("consent")
    if given is None:
        return {}
    preferences = given.get("categoryPreferences") if isinstance(given, dict) else given
    if preferences is None:
        return {}
    if not isinstance(preferences, dict) or not all(isinstance(value, bool) for value in preferences.values()):
        count("consent", "malformed")
        notes.append("its consent is not kept: context.consent.categoryPreferences has true or false by category")
        return {}
    count("consent", "kept")
    if not preferences:
        return dict.fromkeys(consent.PURPOSES, False)
    said = {name.casefold(): value for name, value in preferences.items()}
    words = {purpose: [said[name] for name in names if name in said] for purpose, names in door.categories.items()}
    return {purpose: all(values) for purpose, values in words.items() if values}


def _login(event: Mapping[str, Any], ts_ms: int) -> tuple[str, Login] | None:
    """The other visitor, and who it is from a moment on."""
    known = _id_of(event.get("userId"))
    previous = _id_of(event.get("previousId")) if event["type"] == "alias" else None
    anonymous = previous or _id_of(event.get("anonymousId"))
    if known is None or anonymous is None or anonymous == known:
        return None
    return anonymous, Login(ts_ms, known)


def _id_of(value: object) -> str | None:
    text = None if isinstance(value, bool) else ingest.text_of(value)
    return text if text is None or len(text) <= LONGEST_ID else None
