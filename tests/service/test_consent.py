"""What visitors said: records free of order, compaction that changes nothing, and the feature cache."""

from __future__ import annotations

import hashlib
import itertools
import random
import uuid
from collections.abc import AsyncIterator

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as some

from service import consent
from service.consent import NOTHING, RECORD_BYTES, Identities, identifier, known, statement
from service.identity import EMAILS, PHONES, hashed
from service.joining import Login
from service.keys import keys_of
from service.persons import Persons
from service.store import Store
from service.visitors import Visitors

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000
DANA, MARY = (hashed("google.email", address) for address in ("dana@example.com", "mary@example.com"))
NUMBER = hashed("meta.phone", "+49 30 901820")


def agreed(ts_ms: int, **consents: bool) -> bytes:
    return statement(ts_ms, consents, False)


def test_nothing_said_is_nothing_agreed_to() -> None:
    assert known("v", b"", NOW_MS) == NOTHING
    assert NOTHING.consents == {"ads": False, "email": False, "crm": False, "analytics": False}


def test_a_user_has_identifiers_by_form_and_an_id_of_its_own() -> None:
    said = identifier(1, EMAILS, DANA) + identifier(1, PHONES[1:], NUMBER) + statement(1, {"ads": True}, True)
    found = known("u-1", said, NOW_MS)
    assert found.identifiers == {
        "external_id": ("u-1",),
        "google.email": (DANA,),
        "meta.email": (DANA,),
        "meta.external_id": (hashlib.sha256(b"u-1").hexdigest(),),
        "meta.phone": (NUMBER,),
    }
    assert found.consents == {"ads": True, "email": False, "crm": False, "analytics": False}
    assert found.rules == "2026-11"


def test_an_anonymous_visitor_has_no_id_to_be_found_by() -> None:
    assert "external_id" not in known("a-1", identifier(1, EMAILS, DANA) + agreed(2, ads=True), NOW_MS).identifiers


def test_an_id_that_no_text_can_hold_is_told_to_nobody() -> None:
    assert known("\ud800", statement(1, {"ads": True}, True), NOW_MS).identifiers == {}
    assert known("\U0001f600?", statement(1, {}, True), NOW_MS).identifiers["external_id"] == ("\U0001f600?",)


def test_the_latest_address_counts_and_of_one_moment_always_the_same() -> None:
    both = [identifier(1, EMAILS, MARY), identifier(2, EMAILS, DANA)]
    for said in (both, both[::-1]):
        assert known("v", b"".join(said), NOW_MS).identifiers["meta.email"] == (DANA,)
    clash = [identifier(2, EMAILS, MARY), identifier(2, EMAILS, DANA)]
    assert known("v", b"".join(clash), NOW_MS) == known("v", b"".join(clash[::-1]), NOW_MS)


def test_the_latest_word_counts_and_of_one_moment_the_refusal() -> None:
    for order in itertools.permutations([agreed(1, ads=True, crm=True), agreed(2, ads=False), agreed(2, ads=True)]):
        assert known("v", b"".join(order), NOW_MS).consents == {**NOTHING.consents, "crm": True}


def test_an_agreement_that_is_still_to_come_does_not_count_yet_and_a_refusal_does() -> None:
    assert not known("v", agreed(NOW_MS + 1, ads=True), NOW_MS).consents["ads"]
    assert known("v", agreed(NOW_MS + 1, ads=True), NOW_MS + 1).consents["ads"]
    assert not known("v", agreed(NOW_MS, ads=True) + agreed(NOW_MS + 1, ads=False), NOW_MS).consents["ads"]


def test_what_is_broken_is_skipped() -> None:
    said = bytearray(agreed(1, ads=True))
    said[20] ^= 2
    assert known("v", bytes(said) + b"torn", NOW_MS) == NOTHING


_moments = some.integers(NOW_MS - 3, NOW_MS + 3)
_records = some.one_of(
    some.builds(
        identifier,
        _moments,
        some.sampled_from([EMAILS, EMAILS[:1], EMAILS[1:], PHONES[:1], PHONES[1:]]),
        some.sampled_from([DANA, MARY, NUMBER]),
    ),
    some.builds(
        statement, _moments, some.dictionaries(some.sampled_from(consent.PURPOSES), some.booleans()), some.booleans()
    ),
)


