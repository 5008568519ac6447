"""Google Data Manager by the official client against a strict stand-in: lists, requests, consent, failures, secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.ads import datamanager_v1 as api
from grpc import StatusCode as Code
from pydantic import SecretStr

from audiences.destinations import data_manager
from audiences.destinations.data_manager import FIELDS, DataManager, Options, build
from audiences.destinations.protocol import Busy, Outcome, Rejected
from tests.audiences.people import hashed, identifiers, person
from tests.audiences.stubs.data_manager import DataManagerStub, id_of
from tests.audiences.stubs.googleapis import Fault

pytestmark = pytest.mark.usefixtures("trusted")

INGEST, REMOVE, RETRIEVE = "IngestAudienceMembers", "RemoveAudienceMembers", "RetrieveRequestStatus"
LIST, CREATE = "ListUserLists", "CreateUserList"


@pytest.fixture
def stub() -> Iterator[DataManagerStub]:
    with DataManagerStub().serving() as stub:
        yield stub
    assert stub.broken == []


def options(stub: DataManagerStub, **changes: Any) -> Options:
    given = {**stub.options, "customer_match_terms": "accepted", "customer_id": "123-456-7890", "timeout_s": 10}
    return Options.model_validate(given | changes)


@pytest.fixture
def manager(stub: DataManagerStub) -> DataManager:
    return build("google", options(stub))


def held(stub: DataManagerStub) -> set[tuple[str, str]]:
    return stub.held("Propensity champions")


# --- a check ---


def test_a_check_names_the_account_and_makes_nothing(stub: DataManagerStub, manager: DataManager) -> None:
    assert manager.check() == "Google's Data Manager shows the lists of the account 1234567890"
    assert stub.calls == [LIST]


def test_a_check_tells_credentials_that_are_wrong_and_what_to_do(stub: DataManagerStub) -> None:
    with pytest.raises(Rejected, match="gives no access token: invalid_grant"):
        build("google", options(stub, refresh_token=SecretStr("revoked"))).check()
    with pytest.raises(Rejected, match="PERMISSION_DENIED.*give the user access.*or set login_customer_id"):
        build("google", options(stub, customer_id="111-111-1111")).check()
    with pytest.raises(Rejected, match="PERMISSION_DENIED"):
        build("google", options(stub, login_customer_id=None)).check()
    assert len(stub.broken) == 2
    stub.broken.clear()


def test_a_token_of_the_google_ads_api_is_told_to_have_the_wrong_scope(stub: DataManagerStub) -> None:
    manager = build("google", options(stub))
    manager._credentials._scopes = ["https://www.googleapis.com/auth/adwords"]
    with pytest.raises(Rejected, match="make credentials with the scope https://www.googleapis.com/auth/datamanager"):
        manager.check()
    assert stub.broken == ["ACCESS_TOKEN_SCOPE_INSUFFICIENT: ListUserLists"]
    stub.broken.clear()


# --- lists ---


@pytest.mark.parametrize("changes", [{"keys": ["USER_ID"]}, {"membership_status": "CLOSED"}])
def test_a_list_of_another_kind_or_a_closed_one_is_not_used(
    stub: DataManagerStub, manager: DataManager, changes: dict[str, Any]
) -> None:
    stub.put("Propensity champions", **changes)
    with pytest.raises(Rejected, match="set another prefix"):
        manager.open("champions")


# --- members ---


def test_a_list_that_the_google_ads_api_named_is_gone_on_with(stub: DataManagerStub, manager: DataManager) -> None:
    manager.open("champions")
    number = stub.list_named("Propensity champions")
    manager.add(f"customers/1234567890/userLists/{number}", [person(1)], "a")
    assert held(stub) == identifiers(FIELDS, person(1))
    assert manager.review(["job 5000: RUNNING"]) == [None]


@pytest.mark.parametrize("told", [1, 1000])
def test_whom_google_names_is_left_out_and_the_others_are_sent_again(
    stub: DataManagerStub, manager: DataManager, told: int
) -> None:
    people = [person(number, emails=2, phones=1) for number in range(9)]
    stub.refuse = {people[2].identifiers["google.phone"][0], people[7].identifiers["google.email"][0]}
    stub.violations_told = told
    champions = manager.open("champions")
    outcomes = manager.add(champions, people, "a")
    assert [place for place, outcome in enumerate(outcomes) if not outcome.accepted] == [2, 7]
    assert outcomes[2] == Outcome(False, "INVALID_AUDIENCE_MEMBER: The audience member is not valid.")
    assert outcomes[0].answer == f"addition {id_of(5000)}: PROCESSING"
    assert held(stub) == identifiers(FIELDS, *people[:2], *people[3:7], people[8])
    assert stub.calls.count(INGEST) == (3 if told == 1 else 2)


def test_of_a_batch_in_which_google_names_one_after_the_other_the_end_is_told(
    stub: DataManagerStub, manager: DataManager
) -> None:
    people = [person(number) for number in range(20)]
    stub.refuse = {one.identifiers["google.email"][0] for one in people}
    stub.violations_told = 1
    with pytest.raises(Rejected, match="INVALID_AUDIENCE_MEMBER"):
        manager.add(manager.open("champions"), people, "a")
    assert stub.calls.count(INGEST) == data_manager.REQUESTS_OF_A_BATCH


def test_a_batch_of_which_everybody_is_refused_is_told(stub: DataManagerStub, manager: DataManager) -> None:
    stub.refuse = {person(1).identifiers["google.email"][0]}
    assert [one.accepted for one in manager.add(manager.open("champions"), [person(1)], "a")] == [False]
    assert stub.calls.count(INGEST) == 1


def test_who_has_one_entry_there_is_a_member_and_removable(stub: DataManagerStub, manager: DataManager) -> None:
    many = person(1, emails=11)  # two entries
    stub.refuse = {many.identifiers["google.email"][10]}
    champions = manager.open("champions")
    assert [outcome.accepted for outcome in manager.add(champions, [many], "a")] == [True]
    assert len(held(stub)) == 10
    assert [outcome.accepted for outcome in manager.remove(champions, [many], "b")] == [False]  # so it is tried again
    stub.refuse = set()
    assert [outcome.accepted for outcome in manager.remove(champions, [many], "c")] == [True]
    assert held(stub) == set()


# --- limits ---


def test_a_whole_batch_keeps_to_every_limit(stub: DataManagerStub, manager: DataManager) -> None:
    people = [person(number, emails=2) for number in range(data_manager.MEMBERS - 1)] + [person(10_000, emails=25)]
    champions = manager.open("champions")
    before = len(stub.calls)
    outcomes = manager.add(champions, people, "a")
    assert len(outcomes) == manager.limits.members
    answer = f"addition {id_of(5000)}, {id_of(5001)}: PROCESSING"
    assert set(outcomes) == {Outcome(True, answer, final=False)}
    assert held(stub) == identifiers(FIELDS, *people)
    assert stub.calls[before:] == [INGEST] * 2  # 10,002 entries
    assert manager.limits.requests * data_manager.REQUESTS_OF_A_BATCH <= data_manager.REQUESTS_A_MINUTE
    assert manager.limits.seconds == 60
    assert manager.review([answer]) == [Outcome(True, f"addition {id_of(5000)}, {id_of(5001)}: SUCCESS")]


def test_a_refusal_after_a_part_was_taken_is_no_refusal_of_all(stub: DataManagerStub, manager: DataManager) -> None:
    people = [person(number) for number in range(data_manager.MEMBERS - 1)] + [person(10_000, emails=20)]
    champions = manager.open("champions")
    stub.before[INGEST] = lambda: stub.faults.append(Fault(INGEST, Code.PERMISSION_DENIED, name="PERMISSION_DENIED"))
    with pytest.raises(Busy, match="PERMISSION_DENIED.*a part of the batch was taken before"):
        manager.add(champions, people, "a")


def test_a_review_keeps_to_the_limit_of_reads_and_asks_of_nothing_twice(
    stub: DataManagerStub, manager: DataManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_manager, "READS", 2)
    champions = manager.open("champions")
    answers = [manager.add(champions, [person(number)], "a")[0].answer for number in range(5)]
    for left in (3, 1):
        with pytest.raises(Busy, match=f"; {left} left") as told:
            manager.review(answers)
        assert told.value.after_s == 60
    assert [one and one.accepted for one in manager.review(answers)] == [True] * 5
    assert stub.calls.count(RETRIEVE) == 5


# --- requests that end later ---


def test_a_request_under_way_is_reviewed_later(stub: DataManagerStub, manager: DataManager) -> None:
    champions = manager.open("champions")
    stub.hold = True
    answers = [manager.add(champions, [person(number)], "a")[0].answer for number in range(3)]
    assert manager.review([*answers, "else"]) == [None] * 4
    stub.finish(fail="INTERNAL_ERROR")
    assert manager.review([answers[2], "else", answers[0]]) == [
        Outcome(False, f"addition {id_of(5002)}: FAILED, 1 INTERNAL_ERROR"),
        None,
        Outcome(False, f"addition {id_of(5000)}: FAILED, 1 INTERNAL_ERROR"),
    ]


@pytest.mark.parametrize(
    ("why", "accepted"), [("UNKNOWN_CONSENT", True), ("DENIED_CONSENT", True), ("INTERNAL_ERROR", False)]
)
def test_of_additions_that_were_done_in_part_those_are_sent_again_of_whom_some_may_be_taken_then(
    stub: DataManagerStub, manager: DataManager, why: str, accepted: bool
) -> None:
    stub.miss = {person(1).identifiers["google.email"][0]: why}
    (one, *_) = manager.add(manager.open("champions"), [person(0), person(1), person(2)], "a")
    assert manager.review([one.answer]) == [
        Outcome(accepted, f"addition {id_of(5000)}: PARTIAL_SUCCESS, 1 {why}", final=not accepted)
    ]
    assert held(stub) == identifiers(FIELDS, person(0), person(2))


def test_a_removal_that_was_done_in_part_is_made_again(stub: DataManagerStub, manager: DataManager) -> None:
    champions = manager.open("champions")
    manager.add(champions, [person(0), person(1)], "a")
    stub.miss = {person(1).identifiers["google.email"][0]: "UNKNOWN_CONSENT"}
    (one, _) = manager.remove(champions, [person(0), person(1)], "b")
    assert manager.review([one.answer]) == [
        Outcome(False, f"removal {id_of(5001)}: PARTIAL_SUCCESS, 1 UNKNOWN_CONSENT")
    ]


def test_of_a_batch_in_two_requests_both_must_have_ended(stub: DataManagerStub, manager: DataManager) -> None:
    stub.hold = True
    people = [person(number) for number in range(data_manager.MEMBERS - 1)] + [person(10_000, emails=20)]
    answer = manager.add(manager.open("champions"), people, "a")[0].answer
    stub.finish(jobs=[5000])
    assert manager.review([answer]) == [None]
    stub.finish(fail="INTERNAL_ERROR")
    (end,) = manager.review([answer])
    assert end == Outcome(False, f"addition {id_of(5000)}, {id_of(5001)}: FAILED, 1 INTERNAL_ERROR")


def test_of_a_request_that_google_knows_no_more_there_is_no_end(stub: DataManagerStub, manager: DataManager) -> None:
    answer = manager.add(manager.open("champions"), [person(1)], "a")[0].answer
    stub.pass_days(51)
    assert manager.review([answer, f"removal {id_of(77)}: PROCESSING"]) == [None, None]


# --- errors ---


@pytest.mark.parametrize(
    ("fault", "after_s"),
    [
        (Fault(INGEST, Code.UNAVAILABLE), None),
        (Fault(INGEST, Code.UNAVAILABLE, after=True), None),
        (Fault(INGEST, Code.INTERNAL, name="INTERNAL_ERROR"), None),
        (Fault(INGEST, Code.RESOURCE_EXHAUSTED, name="RESOURCE_EXHAUSTED", delay_s=12.5), 12.5),
        (Fault(INGEST, Code.RESOURCE_EXHAUSTED, name="RESOURCE_EXHAUSTED"), None),
        (Fault(INGEST, Code.DEADLINE_EXCEEDED, name="DEADLINE_EXCEEDED"), None),
        (Fault(INGEST, Code.ABORTED), None),
    ],
    ids=lambda value: f"{value.code.name}-{value.name}-{value.after}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_busy_for_as_long_as_google_says(
    stub: DataManagerStub, manager: DataManager, fault: Fault, after_s: float | None
) -> None:
    champions = manager.open("champions")
    stub.faults.append(fault)
    with pytest.raises(Busy) as told:
        manager.add(champions, [person(1)], "a")
    assert told.value.after_s == after_s
    assert stub.calls.count(INGEST) == 1  # it was not tried again here
    assert not stub.faults
    manager.add(champions, [person(1)], "a")
    assert held(stub) == identifiers(FIELDS, person(1))


@pytest.mark.parametrize("method", [LIST, CREATE, RETRIEVE])
def test_every_request_may_have_to_wait(stub: DataManagerStub, manager: DataManager, method: str) -> None:
    stub.faults.append(Fault(method, Code.UNAVAILABLE))
    with pytest.raises(Busy, match="UNAVAILABLE"):
        manager.review([manager.add(manager.open("champions"), [person(1)], "a")[0].answer])


def test_above_the_quota_its_name_is_told(stub: DataManagerStub, manager: DataManager) -> None:
    champions = manager.open("champions")
    stub.requests_a_minute = 1
    manager.add(champions, [person(1)], "a")
    with pytest.raises(Busy, match="RESOURCE_EXHAUSTED: IngestionMutateRequestsPerMinutePerProject: Too many"):
        manager.add(champions, [person(1)], "a")
    assert stub.broken == ["IngestAudienceMembers: 2 requests in a minute"]
    stub.broken.clear()


@pytest.mark.parametrize(
    ("code", "reason", "advice"),
    [
        (Code.PERMISSION_DENIED, "PERMISSION_DENIED", "or set login_customer_id"),
        (Code.PERMISSION_DENIED, "SERVICE_DISABLED", "enable the Data Manager API"),
        (Code.INVALID_ARGUMENT, "INVALID_USER_LIST_ID", "the list was deleted"),
        (Code.INVALID_ARGUMENT, "TERMS_AND_CONDITIONS_NOT_SIGNED", "accept the customer data terms"),
        (Code.PERMISSION_DENIED, "NOT_ALLOWLISTED", "may not use Customer Match yet"),
        (Code.NOT_FOUND, "NOT_FOUND", ""),
    ],
)
def test_what_does_not_pass_is_rejected_with_googles_words_and_what_to_do(
    stub: DataManagerStub, manager: DataManager, code: Code, reason: str, advice: str
) -> None:
    champions = manager.open("champions")
    stub.faults.append(Fault(INGEST, code, name=reason))
    with pytest.raises(Rejected, match=f"{reason}: A fault of the test's.*{advice}.*request-"):
        manager.add(champions, [person(1)], "a")
    assert held(stub) == set()


def test_a_list_that_was_deleted_is_told(stub: DataManagerStub, manager: DataManager) -> None:
    champions = manager.open("champions")
    del stub.lists[stub.list_named("Propensity champions")]
    with pytest.raises(Rejected, match="INVALID_USER_LIST_ID.*the list was deleted, or is of another account"):
        manager.add(champions, [person(1)], "a")
    assert len(stub.broken) == 1
    stub.broken.clear()


# --- the stand-in is strict: each rule, broken on purpose ---


class Raw:
    """The official client without the destination, to send what the destination would not."""

    def __init__(self, manager: DataManager, stub: DataManagerStub) -> None:
        self.manager, self.stub = manager, stub
        manager.open("champions")

    def destination(self, **changes: Any) -> Any:
        given = {
            "operating_account": self.account(self.stub.customer_id),
            "login_account": self.account(self.stub.login_customer_id),
            "product_destination_id": self.stub.list_named("Propensity champions"),
        }
        return api.Destination(**given | changes)

    def account(self, number: str, kind: str = "GOOGLE_ADS") -> Any:
        return api.ProductAccount(account_type=kind, account_id=number)

    def ingest(self, *members: Any, **changes: Any) -> None:
        given = {
            "destinations": [self.destination()],
            "audience_members": members or [member()],
            "encoding": "HEX",
            "consent": {"ad_user_data": "CONSENT_GRANTED", "ad_personalization": "CONSENT_GRANTED"},
            "terms_of_service": {"customer_match_terms_of_service_status": "ACCEPTED"},
        }
        request = api.IngestAudienceMembersRequest(**given | changes)
        self.manager._call(self.manager._clients.members, "ingest_audience_members", request)

    def to(self, **changes: Any) -> None:
        self.ingest(destinations=[self.destination(**changes)])

    def make(self, **changes: Any) -> None:
        given = {
            "display_name": "another",
            "description": "of a test",
            "membership_duration": "86400s",
            "ingested_user_list_info": {
                "upload_key_types": ["CONTACT_ID"],
                "contact_id_info": {"data_source_type": "DATA_SOURCE_TYPE_FIRST_PARTY"},
            },
        }
        wanted = api.UserList.from_json(json.dumps(given | changes))
        self.manager._lists("create_user_list", user_list=wanted)


def member(*identifiers: dict[str, Any], **changes: Any) -> Any:
    user = {"user_identifiers": identifiers or [{"email_address": hashed("a")}]}
    return api.AudienceMember(**{"composite_data": {"user_data": user}, **changes})


BREAKS: dict[str, Any] = {
    "INVALID_HEX_ENCODING": lambda raw: raw.ingest(member({"email_address": "somebody@example.com"})),
    "INVALID_SHA256_FORMAT": lambda raw: raw.ingest(member({"phone_number": "00"})),
    "TOO_MANY_USER_IDENTIFIERS": lambda raw: raw.ingest(
        member(*[{"email_address": hashed(str(number))} for number in range(11)])
    ),
    "TOO_MANY_AUDIENCE_MEMBERS": lambda raw: raw.ingest(*[member()] * 10_001),
    "INVALID_AUDIENCE_MEMBER: address": lambda raw: raw.ingest(member({"address": {"region_code": "US"}})),
    "INVALID_AUDIENCE_MEMBER: id": lambda raw: raw.ingest(api.AudienceMember(user_id_data={"user_id": "visitor-1"})),
    "REQUIRED_FIELD_MISSING: identifiers": lambda raw: raw.ingest(api.AudienceMember(composite_data={"user_data": {}})),
    "REQUIRED_FIELD_MISSING: members": lambda raw: raw.ingest(audience_members=[]),
    "REQUIRED_FIELD_MISSING: encoding": lambda raw: raw.ingest(encoding=0),
    "REQUIRED_FIELD_MISSING: destination": lambda raw: raw.ingest(destinations=[]),
    "DENIED_CONSENT: none": lambda raw: raw.ingest(consent={}),
    "DENIED_CONSENT: denied": lambda raw: raw.ingest(
        consent={"ad_user_data": "CONSENT_DENIED", "ad_personalization": "CONSENT_GRANTED"}
    ),
    "DENIED_CONSENT: of one": lambda raw: raw.ingest(member(consent={"ad_user_data": "CONSENT_DENIED"})),
    "TERMS_AND_CONDITIONS_NOT_SIGNED": lambda raw: raw.ingest(terms_of_service={}),
    "INVALID_USER_LIST_ID": lambda raw: raw.to(product_destination_id="1"),
    "INVALID_USER_LIST_TYPE": lambda raw: raw.to(product_destination_id=raw.stub.put("ids", keys=["USER_ID"])),
    "INVALID_DESTINATION: dashes": lambda raw: raw.to(operating_account=raw.account("123-456-7890")),
    "INVALID_DESTINATION: kind": lambda raw: raw.to(
        operating_account=raw.account("1234567890", "DISPLAY_VIDEO_ADVERTISER")
    ),
    "PERMISSION_DENIED: account": lambda raw: raw.to(operating_account=raw.account("1111111111")),
    "PERMISSION_DENIED: manager": lambda raw: raw.to(login_account=raw.account("1111111111")),
    "TOO_MANY_DESTINATIONS": lambda raw: raw.ingest(destinations=[raw.destination()] * 11),
    "UNAUTHENTICATED": lambda raw: (raw.stub.tokens_s.clear(), raw.ingest()),
    "takes no header": lambda raw: raw.manager._call(
        raw.manager._clients.members,
        "retrieve_request_status",
        {"request_id": id_of(1)},
        metadata=[("login-account", "accountTypes/GOOGLE_ADS/accounts/9876543210")],
    ),
    "INVALID_FILTER": lambda raw: raw.manager._lists("list_user_lists", filter='display_name: "a"'),
    "INVALID_RESOURCE_NAME": lambda raw: raw.manager._lists("list_user_lists", parent="customers/1234567890"),
    "REQUIRED_FIELD_MISSING: name": lambda raw: raw.make(display_name=""),
    "REQUIRED_FIELD_MISSING: source": lambda raw: raw.make(
        ingested_user_list_info={"upload_key_types": ["CONTACT_ID"], "contact_id_info": {}}
    ),
    "UNSUPPORTED_USER_LIST_UPLOAD_KEY_TYPES": lambda raw: raw.make(
        ingested_user_list_info={"upload_key_types": ["CONTACT_ID", "USER_ID"]}
    ),
    "INVALID_ARGUMENT": lambda raw: raw.make(membership_duration="100000s"),
    "MEMBERSHIP_DURATION_TOO_LONG": lambda raw: raw.make(membership_duration=f"{541 * 86_400}s"),
    "requests in a minute": lambda raw: [raw.ingest() for _ in range(301)],
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_stand_in_notices_a_broken_rule(stub: DataManagerStub, manager: DataManager, rule: str) -> None:
    raw = Raw(manager, stub)
    assert stub.broken == []
    try:
        BREAKS[rule](raw)
    except (Rejected, Busy) as error:
        assert rule.partition(":")[0] in str(error) or rule in ("requests in a minute", "takes no header")
    assert stub.broken
    assert rule.partition(":")[0] in stub.broken[0]
    stub.broken.clear()


def test_the_stand_in_notices_a_request_without_a_deadline(stub: DataManagerStub, manager: DataManager) -> None:
    manager.open("champions")
    parent = f"accountTypes/GOOGLE_ADS/accounts/{stub.customer_id}"
    through = [("login-account", f"accountTypes/GOOGLE_ADS/accounts/{stub.login_customer_id}")]
    assert len(list(manager._clients.lists.list_user_lists(parent=parent, metadata=through))) == 1
    assert stub.broken == ["ListUserLists: asked without a deadline"]
    stub.broken.clear()
