"""Meta by the official SDK against a strict stand-in: audiences, rows, sessions, failures, limits, secrets."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from facebook_business.adobjects.adaccount import AdAccount
from facebook_business.adobjects.customaudience import CustomAudience
from pydantic import SecretStr, ValidationError

from audiences.destinations import meta, registry
from audiences.destinations.meta import Meta, Options, build
from audiences.destinations.protocol import Busy, Destination, Person, Purpose, Rejected
from service.core.errors import PropensityError
from tests.audiences import documented
from tests.audiences.stubs.meta import Entry, Fault, MetaStub, serving, throttled


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def person(number: int, emails: int = 1, phones: int = 0, external: bool = False) -> Person:
    identifiers = {
        "meta.email": tuple(sorted(sha(f"{number}-{one}@example.com") for one in range(emails))),
        "meta.phone": tuple(sorted(sha(f"1555{number:07}{one}") for one in range(phones))),
        "meta.external_id": (sha(f"id {number}"),) if external else (),
        "google.email": (sha(f"google {number}"),),
    }
    return Person(sha(f"visitor-{number}"), {form: values for form, values in identifiers.items() if values})


def entries(*people: Person) -> set[Entry]:
    """What a list holds of people: for each place of a value in its form one entry."""
    found = set()
    for one in people:
        held = {key: one.identifiers.get(form, ()) for form, key in meta.KEYS.items()}
        for place in range(max(map(len, held.values()))):
            found.add(frozenset((key, values[place]) for key, values in held.items() if place < len(values)))
    return found


@pytest.fixture
def stub() -> Iterator[MetaStub]:
    with serving(MetaStub()) as stub:
        yield stub
    assert stub.broken == []


def options(stub: MetaStub, **changes: Any) -> Options:
    given: dict[str, Any] = {
        "ad_account_id": "act_1010",
        "access_token": SecretStr(stub.access_token),
        "app_secret": SecretStr(stub.app_secret) if stub.app_secret else None,
        "endpoint": stub.endpoint,
        "timeout_s": 10,
    }
    return Options.model_validate(given | changes)


@pytest.fixture
def ads(stub: MetaStub) -> Meta:
    return build("meta", options(stub))


# --- a check ---


def test_a_check_names_the_ad_account_and_makes_nothing(stub: MetaStub, ads: Meta) -> None:
    assert ads.check() == "Meta shows the ad account 1010, 'Our shop'"
    assert stub.calls == ["GET act_1010"]


def test_a_check_tells_credentials_that_are_wrong(stub: MetaStub) -> None:
    with pytest.raises(Rejected, match="code 190") as error:
        build("meta", options(stub, access_token=SecretStr("ran-out"))).check()
    assert "ran-out" not in str(error.value)
    with pytest.raises(Rejected, match="subcode 33"):
        build("meta", options(stub, ad_account_id="2020")).check()
    assert len(stub.broken) == 2
    stub.broken.clear()


# --- audiences ---


def test_an_audience_is_made_once_with_what_meta_asks_of_it(stub: MetaStub, ads: Meta) -> None:
    first = ads.open("champions")
    assert build("meta", options(stub)).open("champions") == first  # as after a kill between making and use
    (only,) = stub.audiences.values()
    assert (only["name"], only["subtype"]) == ("Propensity champions", "CUSTOM")
    assert only["customer_file_source"] == "USER_PROVIDED_ONLY"
    assert stub.calls.count("POST customaudiences") == 1


def test_an_audience_is_found_on_a_later_page_and_the_oldest_of_one_name_is_taken(stub: MetaStub, ads: Meta) -> None:
    for name in ("a", "b", "Propensity champions", "c", "Propensity champions", "d", "e"):
        stub.put(name)
    stub.audiences["5"] = {"id": "5", "name": "Propensity champions", "subtype": "LOOKALIKE"}
    assert ads.open("champions") == "23850000002"
    assert stub.calls == ["GET customaudiences"] * 4


def test_an_audience_that_meta_flagged_is_not_used(stub: MetaStub, ads: Meta) -> None:
    stub.put("Propensity champions", operation_status={"code": 471, "description": "Flagged"})
    with pytest.raises(Rejected, match="appeal in Audience Manager"):
        ads.open("champions")
    with pytest.raises(Rejected, match="Upload Blocked.*1713230"):
        ads.add(stub.named("Propensity champions"), [person(1)], "a")


# --- members ---


def test_members_are_those_wanted_after_additions_and_removals(stub: MetaStub, ads: Meta) -> None:
    people = [person(1), person(2, emails=2, phones=1, external=True), person(3, emails=0, phones=3), person(4)]
    champions = ads.open("champions")
    added = ads.add(champions, people, "a")
    assert [outcome.accepted for outcome in added] == [True] * 4
    assert "7 received, 0 invalid" in added[0].answer
    assert stub.members[champions] == entries(*people)
    removed = ads.remove(champions, [people[1], people[3]], "b")
    assert [outcome.accepted for outcome in removed] == [True] * 2
    assert stub.members[champions] == entries(people[0], people[2])


def test_adding_and_removing_twice_changes_nothing(stub: MetaStub, ads: Meta) -> None:
    champions = ads.open("champions")
    for _ in range(2):
        ads.add(champions, [person(1), person(1), person(2)], "a")
    assert stub.members[champions] == entries(person(1), person(2))
    for _ in range(2):
        ads.remove(champions, [person(1), person(7)], "b")
    assert stub.members[champions] == entries(person(2))


def test_a_changed_address_takes_the_place_of_the_old_one(stub: MetaStub, ads: Meta) -> None:
    """As the synchronisation does it: only the hashes that are no more are removed, and the person is added again."""
    champions = ads.open("champions")
    before, after = person(1, external=True), person(1, external=True)
    after = Person(after.key, {**after.identifiers, "meta.email": (sha("new@example.com"),)})
    ads.add(champions, [before], "a")
    ads.remove(champions, [Person(before.key, {"meta.email": before.identifiers["meta.email"]})], "b")
    ads.add(champions, [after], "c")
    assert stub.members[champions] == entries(after)


def test_only_keys_that_somebody_has_are_in_the_schema(stub: MetaStub, ads: Meta) -> None:
    champions = ads.open("champions")
    ads.add(champions, [person(1, external=True), person(2)], "a")
    assert stub.members[champions] == entries(person(1, external=True), person(2))
    assert ads.purpose is Purpose.ADS


def test_who_has_nothing_to_send_or_no_hash_is_not_sent_and_the_others_are(stub: MetaStub, ads: Meta) -> None:
    raw = Person(sha("raw"), {"meta.email": ("somebody@example.com",)})
    upper = Person(sha("upper"), {"meta.phone": (sha("x").upper(),)})
    without = Person(sha("none"), {"google.email": (sha("g"),)})
    champions = ads.open("champions")
    outcomes = ads.add(champions, [raw, person(1), without, upper], "a")
    assert [outcome.accepted for outcome in outcomes] == [False, True, False, False]
    assert "64 lower-case hex" in outcomes[0].answer
    assert "somebody" not in str(outcomes)
    assert "has none of meta.email, meta.phone, meta.external_id" in outcomes[2].answer
    assert stub.members[champions] == entries(person(1))
    calls = len(stub.calls)
    assert [outcome.accepted for outcome in ads.add(champions, [raw, without], "b")] == [False, False]
    assert len(stub.calls) == calls


def test_invalid_entries_are_told_in_the_order_of_the_people(stub: MetaStub, ads: Meta) -> None:
    people = [person(number, phones=1) for number in range(9)]
    stub.refuse = {people[2].identifiers["meta.phone"][0], people[7].identifiers["meta.email"][0]}
    outcomes = ads.add(ads.open("champions"), people, "a")
    assert [place for place, outcome in enumerate(outcomes) if not outcome.accepted] == [2, 7]
    assert outcomes[7].answer.endswith("invalid entry")


def test_who_has_one_entry_on_the_list_is_a_member_and_removable(stub: MetaStub, ads: Meta) -> None:
    half, none = person(1, emails=2), person(2, emails=2)
    stub.refuse = {half.identifiers["meta.email"][0], *none.identifiers["meta.email"]}
    champions = ads.open("champions")
    assert [outcome.accepted for outcome in ads.add(champions, [half, none], "a")] == [True, False]
    assert len(stub.members[champions]) == 1
    assert [outcome.accepted for outcome in ads.remove(champions, [half], "b")] == [False]  # so it is tried again
    stub.refuse = set()
    assert [outcome.accepted for outcome in ads.remove(champions, [half], "c")] == [True]
    assert stub.members[champions] == set()


def test_a_batch_of_which_a_part_was_taken_is_not_told_as_rejected(stub: MetaStub, ads: Meta) -> None:
    people = [person(number, emails=2) for number in range(5001)]  # 10,002 rows
    champions = ads.open("champions")
    stub.faults += [fault(status=200, after=True), fault(answer=said(200))]
    with pytest.raises(Busy, match="code 200.*taken before"):
        ads.add(champions, people, "a")
    assert len(stub.members[champions]) == 10_000
    assert all(outcome.accepted for outcome in ads.add(champions, people, "a"))
    assert stub.members[champions] == entries(*people)


def test_invalid_entries_that_meta_does_not_name_are_counted(stub: MetaStub, ads: Meta) -> None:
    stub.name_samples = False
    stub.refuse = {person(1).identifiers["meta.email"][0]}
    outcomes = ads.add(ads.open("champions"), [person(0), person(1)], "a")
    assert [outcome.accepted for outcome in outcomes] == [True, True]
    assert outcomes[0].answer.endswith("2 received, 1 invalid")


# --- limits ---


def test_a_whole_batch_keeps_to_every_limit(stub: MetaStub, ads: Meta) -> None:
    people = [person(number) for number in range(meta.MEMBERS - 1)] + [person(10_000, emails=3)]
    champions = ads.open("champions")
    before = len(stub.calls)
    assert all(outcome.accepted for outcome in ads.add(champions, people, "a"))
    assert len(stub.calls) - before == 2  # 10,002 rows
    assert len(people) == ads.limits.members
    assert stub.members[champions] == entries(*people)
    assert [*stub.sessions.values()] == [[1, 2, 0]]
    some = people[-300:]  # as many as the SDK's own removal no longer brings through
    ads.remove(champions, some, "b")
    assert stub.members[champions] == entries(*people[:-300])
    assert ads.limits.requests * 2 * (3600 / ads.limits.seconds) <= 5000


# --- errors ---


def fault(edge: str = "POST users", status: int = 400, answer: Any = None, **further: Any) -> Fault:
    body, headers = answer if isinstance(answer, tuple) else (answer, {})
    return Fault(edge, status, body, headers, **further)


def said(code: int, **further: Any) -> dict[str, Any]:
    return {"error": {"message": "some words", "type": "OAuthException", "code": code} | further}


HTML = "<!DOCTYPE html><html><title>Facebook | Error</title><body>Sorry, something went wrong. success</body></html>"


@pytest.mark.parametrize(
    ("given", "after_s"),
    [
        (fault(answer=throttled(80003, 7)), 420),
        (fault(status=403, answer=throttled(17, 0, error_subcode=2446079)), None),
        (fault(answer=throttled(4)), None),
        (fault(answer=throttled(32)), None),
        (fault(answer=throttled(613, error_subcode=1487742)), None),
        (fault(answer=said(1)), None),
        (fault(status=500, answer=said(2, is_transient=True)), None),
        (fault(answer=said(368, is_transient=True)), None),
        (Fault("POST users", 429, said(999), {"Retry-After": "9"}), 9),
        (fault(status=503, answer=said(999)), None),
        (fault(status=502, answer="<html>502 Bad Gateway</html>"), None),
        (fault(status=500, answer=HTML), None),
        (fault(status=200, answer="Service Unavailable"), None),
        (fault(status=200, answer=HTML), None),
        (fault(status=200, answer=[]), None),
        (fault(close=True), None),
        (fault(close=True, after=True), None),
    ],
    ids=lambda value: f"{value.status}-{str(value.body)[:40]}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_busy_for_as_long_as_meta_says(
    stub: MetaStub, ads: Meta, given: Fault, after_s: float | None
) -> None:
    champions = ads.open("champions")
    stub.faults.append(given)
    before = len(stub.calls)
    with pytest.raises(Busy) as told:
        ads.add(champions, [person(1)], "a")
    assert told.value.after_s == after_s
    assert len(stub.calls) == before + 1  # it was not tried again here
    ads.add(champions, [person(1)], "a")
    assert stub.members[champions] == entries(person(1))


def test_a_listing_that_breaks_off_is_busy_and_makes_no_second_audience(stub: MetaStub, ads: Meta) -> None:
    for name in ("a", "b", "Propensity champions"):
        stub.put(name)
    stub.faults.append(fault("GET customaudiences", 502, "<html>502 Bad Gateway</html>"))
    with pytest.raises(Busy, match="502"):
        ads.open("champions")
    assert len(stub.audiences) == 3


@pytest.mark.parametrize(
    "given",
    [
        said(190, error_subcode=463, fbtrace_id="Abc"),
        said(200),
        said(100, error_subcode=33),
        said(100, error_data="no JSON", error_user_msg="The audience is gone"),
        "<html>404 Not Found</html>",
        {"success": False},
    ],
    ids=str,
)
def test_what_does_not_pass_is_rejected_with_metas_words(stub: MetaStub, ads: Meta, given: Any) -> None:
    champions = ads.open("champions")
    stub.faults.append(fault(answer=given))
    with pytest.raises(Rejected, match=r"some words \(code|audience is gone|400 with something|status 400"):
        ads.remove(champions, [person(1)], "a")


def test_no_answer_in_time_is_busy(stub: MetaStub) -> None:
    ads = build("meta", options(stub, timeout_s=0.3))
    champions = ads.open("champions")
    stub.faults.append(fault(status=200, after=True, sleep_s=2))
    started_s = time.monotonic()
    with pytest.raises(Busy, match="ReadTimeout"):
        ads.add(champions, [person(1)], "a")
    assert time.monotonic() - started_s < 2


# --- credentials and secrets ---


def test_no_secret_and_nothing_that_was_sent_is_told(
    stub: MetaStub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    given = options(stub)
    ads = build("meta", given)
    champions = ads.open("champions")
    email = person(1).identifiers["meta.email"][0]
    told = [repr(given), given.model_dump_json()]
    unreachable = build("meta", options(stub, endpoint="http://127.0.0.1:1"))
    stub.faults.append(fault(answer=said(100, error_user_msg=f"Invalid value {email}")))
    for failing in (ads, unreachable):
        with pytest.raises((Busy, Rejected)) as raised:
            failing.add(champions, [person(1)], "a")
        told.append(str(raised.value))
        assert raised.value.__suppress_context__ or raised.value.__context__ is None
    words = "".join([*told, caplog.text, *capfd.readouterr()])
    assert stub.app_secret
    for secret in (stub.access_token, stub.app_secret, email):
        assert secret not in words


def test_a_token_that_ran_out_is_rejected(stub: MetaStub) -> None:
    ads = build("meta", options(stub, access_token=SecretStr("another")))
    with pytest.raises(Rejected, match="Invalid OAuth access token.*code 190"):
        ads.open("champions")
    assert stub.broken == ["Invalid OAuth access token"]
    stub.broken.clear()


def test_an_app_without_proofs_needs_no_secret(stub: MetaStub) -> None:
    stub.app_secret = None
    assert build("meta", options(stub)).open("champions")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ad_account_id": "my account"}, "number of the ad account"),
        ({"customer_file_source": "BOUGHT"}, "USER_PROVIDED_ONLY"),
        ({"endpoint": "http://example.com"}, "https://"),
        ({"access_token": "clear text"}, "no place for a secret"),
        ({"budget": 1}, "budget"),
    ],
)
def test_a_wrong_option_is_told(stub: MetaStub, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        options(stub, **changes)


def test_without_the_extra_the_error_names_it(stub: MetaStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "facebook_business.api", None)
    with pytest.raises(PropensityError, match=r"propensity\[meta\]"):
        build("meta", options(stub))


def test_the_file_of_destinations_builds_it(stub: MetaStub) -> None:
    document = {
        "destinations": {
            "social": {
                "kind": "meta",
                "ad_account_id": 1010,
                "access_token": "${META_TOKEN}",
                "app_secret": "${META_SECRET}",
                "endpoint": stub.endpoint,
            }
        }
    }
    environment = {"META_TOKEN": stub.access_token, "META_SECRET": str(stub.app_secret)}
    built = registry.read(yaml.safe_dump(document), "destinations.yaml", environment).destination("social").build()
    own: Destination = build("social", options(stub))  # as mypy sees it, too
    assert (built.name, built.forms) == (own.name, own.forms)
    assert built.open("champions") == stub.named("Propensity champions")


def test_the_page_describes_every_option_with_its_default_and_its_example_is_one() -> None:
    assert documented.options("meta.md") == documented.defaults(Options)
    (example,) = documented.examples("meta.md")
    names = ("META_ACCESS_TOKEN", "META_APP_SECRET")
    entry = registry.read(example, "destinations.yaml", dict.fromkeys(names, "x")).destination("social")
    Options.model_validate(dict(entry.options))


# --- the stand-in is strict: each rule, broken on purpose ---


def upload(ads: Meta, list_id: str, **changes: Any) -> None:
    session = {"session_id": 7, "batch_seq": 1, "last_batch_flag": True, "estimated_num_total": 1}
    given: dict[str, Any] = {"schema": ["EMAIL"], "users": [[sha("a")]], "is_raw": True, "pre_hashed": True}
    CustomAudience(list_id, api=ads._api).add_users(**(given | {"session": session} | changes))


def session(**changes: Any) -> dict[str, Any]:
    return {"session_id": 7, "batch_seq": 1, "last_batch_flag": True, "estimated_num_total": 1} | changes


def make(**params: Any) -> Callable[[Meta, str], Any]:
    return lambda ads, _: AdAccount("act_1010", api=ads._api).create_custom_audience(params=params)


def sent(**changes: Any) -> Callable[[Meta, str], Any]:
    return lambda ads, list_id: upload(ads, list_id, **changes)


def twice(ads: Meta, list_id: str) -> None:
    upload(ads, list_id)
    upload(ads, list_id, session=session(batch_seq=2))


def removed(users: int) -> Callable[[Meta, str], Any]:
    data = [[sha(str(number))] for number in range(users)]
    return lambda ads, list_id: CustomAudience(list_id, api=ads._api).remove_users(
        ["EMAIL"], data, is_raw=True, pre_hashed=True, session=session(estimated_num_total=users)
    )


def another_version(ads: Meta, list_id: str) -> None:
    ads._api.call("GET", ("act_1010", "customaudiences"), api_version="v20.0")


BREAKS: dict[str, Callable[[Meta, str], Any]] = {
    "64 lower-case hex": sent(users=[["somebody@example.com"]]),
    "64 lower-case hex: upper case": sent(users=[[sha("a").upper()]]),
    "64 lower-case hex: an identifier in the clear": sent(schema=["EXTERN_ID"], users=[["visitor-1"]]),
    "does not match schema": lambda ads, list_id: ads._api.call(
        "POST",
        (list_id, "users"),
        params={"payload": {"schema": ["EMAIL"], "data": [[]], "is_raw": True}, "session": session()},
    ),
    "a row without any key": sent(users=[[""]]),
    "a schema that is none": sent(schema=["SHOE_SIZE"]),
    "10001 users in a request": sent(users=[[sha("a")]] * 10_001, session=session(estimated_num_total=10_001)),
    "without data": sent(users=[]),
    "Missing required parameter: session": sent(session=None),
    "session_id is no number": sent(session=session(session_id="seven")),
    "last_batch_flag": sent(session=session(last_batch_flag="yes")),
    "batch 2 of a session": sent(session=session(batch_seq=2)),
    "batch 2 of a session: ended": twice,
    "estimated_num_total": sent(session=session(estimated_num_total=0)),
    "does not exist": lambda ads, _: upload(ads, "17"),
    "an address of": removed(400),
    "an audience without a name": make(subtype="CUSTOM", customer_file_source="USER_PROVIDED_ONLY"),
    "customer_file_source": make(subtype="CUSTOM", name="x"),
    "another subtype": make(subtype="WEBSITE", name="x", customer_file_source="USER_PROVIDED_ONLY"),
    "nonexisting field": lambda ads, _: AdAccount("act_1010", api=ads._api).get_custom_audiences(fields=["rule"]),
    "another version": another_version,
    "Unsupported get": lambda ads, list_id: ads._api.call("GET", (list_id, "members")),
    "Unsupported get: another account": lambda ads, _: AdAccount("act_2", api=ads._api).get_custom_audiences(),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_stand_in_notices_a_broken_rule(stub: MetaStub, ads: Meta, rule: str) -> None:
    champions = ads.open("champions")
    assert stub.broken == []
    with pytest.raises(Exception, match=r"Meta|Connection|code"):
        BREAKS[rule](ads, champions)
    assert len(stub.broken) == 1
    assert rule.removesuffix(": upper case").split(": ", 1)[0] in stub.broken[0]
    stub.broken.clear()
    assert stub.members[champions] <= entries(Person("", {"meta.email": (sha("a"),)}))


def test_the_stand_in_notices_a_missing_proof_a_strange_client_and_too_many_requests(stub: MetaStub) -> None:
    with pytest.raises(Rejected, match="appsecret_proof"):
        build("meta", options(stub, app_secret=None)).open("champions")
    ads = build("meta", options(stub))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(type(ads._api).HTTP_DEFAULT_HEADERS, "User-Agent", "curl")
        with pytest.raises(Rejected, match="official SDK"):
            ads.open("champions")
    stub.requests_an_hour = 2
    ads.open("champions")
    with pytest.raises(Busy, match="requests in an hour.*code 80003"):
        ads.open("champions")
    assert len(stub.broken) == 3
    stub.broken.clear()


def test_the_sdks_own_removal_comes_through_for_a_few(stub: MetaStub, ads: Meta) -> None:
    """So that the stand-in refuses the long address, not the way of removing."""
    champions = ads.open("champions")
    ads.add(champions, [person(1)], "a")
    email = person(1).identifiers["meta.email"][0]
    CustomAudience(champions, api=ads._api).remove_users(
        ["EMAIL"], [[email]], is_raw=True, pre_hashed=True, session=session()
    )
    assert stub.members[champions] == set()