@given(some.lists(_records, max_size=40), some.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing_and_compaction_neither(said: list[bytes], chance: random.Random) -> None:
    shuffled = chance.sample(said, len(said)) + said[: len(said) // 2]
    whole, compacted = b"".join(said), consent.compact(b"".join(shuffled), NOW_MS)
    for now_ms in (NOW_MS, NOW_MS + 2, NOW_MS + 9):
        assert known("v", b"".join(shuffled), now_ms) == known("v", whole, now_ms)
        if len(said) < 20:
            assert known("v", compacted, now_ms) == known("v", whole, now_ms)
    assert known("v", compacted, NOW_MS) == known("v", whole, NOW_MS)
    assert consent.compact(compacted, NOW_MS) == compacted
    assert len(compacted) <= 30 * RECORD_BYTES


@pytest.fixture
async def store(every_store_url: str) -> AsyncIterator[Store]:
    opened = Store.open(every_store_url, namespace=f"consent-{uuid.uuid4().hex[:12]}", retention_ms=DAY_MS)
    yield opened
    await opened.close()


@pytest.mark.anyio
async def test_what_is_said_is_added_and_read_with_an_end(store: Store, direct: redis.Redis) -> None:
    assert await Visitors(store).append_said({"a": agreed(1, ads=True)}, NOW_MS) == set()
    assert await Visitors(store).append_said({"a": agreed(2, ads=False), "b": agreed(3, crm=True)}, NOW_MS) == set()
    a, b, c = await Identities(store).read(["a", "b", "c"], NOW_MS)
    assert (a.consents["ads"], b.consents["crm"], c) == (False, True, NOTHING)
    assert 0 < direct.pttl(keys_of(store.namespace, "a").said) <= DAY_MS
    assert await Persons(store).erase("a")
    assert await Identities(store).read(["a"], NOW_MS) == [NOTHING]
    assert not await Persons(store).erase("a")


@pytest.mark.anyio
async def test_what_is_said_again_and_again_stays_bounded(store: Store, direct: redis.Redis) -> None:
    for moment in range(500):
        await Visitors(store).append_said(
            {"a": agreed(moment, ads=moment % 2 == 0) + identifier(moment, EMAILS, DANA)}, NOW_MS
        )
    assert direct.strlen(keys_of(store.namespace, "a").said) <= consent.MOST_BYTES + 2 * RECORD_BYTES
    [found] = await Identities(store).read(["a"], NOW_MS)
    assert not found.consents["ads"]
    assert found.identifiers == {form: (DANA,) for form in EMAILS}


@pytest.mark.anyio
async def test_a_key_that_holds_something_else_costs_its_visitor_alone(store: Store, direct: redis.Redis) -> None:
    direct.lpush(keys_of(store.namespace, "spoilt").said, "x")
    assert await Visitors(store).append_said(dict.fromkeys(("spoilt", "sound"), agreed(1, ads=True)), NOW_MS) == {
        "spoilt"
    }
    spoilt, sound = await Identities(store).read(["spoilt", "sound"], NOW_MS)
    assert (spoilt, sound.consents["ads"]) == (NOTHING, True)
    assert await Persons(store).erase("spoilt")


@pytest.mark.anyio
async def test_of_a_person_with_two_ids_one_alone_is_known(store: Store) -> None:
    said = identifier(1, EMAILS, DANA) + agreed(1, ads=True)
    await Visitors(store).append_said({"anonymous": said}, NOW_MS)
    assert await Persons(store).join([("anonymous", Login(2, "known"))], NOW_MS) == ["joined"]
    await Visitors(store).append_said({"anonymous": agreed(3, ads=False, crm=True)}, NOW_MS)
    anonymous, found = await Identities(store).read(["anonymous", "known"], NOW_MS)
    assert anonymous == NOTHING
    assert found.identifiers == {form: (DANA,) for form in EMAILS}
    assert found.consents == {"ads": False, "email": False, "crm": True, "analytics": False}
