"""Google Ads by the official client against a strict stand-in: lists, jobs, consent, failures, limits, secrets."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.ads.googleads.v26.enums.types.offline_user_data_job_type import OfflineUserDataJobTypeEnum
from google.ads.googleads.v26.enums.types.user_list_membership_status import UserListMembershipStatusEnum
from grpc import StatusCode as Code
from pydantic import SecretStr, ValidationError

from audiences.destinations import google, registry
from audiences.destinations.google import GoogleAds, Options, build
from audiences.destinations.protocol import Busy, Destination, Outcome, Person, Purpose, Rejected
from service.core.errors import PropensityError
from tests.audiences import documented
from tests.audiences.stubs.google import GoogleStub
from tests.audiences.stubs.googleapis import Fault

pytestmark = pytest.mark.usefixtures("trusted")

ADD, CREATE, RUN = "AddOfflineUserDataJobOperations", "CreateOfflineUserDataJob", "RunOfflineUserDataJob"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def person(number: int, emails: int = 1, phones: int = 0) -> Person:
    identifiers = {
        "google.email": tuple(sorted(sha(f"{number}-{one}@example.com") for one in range(emails))),
        "google.phone": tuple(sorted(sha(f"+1555{number:07}{one}") for one in range(phones))),
        "meta.email": (sha(f"meta {number}"),),
    }
    return Person(sha(f"visitor-{number}"), {form: values for form, values in identifiers.items() if values})


def identifiers(*people: Person) -> set[tuple[str, str]]:
    return {
        (field, value)
        for one in people
        for form, field in google.FIELDS.items()
        for value in one.identifiers.get(form, ())
    }


@pytest.fixture
def stub() -> Iterator[GoogleStub]:
    with GoogleStub().serving() as stub:
        yield stub
    assert stub.broken == []


def options(stub: GoogleStub, **changes: Any) -> Options:
    given = {**stub.options, "customer_id": "123-456-7890", "login_customer_id": "987-654-3210", "timeout_s": 10}
    return Options.model_validate(given | changes)


@pytest.fixture
def ads(stub: GoogleStub) -> GoogleAds:
    return build("google", options(stub))


# --- a check ---


def test_a_check_names_the_account_and_makes_nothing(stub: GoogleStub, ads: GoogleAds) -> None:
    assert ads.check() == "Google Ads shows the account 1234567890, 'Our shop'"
    assert stub.calls == ["Search"]


def test_a_check_tells_credentials_that_are_wrong(stub: GoogleStub) -> None:
    with pytest.raises(Rejected, match="gives no access token: invalid_grant"):
        build("google", options(stub, refresh_token=SecretStr("revoked"))).check()
    with pytest.raises(Rejected, match="DEVELOPER_TOKEN_INVALID"):
        build("google", options(stub, developer_token=SecretStr("of another"))).check()
    with pytest.raises(Rejected, match="USER_PERMISSION_DENIED"):
        build("google", options(stub, customer_id="111-111-1111")).check()
    assert [one.partition(":")[0] for one in stub.broken] == [
        "authentication_error.DEVELOPER_TOKEN_INVALID",
        "authorization_error.USER_PERMISSION_DENIED",
    ]
    stub.broken.clear()


# --- lists ---


def test_a_list_is_made_once_with_its_type_and_the_days_that_members_stay(stub: GoogleStub) -> None:
    first = build("google", options(stub, membership_days=90)).open("champions")
    # As after a kill between making and use.
    assert build("google", options(stub, membership_days=90)).open("champions") == first
    (only,) = stub.lists.values()
    assert (only.name, only.membership_life_span) == ("Propensity champions", 90)
    assert stub.calls.count("MutateUserLists") == 1


def test_a_list_whose_members_would_be_gone_before_they_are_sent_again_is_refused(stub: GoogleStub) -> None:
    stub.put("Propensity champions", membership_life_span=30)
    with pytest.raises(Rejected, match="stay for 30 days; set membership_days: 30"):
        build("google", options(stub)).open("champions")
    ads = build("google", options(stub, membership_days=30))
    assert ads.open("champions") == stub.list_named("Propensity champions")
    assert ads.keeps_ms == 30 * 86_400_000


def test_a_list_is_found_by_its_name_whatever_is_in_it(stub: GoogleStub, ads: GoogleAds) -> None:
    for name in ("Propensity champions", "Propensity o'neill \\ sons"):
        stub.put(name)
    assert ads.open("o'neill \\ sons") == stub.list_named("Propensity o'neill \\ sons")
    assert len(stub.lists) == 2


def test_of_two_synchronisations_at_once_both_use_the_list_that_one_made(stub: GoogleStub, ads: GoogleAds) -> None:
    stub.before["MutateUserLists"] = lambda: stub.put("Propensity champions")
    assert ads.open("champions") == stub.list_named("Propensity champions")
    assert stub.calls == ["Search", "MutateUserLists", "Search"]


@pytest.mark.parametrize(
    "changes",
    [
        {"crm_based_user_list": {"upload_key_type": "CRM_ID"}},
        {"membership_status": UserListMembershipStatusEnum.UserListMembershipStatus.CLOSED},
    ],
)
def test_a_list_of_another_kind_or_a_closed_one_is_not_used(
    stub: GoogleStub, ads: GoogleAds, changes: dict[str, Any]
) -> None:
    stub.put("Propensity champions", **changes)
    with pytest.raises(Rejected, match="set another prefix"):
        ads.open("champions")


# --- members ---


def test_members_are_those_wanted_after_additions_and_removals(stub: GoogleStub, ads: GoogleAds) -> None:
    people = [person(1), person(2, emails=2, phones=1), person(3, emails=0, phones=2), person(4)]
    champions = ads.open("champions")
    added = ads.add(champions, people, "a")
    assert [outcome.accepted for outcome in added] == [True] * 4
    assert stub.members[champions] == identifiers(*people)
    ads.remove(champions, [people[1], people[3]], "b")
    assert stub.members[champions] == identifiers(people[0], people[2])


def test_adding_and_removing_twice_changes_nothing(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    for _ in range(2):
        ads.add(champions, [person(1), person(1), person(2)], "a")
    assert stub.members[champions] == identifiers(person(1), person(2))
    for _ in range(2):
        ads.remove(champions, [person(1), person(7)], "b")
    assert stub.members[champions] == identifiers(person(2))


def test_consent_goes_with_additions_and_not_with_removals(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    ads.add(champions, [person(1)], "a")
    ads.remove(champions, [person(1)], "b")
    assert [(job.removing, *map(int, job.consent)) for job in stub.jobs.values()] == [(False, 2, 2), (True, 0, 0)]
    assert ads.purpose is Purpose.ADS


def test_who_has_nothing_to_send_or_no_hash_is_not_sent_and_the_others_are(stub: GoogleStub, ads: GoogleAds) -> None:
    raw = Person(sha("raw"), {"google.email": ("somebody@example.com",)})
    upper = Person(sha("upper"), {"google.email": (sha("x").upper(),)})
    without = Person(sha("none"), {"meta.email": (sha("m"),)})
    champions = ads.open("champions")
    outcomes = ads.add(champions, [raw, person(1), without, upper], "a")
    assert [outcome.accepted for outcome in outcomes] == [False, True, False, False]
    assert "64 lower-case hex" in outcomes[0].answer
    assert "somebody" not in str(outcomes)
    assert "google.email nor google.phone" in outcomes[2].answer
    assert stub.members[champions] == identifiers(person(1))


def test_partial_failures_are_told_in_the_order_of_the_people(stub: GoogleStub, ads: GoogleAds) -> None:
    people = [person(number, emails=2, phones=1) for number in range(9)]
    stub.refuse = {people[2].identifiers["google.phone"][0], people[7].identifiers["google.email"][0]}
    champions = ads.open("champions")
    outcomes = ads.add(champions, people, "a")
    assert [place for place, outcome in enumerate(outcomes) if not outcome.accepted] == [2, 7]
    assert outcomes[2].answer.startswith("MISSING_USER_IDENTIFIER")
    assert outcomes[0].answer == "job 5000: RUNNING"
    assert stub.members[champions] == identifiers(*people[:2], *people[3:7], people[8])


def test_who_has_one_operation_in_the_job_is_a_member_and_removable(stub: GoogleStub, ads: GoogleAds) -> None:
    many = person(1, emails=21)  # two operations
    stub.refuse = {many.identifiers["google.email"][20]}
    champions = ads.open("champions")
    assert [outcome.accepted for outcome in ads.add(champions, [many], "a")] == [True]
    assert len(stub.members[champions]) == 20
    assert [outcome.accepted for outcome in ads.remove(champions, [many], "b")] == [False]  # so it is tried again
    stub.refuse = set()
    assert [outcome.accepted for outcome in ads.remove(champions, [many], "c")] == [True]
    assert stub.members[champions] == set()


def test_a_job_that_took_nobody_is_not_run(stub: GoogleStub, ads: GoogleAds) -> None:
    stub.refuse = {person(1).identifiers["google.email"][0]}
    outcomes = ads.add(ads.open("champions"), [person(1)], "a")
    assert [outcome.accepted for outcome in outcomes] == [False]
    assert RUN not in stub.calls


def test_a_partial_failure_that_passes_is_tried_again_as_a_whole(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    stub.refuse, stub.refuse_as = (
        {person(1).identifiers["google.email"][0]},
        ("database_error", "CONCURRENT_MODIFICATION"),
    )
    with pytest.raises(Busy, match="CONCURRENT_MODIFICATION"):
        ads.add(champions, [person(0), person(1)], "a")
    assert stub.members[champions] == set()
    stub.refuse = set()
    assert all(outcome.accepted for outcome in ads.add(champions, [person(0), person(1)], "a"))


# --- limits ---


def test_a_whole_batch_keeps_to_every_limit(stub: GoogleStub, ads: GoogleAds) -> None:
    people = [person(number, emails=2) for number in range(google.MEMBERS - 1)] + [person(10_000, emails=45)]
    champions = ads.open("champions")
    before = len(stub.calls)
    outcomes = ads.add(champions, people, "a")
    assert len(outcomes) == ads.limits.members
    assert all(outcome.accepted for outcome in outcomes)
    assert stub.members[champions] == identifiers(*people)
    asked = stub.calls[before:]
    assert asked.count(ADD) == 3  # 20,043 identifiers, 10,000 a request
    assert len(asked) <= google.REQUESTS_OF_A_BATCH
    assert ads.limits.requests * google.REQUESTS_OF_A_BATCH <= google.REQUESTS_A_MINUTE
    assert ads.limits.seconds == 60


# --- jobs that end later ---


def test_a_job_under_way_is_reviewed_later(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    stub.hold = True
    answers = [ads.add(champions, [person(number)], "a")[0].answer for number in range(3)]
    assert ads.review([*answers, "else"]) == [None] * 4
    stub.finish(fail="INSUFFICIENT_TRANSACTIONS")
    reviewed = ads.review([answers[2], "else", answers[0]])
    assert reviewed == [
        Outcome(False, "job 5002: FAILED INSUFFICIENT_TRANSACTIONS"),
        None,
        Outcome(False, "job 5000: FAILED INSUFFICIENT_TRANSACTIONS"),
    ]


def test_a_wait_for_the_end_tells_how_it_ended(stub: GoogleStub) -> None:
    ads = build("google", options(stub, wait_s=0.1))
    champions = ads.open("champions")
    assert ads.add(champions, [person(1)], "a")[0] == Outcome(True, "job 5000: SUCCESS")


def test_a_job_that_fails_while_it_is_waited_for_is_tried_again(stub: GoogleStub) -> None:
    stub.hold = True
    ads = build("google", options(stub, wait_s=0.1))
    champions = ads.open("champions")
    stub.before["Search"] = lambda: stub.before.update(Search=partial(stub.finish, "INSUFFICIENT_TRANSACTIONS"))
    with pytest.raises(Busy, match="job 5000: FAILED INSUFFICIENT_TRANSACTIONS"):
        ads.add(champions, [person(1)], "a")
    stub.hold = False
    assert ads.add(champions, [person(1)], "a")[0] == Outcome(True, "job 5001: SUCCESS")
    assert stub.members[champions] == identifiers(person(1))


def test_a_wait_is_bounded(stub: GoogleStub) -> None:
    stub.hold = True
    ads = build("google", options(stub, wait_s=0.1))
    champions = ads.open("champions")
    assert ads.add(champions, [person(1)], "a")[0] == Outcome(True, "job 5000: RUNNING", final=False)


def test_a_removal_waits_for_additions_of_an_earlier_synchronisation(stub: GoogleStub, ads: GoogleAds) -> None:
    champions, others = ads.open("champions"), ads.open("others")
    stub.hold = True
    ads.add(champions, [person(1)], "a")
    ads.remove(champions, [person(2)], "b")  # of the same synchronisation: other people
    later = build("google", options(stub))
    assert later.open("champions") == champions
    with pytest.raises(Busy, match="job 5000;") as told:
        later.remove(champions, [person(1)], "c")
    assert told.value.after_s == 60
    with pytest.raises(Busy, match="removals of an earlier synchronisation, in job 5001"):
        later.add(champions, [person(2)], "d")
    later.remove(later.open("others"), [person(1)], "e")
    assert others in {job.list_id for job in stub.jobs.values()}
    stub.finish()
    later.remove(champions, [person(1)], "c")
    stub.finish()
    assert stub.members[champions] == set()


# --- errors ---


@pytest.mark.parametrize(
    ("fault", "after_s"),
    [
        (Fault(ADD, Code.UNAVAILABLE), None),
        (Fault(ADD, Code.INTERNAL, "internal_error", "INTERNAL_ERROR"), None),
        (Fault(ADD, Code.RESOURCE_EXHAUSTED, "quota_error", "RESOURCE_TEMPORARILY_EXHAUSTED", delay_s=12.5), 12.5),
        (Fault(ADD, Code.RESOURCE_EXHAUSTED, "quota_error", "RESOURCE_EXHAUSTED", delay_s=3600), 3600),
        (Fault(ADD, Code.RESOURCE_EXHAUSTED), None),
        (Fault(ADD, Code.INVALID_ARGUMENT, "database_error", "CONCURRENT_MODIFICATION"), None),
        (Fault(CREATE, Code.UNAVAILABLE), None),
        (Fault(RUN, Code.UNAVAILABLE, after=True), None),
        (Fault(RUN, Code.DEADLINE_EXCEEDED), None),
        (Fault("Search", Code.UNAVAILABLE), None),
    ],
    ids=lambda value: f"{value.method}-{value.code.name}-{value.name}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_busy_for_as_long_as_google_says(
    stub: GoogleStub, ads: GoogleAds, fault: Fault, after_s: float | None
) -> None:
    champions = ads.open("champions")
    stub.faults.append(fault)
    with pytest.raises(Busy) as told:
        ads.add(champions, [person(1)], "a")
    assert told.value.after_s == after_s
    assert stub.calls.count(fault.method) <= 2  # it was not tried again here
    assert not stub.faults
    ads.add(champions, [person(1)], "a")
    assert stub.members[champions] == identifiers(person(1))


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        (Code.PERMISSION_DENIED, "authorization_error", "USER_PERMISSION_DENIED"),
        (Code.PERMISSION_DENIED, "not_allowlisted_error", "CUSTOMER_NOT_ALLOWLISTED_FOR_THIS_FEATURE"),
        (Code.INVALID_ARGUMENT, "offline_user_data_job_error", "INVALID_USER_LIST_ID"),
        (Code.UNAUTHENTICATED, "authentication_error", "DEVELOPER_TOKEN_INVALID"),
        (Code.RESOURCE_EXHAUSTED, "quota_error", "ACCESS_PROHIBITED"),
    ],
)
def test_what_does_not_pass_is_rejected_with_googles_words(
    stub: GoogleStub, ads: GoogleAds, code: Code, kind: str, name: str
) -> None:
    champions = ads.open("champions")
    stub.faults.append(Fault(CREATE, code, kind, name))
    with pytest.raises(Rejected, match=f"{name}.*request-"):
        ads.add(champions, [person(1)], "a")
    assert stub.members[champions] == set()


def test_no_answer_in_time_is_busy(stub: GoogleStub) -> None:
    ads = build("google", options(stub, timeout_s=0.5))
    champions = ads.open("champions")
    stub.faults.append(Fault(ADD, Code.OK, after=True, sleep_s=3))
    started_s = time.monotonic()
    with pytest.raises(Busy, match="DEADLINE_EXCEEDED"):
        ads.add(champions, [person(1)], "a")
    assert time.monotonic() - started_s < 3


def test_no_platform_at_all_is_busy(stub: GoogleStub) -> None:
    with pytest.raises(Busy):
        build("google", options(stub, endpoint="localhost:1", timeout_s=1)).open("champions")
    with pytest.raises(Busy, match="access tokens does not answer"):
        build("google", options(stub, token_url="http://127.0.0.1:1/token")).open("champions")


# --- credentials and secrets ---


def test_a_token_that_ran_out_is_refreshed(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    (token,) = stub.tokens_s
    ads._credentials.expiry = ads._credentials.expiry.replace(year=2000)
    stub.tokens_s[token] = 0.0
    ads.add(champions, [person(1)], "a")
    assert len(stub.tokens_s) == 2


def test_a_refresh_token_that_was_revoked_is_rejected_and_no_secret_is_told(
    stub: GoogleStub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    given = options(stub, refresh_token=SecretStr("revoked-refresh-token"))
    with pytest.raises(Rejected, match="invalid_grant.*renew the refresh token") as told:
        build("google", given).open("champions")
    words = "".join([str(told.value), repr(given), given.model_dump_json(), caplog.text, *capfd.readouterr()])
    for secret in ("revoked-refresh-token", stub.client_secret, stub.developer_token):
        assert secret not in words


def test_nothing_that_was_sent_is_logged(
    stub: GoogleStub, ads: GoogleAds, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    champions = ads.open("champions")
    ads.add(champions, [person(1)], "a")
    stub.faults.append(Fault(ADD, Code.UNAVAILABLE))
    with pytest.raises(Busy) as told:
        ads.add(champions, [person(1)], "a")
    words = "".join([str(told.value), caplog.text, *capfd.readouterr()])
    for secret in (stub.developer_token, *stub.tokens_s, person(1).identifiers["google.email"][0]):
        assert secret not in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"customer_id": "12345"}, "ten digits"),
        ({"membership_days": 541}, "540"),
        ({"token_url": "http://example.com/token"}, "https://"),
        ({"client_secret": None}, "together"),
        ({"key_file": "key.json"}, "either key_file or"),
        ({"developer_token": "clear text"}, "no place for a secret"),
        ({"budget": 1}, "budget"),
    ],
)
def test_a_wrong_option_is_told(stub: GoogleStub, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        options(stub, **changes)


@pytest.mark.parametrize("text", ["", "{}", None])
def test_a_key_file_that_is_none_is_told(stub: GoogleStub, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "key.json").write_text(text)
    given = options(stub, client_id=None, client_secret=None, refresh_token=None, key_file=tmp_path / "key.json")
    with pytest.raises(PropensityError, match="key_file"):
        build("google", given)


def test_without_the_extra_the_error_names_it(stub: GoogleStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.ads.googleads.client", None)
    with pytest.raises(PropensityError, match=r"propensity\[google-ads\]"):
        build("google", options(stub))


def test_the_file_of_destinations_builds_it(stub: GoogleStub) -> None:
    document = {
        "destinations": {
            "search": {
                "kind": "google-ads",
                "customer_id": "123-456-7890",
                "login_customer_id": 9876543210,
                "developer_token": "${DEVELOPER_TOKEN}",
                "client_id": stub.client_id,
                "client_secret": "${CLIENT_SECRET}",
                "refresh_token": "${REFRESH_TOKEN}",
                "endpoint": stub.endpoint,
                "token_url": stub.token_url,
            }
        }
    }
    environment = {
        "DEVELOPER_TOKEN": stub.developer_token,
        "CLIENT_SECRET": stub.client_secret,
        "REFRESH_TOKEN": stub.refresh_token,
    }
    built = registry.read(yaml.safe_dump(document), "destinations.yaml", environment).destination("search").build()
    own: Destination = build("search", options(stub))  # as mypy sees it, too
    assert (built.name, built.forms) == (own.name, own.forms)
    assert built.open("champions") == stub.list_named("Propensity champions")


def test_the_page_describes_every_option_with_its_default_and_its_example_is_one() -> None:
    assert documented.options("google-ads.md") == documented.defaults(Options)
    (example,) = documented.examples("google-ads.md")
    names = ("GOOGLE_ADS_DEVELOPER_TOKEN", "GOOGLE_ADS_CLIENT_SECRET", "GOOGLE_ADS_REFRESH_TOKEN")
    entry = registry.read(example, "destinations.yaml", dict.fromkeys(names, "x")).destination("search")
    Options.model_validate(dict(entry.options))


# --- the stand-in is strict: each rule, broken on purpose ---


class Raw:
    """The official client without the destination, to send what the destination would not."""

    def __init__(self, ads: GoogleAds, stub: GoogleStub) -> None:
        self.ads = ads
        self.stub = stub
        self.list_id = ads.open("champions")

    def job(self, consent: int = 2, **changes: Any) -> str:
        request = self.ads._client.get_type("CreateOfflineUserDataJobRequest")
        request.customer_id = changes.get("customer_id", self.stub.customer_id)
        request.job.type_ = changes.get(
            "type", OfflineUserDataJobTypeEnum.OfflineUserDataJobType.CUSTOMER_MATCH_USER_LIST
        )
        request.job.external_id = changes.get("external_id", 0)
        metadata = request.job.customer_match_user_list_metadata
        metadata.user_list = changes.get("user_list", self.list_id)
        if consent:
            metadata.consent.ad_user_data = consent
            metadata.consent.ad_personalization = 2
        answer = self.ads._call("OfflineUserDataJobService", "create_offline_user_data_job", request)
        return str(answer.resource_name)

    def fill(self, job: str, *operations: tuple[str, dict[str, Any]]) -> Any:
        request = self.ads._client.get_type("AddOfflineUserDataJobOperationsRequest")
        request.resource_name = job
        request.enable_partial_failure = True
        for how, data in operations:
            operation = request.operations.add()
            target = getattr(operation, how)
            target.SetInParent()
            for field, value in data.get("identifiers", ()):
                setattr(target.user_identifiers.add(), field, value)
            if "consent" in data:
                target.consent.ad_user_data = 2
        return self.ads._call("OfflineUserDataJobService", "add_offline_user_data_job_operations", request)

    def search(self, query: str, page_size: int = 0) -> None:
        request = self.ads._client.get_type("SearchGoogleAdsRequest")
        request.customer_id = self.stub.customer_id
        request.query = query
        request.page_size = page_size
        self.ads._call("GoogleAdsService", "search", request)

    def run(self, job: str) -> None:
        request = self.ads._client.get_type("RunOfflineUserDataJobRequest")
        request.resource_name = job
        self.ads._call("OfflineUserDataJobService", "run_offline_user_data_job", request)

    def make(self, **changes: Any) -> None:
        request = self.ads._client.get_type("MutateUserListsRequest")
        request.customer_id = self.stub.customer_id
        made = request.operations.add().create
        made.name = changes.get("name", "another")
        made.membership_life_span = changes.get("days", 540)
        if changes.get("kind", True):
            made.crm_based_user_list.upload_key_type = changes.get("key", 2)
        self.ads._call("UserListService", "mutate_user_lists", request)


OK: dict[str, Any] = {"identifiers": [("hashed_email", sha("a"))]}


def filled(*operations: tuple[str, dict[str, Any]], consent: int = 2) -> Any:
    return lambda raw: raw.fill(raw.job(consent), *operations)


def ran_twice(raw: Raw) -> None:
    job = raw.job()
    raw.fill(job, ("create", OK))
    raw.run(job)
    raw.fill(job, ("create", OK))


def with_headers(**changes: str) -> Any:
    def ask(raw: Raw) -> None:
        for name, value in changes.items():
            setattr(raw.stub, name, value)
        raw.job()

    return ask


BREAKS: dict[str, Any] = {
    "INVALID_SHA256_FORMAT": filled(("create", {"identifiers": [("hashed_email", "somebody@example.com")]})),
    "INVALID_SHA256_FORMAT: upper case": filled(("create", {"identifiers": [("hashed_email", sha("a").upper())]})),
    "INCOMPATIBLE_UPLOAD_KEY_TYPE": filled(("create", {"identifiers": [("third_party_user_id", "visitor-1")]})),
    "MISSING_USER_IDENTIFIER": filled(("create", {})),
    "TOO_MANY_USER_IDENTIFIERS": filled(
        ("create", {"identifiers": [("hashed_email", sha(str(n))) for n in range(21)]})
    ),
    "OPERATION_LEVEL_CONSENT_PROVIDED": filled(("create", OK | {"consent": True})),
    "CONFLICTING_OPERATION": filled(("create", OK), ("remove", OK)),
    "CUSTOMER_NOT_ACCEPTED_CUSTOMER_DATA_TERMS: none": filled(("create", OK), consent=0),
    "CUSTOMER_NOT_ACCEPTED_CUSTOMER_DATA_TERMS: denied": lambda raw: raw.job(consent=3),
    "TOO_MANY": filled(*[("create", OK)] * 10_001),
    "TOO_FEW": filled(),
    "JOB_ALREADY_STARTED": ran_twice,
    "RESOURCE_NOT_FOUND": lambda raw: raw.run("customers/1234567890/offlineUserDataJobs/1"),
    "EXTERNAL_UPDATE_ID_ALREADY_EXISTS": lambda raw: [raw.job(external_id=7) for _ in range(2)],
    "PAGE_SIZE_NOT_SUPPORTED": lambda raw: raw.search("SELECT user_list.id FROM user_list", page_size=10),
    "INVALID_USER_LIST_ID": lambda raw: raw.job(user_list="customers/1234567890/userLists/1"),
    "REQUIRED_FIELD_MISSING": lambda raw: raw.job(type=0),
    "USER_PERMISSION_DENIED: account": lambda raw: raw.job(customer_id="1111111111"),
    "USER_PERMISSION_DENIED: manager": with_headers(login_customer_id="1111111111"),
    "DEVELOPER_TOKEN_INVALID": with_headers(developer_token="another"),
    "OAUTH_TOKEN_INVALID": lambda raw: (raw.stub.tokens_s.clear(), raw.job()),
    "INVALID_TYPE": lambda raw: raw.make(key=3),
    "CONCRETE_TYPE_REQUIRED": lambda raw: raw.make(kind=False),
    "TOO_HIGH": lambda raw: raw.make(days=541),
    "INVALID_NAME": lambda raw: raw.make(name=""),
    "UNRECOGNIZED_FIELD": lambda raw: raw.search("SELECT user_list.colour FROM user_list"),
    "BAD_VALUE": lambda raw: raw.search("SELECT user_list.id FROM user_list WHERE user_list.name = 'o'neill'"),
    "UNEXPECTED_INPUT": lambda raw: raw.search("SELECT everything"),
    "requests in a minute": lambda raw: [raw.ads.review(["job 1: RUNNING"]) for _ in range(301)],
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_stand_in_notices_a_broken_rule(stub: GoogleStub, ads: GoogleAds, rule: str) -> None:
    raw = Raw(ads, stub)
    assert stub.broken == []
    try:
        BREAKS[rule](raw)
    except (Rejected, Busy) as error:
        assert rule.partition(":")[0] in str(error) or "minute" in rule
    assert stub.broken
    assert rule.partition(":")[0] in stub.broken[0]
    stub.broken.clear()


def test_the_stand_in_notices_a_request_without_a_deadline(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    request = ads._client.get_type("SearchGoogleAdsRequest")
    request.customer_id = stub.customer_id
    request.query = "SELECT user_list.id FROM user_list"
    assert len(list(ads._client.get_service("GoogleAdsService").search(request=request))) == 1
    assert stub.broken == ["Search: asked without a deadline"]
    stub.broken.clear()
    assert champions in stub.members
