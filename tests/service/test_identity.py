"""Addresses and numbers in the form of each platform, against what the platforms publish and Meta's own normaliser."""

from __future__ import annotations

import importlib
import json
import os
import string
from typing import Any

import phonenumbers
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from service import identity
from service.identity import REDACTED, Malformed, NoRegion, hashed, normalise, redacted

# Meta's SDK, which has no types.
Normalize: Any = importlib.import_module("facebook_business.adobjects.serverside.normalize").Normalize
# `make identities` gives 10,000.
EXAMPLES = int(os.environ.get("IDENTITY_EXAMPLES", "500"))

# https://developers.google.com/data-manager/api/devguides/quickstart/send-audience-members, "Hash and encode the data"
GOOGLE = [
    ("google.email", "dana@example.com", "07e2f1394b0ea80e2adca010ea8318df697001a005ba7452720edda4b0ce57b3"),
    ("google.email", "DanaM@example.com", "1df6b43bc68dd38eca94e6a65b4f466ae537b796c81a526918b40ac4a7b906c7"),
    ("google.email", "ALEXF@example.com", "19de0a9906ebee29fe82087be5ec44f3c01e40730bc808b663c71f19dd6b12f2"),
    ("google.email", "AlexF@cymbalgroup.com", "7d2d80e240594dcee2e57f57885ee286c4b232dd142234d7a0af6d31cc86679b"),
    ("google.email", "alexF@altostrat.com", "063c45291827d4994f98357b72862b25885834fd53cf8f0e4af359916fc03c62"),
    ("google.email", "quinn@CYMBALGROUP.com", "05bb62526f091b45d20e243d194766cca8869137421047dc53fa4876d111a6f0"),
    (
        "google.email",
        "baklavainthebalkans@gmail.com",
        "f1fcde379f31f4d446b76ee8f34860eca2288adc6b6d6c0fdc56d9eee75a2fa5",
    ),
    ("google.email", "rosario@example.org", "83a834cc5327bc4dee7c5408988040dc5813c7662611cd93b707aff72bf7d33f"),
    (
        "google.email",
        "cloudySanFrancisco@GMAIL.com",
        "223ebda6f6889b1494551ba902d9d381daf2f642bae055888e96343d53e9f9c4",
    ),
    ("google.phone", "+1-800-555-0100", "fb4f73a6ec5fdb7077d564cdd22c3554b43ce49168550c3b12c547b78c517b30"),
    ("google.phone", "+1 800-555-0101", "61d6c2976b5d92b1ad63073a12fddd26040cd980067d03a93dd1cc50f1a3ac68"),
    ("google.phone", "+1 800-555-0102", "c5383c2eeada28210d27f011bc127d4f9562cf38ff0c9bba33dd45ae79b9fe7c"),
    ("google.phone", "+1-800-555-0110", "525c2390a4e2a9766fa8ddc341dd10414603baebefa401f5a5e29f55e176525d"),
]
# https://developers.facebook.com/documentation/ads-commerce/marketing-api/audiences/guides/custom-audiences, "Hashing",
# and .../conversions-api/parameters/customer-information-parameters, "Expected SHA256 output"
META = [
    ("meta.email", "mary@example.com", "f1904cf1a9d73a55fa5de0ac823c4403ded71afd4c3248d00bdcd0866552bb79"),
    ("meta.phone", "+1 555 987 6543", "1ef970831d7963307784fa8688e8fce101a15685d62aa765fed23f3a2c576a4e"),
    ("meta.email", "John_Smith@gmail.com", "62a14e44f765419d10fea99367361a727c12365e2520f32218d505ed9aa0f62f"),
    ("meta.phone", "1(650)555-1212", "e323ec626319ca94ee8bff2e4c87cf613be6ea19919ed1364124e16807ab3176"),
]


@pytest.mark.parametrize(("form", "value", "published"), GOOGLE + META)
def test_the_hashes_equal_those_that_the_platforms_publish(form: str, value: str, published: str) -> None:
    assert hashed(form, value, "US") == published


