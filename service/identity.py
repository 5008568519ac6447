"""Addresses and numbers of people, as each advertising platform wants them hashed. Pure; nothing here keeps them.

A *form* is what one platform asks for, named `PLATFORM.KIND`. An address or a number is normalised by the form's rule
and hashed with SHA-256 over its UTF-8 bytes; the hash is written in lower-case hex. The rules have a version, RULES,
which is kept beside every hash: what was hashed cannot be hashed anew when a platform changes its rule.

- `google.email`: all white space out, lower case; before `gmail.com` and `googlemail.com` dots and what follows a plus
  go. `google.phone`: E.164 with its plus. Rules and published examples:
  https://developers.google.com/data-manager/api/devguides/concepts/formatting
- `meta.email`: white space around it off, lower case, and nothing else. `meta.phone`: digits alone, with the country's
  code and without leading zeros. Rules and published examples:
  https://developers.facebook.com/documentation/ads-commerce/marketing-api/audiences/guides/custom-audiences
- `external_id`: the visitor's own id, as it is; `meta.external_id`: its SHA-256.

Neither platform says how it composes Unicode, so an address is brought into NFC, as RFC 6532 recommends for mail. A
domain stays as it was written, be it `bücher.example` or `xn--bcher-kva.example`: no rule says which is hashed.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Final

import phonenumbers

EMAILS: Final = ("google.email", "meta.email")
PHONES: Final = ("google.phone", "meta.phone")
HASHED: Final = (*EMAILS, *PHONES)
EXTERNAL: Final = ("external_id", "meta.external_id")
FORMS: Final = (*HASHED, *EXTERNAL)

# Versions of the rules by the number that is kept with a hash; the last one is in force.
VERSIONS: Final = {1: "2026-11"}
RULES: Final = max(VERSIONS)

# RFC 5321 has 254 for an address, and ITU-T E.164 15 digits for a number; what people type around them is not more.
_LONGEST_EMAIL: Final = 254
_LONGEST_PHONE: Final = 64
# Before accents are composed with their letters, which of 15,000 accents on one letter takes 0.4 s.
_LONGEST_TYPED: Final = 4 * _LONGEST_EMAIL
_GMAIL: Final = ("gmail.com", "googlemail.com")
_WHITE: Final = re.compile(r"\s+")
# One @, before it nothing that is quoted or a list, after it labels of any script with at least one dot between them.
_ADDRESS: Final = re.compile(
    r"[^\s@\"(),:;<>\[\]\\]+@(?:LABEL\.)+(?!\d+$)LABEL".replace("LABEL", r"(?!-)[^\s@!-,./:-@\[-^`{-~]+(?<!-)")
)
_HIDDEN: Final = ("Cc", "Cf", "Cn", "Co", "Cs")


class Malformed(ValueError):
    """What is no address and no number of a telephone; the message says what to write, and never what was given."""


class NoRegion(Malformed):
    """A number without its country's code, where no country is known."""


def hashed(form: str, value: str, region: str | None = None) -> str:
    """SHA-256 of an address or number normalised for a form, 64 hex digits. Raises Malformed."""
    return hashlib.sha256(normalise(form, value, region).encode()).hexdigest()


def normalise(form: str, value: str, region: str | None = None) -> str:
    """An address or number as a form of HASHED wants it before it is hashed. Raises Malformed.

    `region` is the country, ISO 3166-1 alpha-2, that a number without a country's code is of.
    """
    if form == "google.email":
        return _google_email(value)
    if form == "meta.email":
        return _email(value)
    if form == "google.phone":
        return _e164(value, region)
    if form == "meta.phone":
        return _e164(value, region)[1:]
    raise ValueError(f"no form {form!r}; write one of {', '.join(HASHED)}")


def region_of(country: object) -> str | None:
    """The region that a country is, written in two letters of either case; None if it is none."""
    if not isinstance(country, str):
        return None
    code = country.strip().upper()
    code = "GB" if code == "UK" else code
    return code if code in phonenumbers.SUPPORTED_REGIONS else None


def _email(text: str) -> str:
    typed = text.strip()
    if len(typed) > _LONGEST_TYPED:
        raise Malformed(_EMAIL_ADVICE)
    address = unicodedata.normalize("NFC", typed).lower()
    # Lowering can take a letter apart, as it does with the Turkish capital I.
    address = unicodedata.normalize("NFC", address)
    is_sound = (
        len(address) <= _LONGEST_EMAIL
        and _ADDRESS.fullmatch(address)
        and not any(unicodedata.category(letter) in _HIDDEN for letter in address)
    )
    if not is_sound:
        raise Malformed(_EMAIL_ADVICE)
    return address


