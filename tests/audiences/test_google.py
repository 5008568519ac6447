"""Google Ads by the official client against a strict stand-in: lists, jobs, consent, failures, limits, secrets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from google.ads.googleads.v26.enums.types.offline_user_data_job_type import OfflineUserDataJobTypeEnum
from google.ads.googleads.v26.enums.types.user_list_membership_status import UserListMembershipStatusEnum
from grpc import StatusCode as Code
from pydantic import SecretStr

from audiences.destinations import google
from audiences.destinations.google import FIELDS, GoogleAds, Options, build
from audiences.destinations.protocol import Busy, Outcome, Purpose, Rejected
from tests.audiences.people import hashed, identifiers, person
from tests.audiences.stubs.google import GoogleStub
from tests.audiences.stubs.googleapis import Fault

pytestmark = pytest.mark.usefixtures("trusted")

ADD, CREATE, RUN = "AddOfflineUserDataJobOperations", "CreateOfflineUserDataJob", "RunOfflineUserDataJob"


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


def test_consent_goes_with_additions_and_not_with_removals(stub: GoogleStub, ads: GoogleAds) -> None:
    champions = ads.open("champions")
    ads.add(champions, [person(1)], "a")
    ads.remove(champions, [person(1)], "b")
    assert [(job.removing, *map(int, job.consent)) for job in stub.jobs.values()] == [(False, 2, 2), (True, 0, 0)]
    assert ads.purpose is Purpose.ADS


def test_partial_failures_are_told_in_the_order_of_the_people(stub: GoogleStub, ads: GoogleAds) -> None:
    people = [person(number, emails=2, phones=1) for number in range(9)]
    stub.refuse = {people[2].identifiers["google.phone"][0], people[7].identifiers["google.email"][0]}
    champions = ads.open("champions")
    outcomes = ads.add(champions, people, "a")
    assert [place for place, outcome in enumerate(outcomes) if not outcome.accepted] == [2, 7]
    assert outcomes[2].answer.startswith("MISSING_USER_IDENTIFIER")
    assert outcomes[0].answer == "job 5000: RUNNING"
    assert stub.members[champions] == identifiers(FIELDS, *people[:2], *people[3:7], people[8])


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
    assert stub.members[champions] == identifiers(FIELDS, *people)
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
    assert stub.members[champions] == identifiers(FIELDS, person(1))


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
    assert stub.members[champions] == identifiers(FIELDS, person(1))


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


OK: dict[str, Any] = {"identifiers": [("hashed_email", hashed("a"))]}


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
    "INVALID_SHA256_FORMAT: upper case": filled(("create", {"identifiers": [("hashed_email", hashed("a").upper())]})),
    "INCOMPATIBLE_UPLOAD_KEY_TYPE": filled(("create", {"identifiers": [("third_party_user_id", "visitor-1")]})),
    "MISSING_USER_IDENTIFIER": filled(("create", {})),
    "TOO_MANY_USER_IDENTIFIERS": filled(
        ("create", {"identifiers": [("hashed_email", hashed(str(n))) for n in range(21)]})
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