# https://developers.google.com/data-manager/api/devguides/concepts/formatting
@pytest.mark.parametrize(
    ("form", "value", "normalised"),
    [
        ("google.email", "cloudy.sanfrancisco+shopping@gmail.com", "cloudysanfrancisco@gmail.com"),
        ("google.email", "user.name+NYC@Example.com", "user.name+nyc@example.com"),
        ("google.email", " A.B+c@GoogleMail.com ", "ab@googlemail.com"),
        ("google.email", "da na@example.com", "dana@example.com"),
        ("google.phone", "(800)555-0100", "+18005550100"),
        ("meta.email", " Cloudy.SanFrancisco+Shopping@gmail.com\n", "cloudy.sanfrancisco+shopping@gmail.com"),
        ("meta.phone", "0049 (0)30 901820", "4930901820"),
        ("google.phone", "0049 30 901820", "+4930901820"),
        ("meta.phone", "+39 06 698 82", "390669882"),
        ("google.email", "E\u0301lodie@Bu\u0308cher.example", "élodie@bücher.example"),
        ("meta.email", "ПОЧТА@Почта.рф", "почта@почта.рф"),
        ("meta.email", "hi@xn--bcher-kva.example", "hi@xn--bcher-kva.example"),
        ("google.email", "शिव@इंडिया.भारत", "शिव@इंडिया.भारत"),
        ("google.phone", "٠١٠ ١٢٣٤ ٥٦٧٨", None),
    ],
)
def test_an_address_is_normalised_by_the_rule_of_each_platform(form: str, value: str, normalised: str | None) -> None:
    if normalised is None:
        assert normalise(form, value, "EG") == "+201012345678"
    else:
        assert normalise(form, value, "US") == normalised