def _google_email(text: str) -> str:
    address = _email(_WHITE.sub("", text))
    name, _, domain = address.partition("@")
    if domain not in _GMAIL:
        return address
    name = name.partition("+")[0].replace(".", "")
    if not name:
        raise Malformed(_EMAIL_ADVICE)
    return f"{name}@{domain}"


def _e164(text: str, region: str | None) -> str:
    number = text.strip()
    if len(number) > _LONGEST_PHONE:
        raise Malformed(_PHONE_ADVICE)
    # 00 is how most countries dial out; where it is not, no number begins with it.
    written = _parsed("+" + number[2:] if number.startswith("00") else number, region)
    # Of a few numbers that nobody has, what was written reads as another number again: 0100000000 of the Isle of Man.
    again = _parsed(written, None)
    return again if again == written else _parsed(again, None)


def _parsed(written: str, region: str | None) -> str:
    """E.164 of a number. Raises Malformed."""
    try:
        parsed = phonenumbers.parse(written, region)
    except phonenumbers.NumberParseException as error:
        is_local = error.error_type == phonenumbers.NumberParseException.INVALID_COUNTRY_CODE and "+" not in written
        raise (NoRegion(_REGION_ADVICE) if is_local else Malformed(_PHONE_ADVICE)) from None
    if phonenumbers.is_possible_number_with_reason(parsed) != phonenumbers.ValidationResult.IS_POSSIBLE:
        raise Malformed(_PHONE_ADVICE)
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


_EMAIL_ADVICE: Final = "an e-mail address looks like name@example.com"
_PHONE_ADVICE: Final = "a phone number looks like +49 30 901820"
_REGION_ADVICE: Final = (
    "a phone number needs its country: write +49 30 901820, or traits.country, or set PROPENSITY_PHONE_REGION"
)

# --- what may not be kept of an event as it was sent ---

REDACTED: Final = "(redacted)"
# Keys of Segment's spec and of common trackers, without case, spaces and signs.
_PERSONAL: Final = re.compile(
    r"(?:e?mail|.*email)(?:address(?:es)?|s)?\d*|"
    r"(?:.*phone|.*mobile|.*cell|.*msisdn|tel|fax|whatsapp|sms)(?:numbers?|nr|no|s)?\d*"
).fullmatch
_SIGNS: Final = re.compile(r"[\W_]+")
_HAS_ADDRESS: Final = re.compile(r"[^\s@]@[^\s@]|%40|\N{FULLWIDTH COMMERCIAL AT}", re.IGNORECASE).search
_HAS_NUMBER: Final = re.compile(r"(?:\+|\b00)[\s(]*\d(?:[\s()./-]*\d){6,}").search
_IS_DIGITS_AND_SIGNS: Final = re.compile(r"[\d\s()./-]+").fullmatch
_IDS_AND_TIMES: Final = frozenset({"userid", "anonymousid", "previousid", "messageid", "timestamp", "type"})


def redacted(event: object) -> object:
    """An event without addresses and numbers of people, at whatever depth they are.

    Out goes every value under a key that speaks of mail or telephone; every text anywhere that holds an address or a
    number with a country's code, or is digits as long as a number, other than ids and times; within traits numbers as
    long too; and keys that are addresses.
    """
    return _redacted(event, is_trait=False)


def _redacted(value: object, *, is_trait: bool) -> object:
    if isinstance(value, dict):
        return {_clean(key): _redacted_member(key, item, is_trait) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, is_trait=is_trait) for item in value]
    if isinstance(value, str):
        return REDACTED if holds_personal(value) or _is_number(value) else value
    if is_trait and isinstance(value, int | float) and abs(value) >= 1e6:
        return REDACTED
    return value


def _redacted_member(key: str, value: object, is_trait: bool) -> object:
    name = _SIGNS.sub("", key).lower()
    if name in _IDS_AND_TIMES and not isinstance(value, dict | list):
        return REDACTED if isinstance(value, str) and holds_personal(value) else value
    if _PERSONAL(name) and value is not None:
        return REDACTED
    return _redacted(value, is_trait=is_trait or name == "traits")


def _clean(key: str) -> str:
    return REDACTED if holds_personal(key) else key


def holds_personal(text: str) -> bool:
    """Whether a text holds something like an address, or a number with a country's code."""
    return bool(_HAS_ADDRESS(text) or _HAS_NUMBER(text))


def _is_number(text: str) -> bool:
    return bool(_IS_DIGITS_AND_SIGNS(text)) and sum(letter.isdigit() for letter in text) >= 7