@pytest.mark.parametrize(
    "nonsense",
    ["", " ", "@", "a@", "@b.example", "a@b", "a@@b.example", "a@b@c.example", "a@b..example", "a@.example"]
    + ["a@b.example.", "a@-b.example", "a@b.12", "a@127.0.0.1", "a\x00@b.example", "a\u200b@b.example", "no", "n/a"]
    + ["<a@b.example>", "a@b.example, c@d.example", '"a b"@c.example', "mailto:a@b.example", "a\ud800@b.example"]
    + ["x" * 250 + "@b.example"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_repeating_it(nonsense: str) -> None:
    for form in identity.EMAILS:
        with pytest.raises(Malformed, match="name@example.com") as refused:
            normalise(form, nonsense)
        assert not nonsense.strip() or len(nonsense) < 3 or nonsense not in str(refused.value)


@pytest.mark.parametrize("nonsense", ["+.gmail", ".+x@gmail.com", "..@googlemail.com"])
def test_an_address_of_which_the_rule_of_gmail_leaves_nothing_is_refused(nonsense: str) -> None:
    with pytest.raises(Malformed):
        normalise("google.email", nonsense)


@pytest.mark.parametrize(
    "nonsense", ["", "-", "phone", "12", "+1", "+999 123 456 789", "+49", "1" * 40, "+1 2", "0" * 70]
)
def test_what_is_no_number_is_refused(nonsense: str) -> None:
    for form in identity.PHONES:
        with pytest.raises(Malformed):
            normalise(form, nonsense, "US")


def test_a_number_without_its_country_is_refused_with_what_to_write() -> None:
    with pytest.raises(NoRegion, match=r"traits\.country, or set PROPENSITY_PHONE_REGION"):
        normalise("google.phone", "030 901820")


@pytest.mark.parametrize(
    ("country", "region"), [("de", "DE"), (" GB ", "GB"), ("UK", "GB"), ("Germany", None), ("XX", None), (49, None)]
)
def test_a_country_is_two_letters(country: object, region: str | None) -> None:
    assert identity.region_of(country) == region


def test_a_form_that_is_none_is_a_bug() -> None:
    with pytest.raises(ValueError, match=r"google\.email"):
        normalise("bing.email", "dana@example.com")


_PLAIN = string.ascii_letters + string.digits
_letters = some.characters(exclude_categories=("C", "Z"), exclude_characters='@"(),:;<>[]\\')
_labels = some.text(some.one_of(some.sampled_from(_PLAIN), _letters), min_size=1, max_size=12)
_domains = some.one_of(
    some.sampled_from(["gmail.com", "GMAIL.com", "googlemail.com", "example.com", "Bücher.example", "почта.рф"]),
    some.lists(_labels, min_size=2, max_size=3).map(".".join),
)
_white = some.text(some.sampled_from(" \t\n\u00a0\u2003"), max_size=3)
_addresses = some.builds(
    lambda before, name, domain, after: f"{before}{name}@{domain}{after}",
    _white,
    some.text(some.one_of(some.sampled_from(f"{_PLAIN}.+-_'"), _letters), min_size=1, max_size=30),
    _domains,
    _white,
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(_addresses)
def test_addresses_normalise_idempotently_and_as_the_sdk_of_meta_does(address: str) -> None:
    for form in identity.EMAILS:
        try:
            once = normalise(form, address)
        except Malformed:
            continue
        assert normalise(form, once) == once
        assert normalise(form, once.upper()) == once or once.upper().lower() != once
        assert len(hashed(form, once)) == 64
        if form == "meta.email":
            assert Normalize.normalize_field_skip_hashing("em", once) == once
            if address.isascii():
                assert Normalize.normalize_field_skip_hashing("em", address) == once
                assert Normalize.normalize_field("em", address) == hashed(form, address)


def _example(region: str) -> str:
    number = phonenumbers.example_number(region)
    assert number is not None
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)


_regions = some.sampled_from(sorted(phonenumbers.SUPPORTED_REGIONS))
_numbers = some.one_of(
    some.text(some.sampled_from("0123456789 ()-./"), min_size=4, max_size=20),
    some.integers(10**5, 10**14).map(lambda number: f"+{number}"),
    _regions.map(lambda region: _example(region)),
)


@settings(max_examples=EXAMPLES)
@given(_numbers, _regions)
def test_numbers_normalise_idempotently_and_to_what_the_sdk_of_meta_takes_as_it_is(number: str, region: str) -> None:
    try:
        google = normalise("google.phone", number, region)
    except Malformed:
        assume(False)
    meta = normalise("meta.phone", number, region)
    assert google == f"+{meta}"
    assert meta.isascii()
    assert meta.isdigit()
    assert not meta.startswith("0")
    for other in (None, region, "US"):
        assert normalise("google.phone", google, other) == google
        assert normalise("meta.phone", google, other) == meta
    if len(meta) >= 7:  # shorter ones it refuses
        assert Normalize.normalize_field_skip_hashing("ph", google) == meta


EVENT: dict[str, Any] = {
    "type": "identify",
    "userId": "u-1",
    "messageId": "4930901820123",
    "timestamp": "yesterday",
    "traits": {
        "email": "canary@example.com",
        "E-Mail": "canary@example.com",
        "workEmailAddress": "x",
        "phone": 4930901820,
        "mobile_phone_2": "030 901820",
        "contact": "call 0049 30 90 18 20 please",
        "numbers": ["030 90 18 20", 30901820, 7],
        "address": {"country": "DE", "telephone": "030 901820"},
        "age": 30,
        "plan": "gold",
        "canary@example.com": True,
    },
    "context": {
        "traits": {"Email": None, "tel": "1"},
        "page": {"url": "https://example.com/?mail=canary%40example.com"},
    },
    "properties": {
        "price": 12.5,
        "note": "from Canary <canary@example.com>",
        "sku": "A-1234567890",
        "order": "12345678",
        "revenue": 3000000,
        "list": [["a@b"]],
    },
}


def test_an_event_is_kept_without_addresses_and_numbers_wherever_they_are() -> None:
    kept = redacted(EVENT)
    assert "canary@" not in json.dumps(kept)
    assert "canary%40" not in json.dumps(kept)
    assert "9018" not in json.dumps({**kept, "messageId": ""})  # type: ignore[dict-item]
    assert "90 18" not in json.dumps(kept)
    assert kept == {
        **EVENT,
        "traits": {
            **dict.fromkeys(["email", "E-Mail", "workEmailAddress", "phone", "mobile_phone_2", "contact"], REDACTED),
            "numbers": [REDACTED, REDACTED, 7],
            "address": {"country": "DE", "telephone": REDACTED},
            "age": 30,
            "plan": "gold",
            REDACTED: True,
        },
        "context": {"traits": {"Email": None, "tel": REDACTED}, "page": {"url": REDACTED}},
        "properties": {
            "price": 12.5,
            "note": REDACTED,
            "sku": "A-1234567890",
            "order": REDACTED,
            "revenue": 3000000,
            "list": [[REDACTED]],
        },
    }


@pytest.mark.parametrize("event", [None, 7, True, [], ["plain"], {"event": "Product Viewed", "userId": "u"}])
def test_an_event_without_addresses_stays_as_it_is(event: object) -> None:
    assert redacted(event) == event
