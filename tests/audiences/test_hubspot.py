"""Owns the promise that HubSpot ends up with the wanted lists, fields and tasks, and that no rule of it is broken."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from audiences.destinations.hubspot import HubSpot, Options, Task, build
from audiences.destinations.protocol import Busy, Outcome, Person, Rejected
from tests.audiences.stubs import hubspot as stubs
from tests.conftest import wait_until


@pytest.fixture
def account() -> Iterator[stubs.HubSpot]:
    with stubs.HubSpot() as stub:
        yield stub
    assert stub.broken == []
    assert stub.faults == []


def destination(account: stubs.HubSpot, **options: Any) -> HubSpot:
    options = {"fields": ("propensity", "model", "segment"), **options}
    return build("crm", Options(token=SecretStr(options.pop("token", stubs.TOKEN)), endpoint=account.url, **options))


def person(number: int, *, ids: tuple[str, ...] | None = None, **fields: Any) -> Person:
    own = {"propensity": 0.25, "model": "shop", "segment": "high_intent", **fields}
    return Person(f"{number:064x}", {"external_id": ids or (f"u{number}",)}, own)


def crowd(account: stubs.HubSpot, n: int) -> tuple[list[Person], list[str]]:
    """So many people who are contacts, and the ids of these."""
    return [person(number) for number in range(n)], [account.contact(external_id=f"u{number}") for number in range(n)]


def test_a_check_reads_and_makes_nothing(account: stubs.HubSpot) -> None:
    account.contact(external_id="u1")
    assert destination(account).check() == "HubSpot shows contacts by external_id, and lists"
    assert [str(request) for request in account.requests] == [
        "GET /crm/v3/properties/contacts/external_id",
        "GET /crm/v3/lists/object-type-id/0-1/name/Propensity ",
        "POST /crm/v3/objects/contacts/batch/read",
    ]
    assert (account.lists, len(account.properties["contacts"])) == ({}, 2)


def test_a_check_tells_credentials_that_are_wrong(account: stubs.HubSpot) -> None:
    with pytest.raises(Rejected, match="401 .*; is the token right?") as error:
        destination(account, token="of-another").check()
    assert "of-another" not in str(error.value)
    account.refuse("batch/read", 403, {})
    with pytest.raises(Rejected, match="403 .* scopes"):
        destination(account).check()


def test_a_check_tells_that_the_property_with_the_ids_is_missing() -> None:
    with (
        stubs.HubSpot(unique=None) as stub,
        pytest.raises(Rejected, match="no property external_id with unique values"),
    ):
        destination(stub).check()


def test_members_are_on_the_list_with_their_fields(account: stubs.HubSpot) -> None:
    hubspot, (people, ids) = destination(account), crowd(account, 100)
    champions = hubspot.open("champions")
    outcomes = hubspot.add(champions, people, "b1")
    assert account.lists[champions]["name"] == "Propensity champions"
    assert account.lists[champions]["processingType"] == "MANUAL"
    assert account.members[champions] == {*ids}
    assert [outcome.accepted for outcome in outcomes] == [True] * 100
    assert [outcome.answer for outcome in outcomes] == [f"contact {id}" for id in ids]
    assert account.contacts[ids[3]] == {
        "external_id": "u3",
        "propensity": "0.25",
        "propensity_model": "shop",
        "propensity_segment": "high_intent",
        "propensity_lists": champions,
    }


def test_properties_and_list_are_made_once(account: stubs.HubSpot) -> None:
    first = destination(account)
    list_id = first.open("champions")
    types = {name: one["type"] for name, one in account.properties["contacts"].items() if name.startswith("propensity")}
    assert types == {
        "propensity": "number",
        "propensity_model": "string",
        "propensity_segment": "string",
        "propensity_lists": "string",
    }
    assert first.open("champions") == destination(account).open("champions") == list_id
    assert len(account.lists) == 1
    assert len(account.sent("POST /crm/v3/properties/contacts$")) == 4
    assert first.open("warm") != list_id


def test_a_percentile_is_a_number_of_contacts(account: stubs.HubSpot) -> None:
    hubspot, (people, (id,)) = destination(account, fields=("percentile",)), crowd(account, 1)
    hubspot.add(hubspot.open("champions"), [Person(people[0].key, people[0].identifiers, {"percentile": 87})], "b1")
    assert account.properties["contacts"]["propensity_percentile"]["type"] == "number"
    assert account.contacts[id]["propensity_percentile"] == "87"


def test_a_list_whose_making_went_unanswered_is_not_made_again(account: stubs.HubSpot) -> None:
    hubspot = destination(account)
    account.lose("POST /crm/v3/lists")
    with pytest.raises(Busy, match="no answer"):
        hubspot.open("champions")
    assert hubspot.open("champions") in account.lists
    assert len(account.lists) == 1


def test_adding_again_changes_nothing(account: stubs.HubSpot) -> None:
    hubspot, (people, _) = destination(account, task={}), crowd(account, 5)
    list_id = hubspot.open("everyone")
    outcomes = hubspot.add(list_id, people, "b1")
    before = (dict(account.members), {id: dict(values) for id, values in account.contacts.items()}, dict(account.tasks))
    assert hubspot.add(list_id, people, "b2") == outcomes
    assert (account.members, account.contacts, account.tasks) == before


def test_who_is_no_contact_is_not_accepted_and_the_others_are_in_their_order(account: stubs.HubSpot) -> None:
    hubspot = destination(account)
    known = account.contact(external_id="u2")
    list_id = hubspot.open("champions")
    outcomes = hubspot.add(list_id, [person(1), person(2), person(3)], "b1")
    assert outcomes == [
        Outcome(False, "no contact has this external_id", final=False),
        Outcome(True, f"contact {known}"),
        Outcome(False, "no contact has this external_id", final=False),
    ]
    assert account.members[list_id] == {known}
    assert len(account.contacts) == 1


def test_nobody_known_sends_no_empty_batch(account: stubs.HubSpot) -> None:
    hubspot = destination(account)
    list_id = hubspot.open("champions")
    assert [one.accepted for one in hubspot.add(list_id, [person(1)], "b1")] == [False]
    assert [one.accepted for one in hubspot.remove(list_id, [person(1)], "b2")] == [True]
    assert account.sent("batch/update|memberships") == []


def test_leaving_the_last_list_clears_the_fields_and_leaving_another_does_not(account: stubs.HubSpot) -> None:
    hubspot, (people, (id, *_)) = destination(account), crowd(account, 2)
    first, second = hubspot.open("champions"), hubspot.open("warm")
    hubspot.add(first, people, "b1")
    hubspot.add(second, people, "b2")
    assert account.contacts[id]["propensity_lists"] == f"{first};{second}"
    leaving = Person(people[0].key, people[0].identifiers)
    assert hubspot.remove(first, [leaving], "b3") == [Outcome(True, f"contact {id}")]
    assert account.contacts[id]["propensity"] == "0.25"
    hubspot.remove(second, [leaving], "b4")
    assert id not in account.members[first] | account.members[second]
    assert {name: value for name, value in account.contacts[id].items() if value} == {"external_id": "u0"}
    assert hubspot.remove(second, [leaving], "b5") == [Outcome(True, f"contact {id}")]


def test_what_people_wrote_among_the_lists_does_no_harm(account: stubs.HubSpot) -> None:
    hubspot, id = destination(account), account.contact(external_id="u0", propensity_lists="mine;9")
    list_id = hubspot.open("champions")
    assert hubspot.add(list_id, [person(0)], "b1") == [Outcome(True, f"contact {id}")]
    assert account.contacts[id]["propensity_lists"] == f"9;{list_id};mine"


def test_two_ids_of_one_person_are_two_contacts_and_two_people_of_one_id_are_one(account: stubs.HubSpot) -> None:
    hubspot, (_, (one, other)) = destination(account), crowd(account, 2)
    list_id = hubspot.open("champions")
    assert hubspot.add(list_id, [person(7, ids=("u0", "u1"))], "b1") == [Outcome(True, f"contact {one}, {other}")]
    hubspot.remove(list_id, [person(7, ids=("u0", "u1"))], "b2")
    twins = [person(7, ids=("u0",), propensity=0.1), person(8, ids=("u0",), propensity=0.2)]
    assert hubspot.add(list_id, twins, "b3") == [Outcome(True, f"contact {one}")] * 2
    assert account.members[list_id] == {one}
    assert account.contacts[one]["propensity"] == "0.2"


def test_without_fields_only_lists_are_kept(account: stubs.HubSpot) -> None:
    hubspot, (people, ids) = destination(account, fields=()), crowd(account, 3)
    list_id = hubspot.open("champions")
    hubspot.add(list_id, people, "b1")
    hubspot.remove(list_id, people[:1], "b2")
    assert account.members[list_id] == {*ids[1:]}
    assert account.sent("batch/update|POST /crm/v3/properties") == []
    assert account.contacts[ids[0]] == {"external_id": "u0"}


def test_contacts_that_go_away_meanwhile_are_not_accepted(account: stubs.HubSpot) -> None:
    hubspot, (people, ids) = destination(account), crowd(account, 3)
    list_id = hubspot.open("champions")
    gone = {"status": "error", "category": "OBJECT_NOT_FOUND", "message": "gone", "context": {"ids": [ids[1]]}}
    kept = [stubs._record(id, {}) for id in (ids[0], ids[2])]
    account.refuse("batch/update", 207, stubs._batch(kept, [gone]).body)
    outcomes = hubspot.add(list_id, people, "b1")
    assert outcomes == [
        Outcome(True, f"contact {ids[0]}"),
        Outcome(False, "OBJECT_NOT_FOUND: gone"),
        Outcome(True, f"contact {ids[2]}"),
    ]
    assert account.members[list_id] == {ids[0], ids[2]}


def test_a_contact_that_the_list_does_not_find_is_not_accepted(account: stubs.HubSpot) -> None:
    hubspot, (people, ids) = destination(account), crowd(account, 2)
    list_id = hubspot.open("champions")
    account.refuse("memberships/add", 200, {"recordsIdsAdded": ids[:1], "recordIdsMissing": ids[1:]})
    assert hubspot.add(list_id, people, "b1") == [
        Outcome(True, f"contact {ids[0]}"),
        Outcome(False, "the contact is no more"),
    ]


# --- tasks ---


def test_a_contact_that_becomes_a_champion_is_a_task_once_for_each_entering(account: stubs.HubSpot) -> None:
    hubspot = destination(account, task={"subject": "Call them", "owner_id": "77", "due_hours": 2})
    id = account.contact(external_id="u1")
    list_id = hubspot.open("everyone")
    for segment in ("warm_prospects", "champions", "champions", "nurture", "champions"):
        hubspot.add(list_id, [person(1, segment=segment)], "b")
        if segment == "warm_prospects":
            assert account.tasks == {}
    assert [task["propensity_key"] for task in account.tasks.values()] == [f"{id}-1", f"{id}-2"]
    assert [*account.associations.values()] == [[id], [id]]
    task = next(iter(account.tasks.values()))
    due_s = int(task.pop("hs_timestamp")) / 1000 - time.time()
    assert 7100 < due_s <= 7200
    assert task == {
        "propensity_key": f"{id}-1",
        "hs_task_subject": "Call them",
        "hs_task_body": "",
        "hs_task_status": "NOT_STARTED",
        "hs_task_priority": "HIGH",
        "hs_task_type": "CALL",
        "hubspot_owner_id": "77",
    }
    assert account.properties["tasks"]["propensity_key"]["hasUniqueValue"]


@pytest.mark.parametrize("lost", ["tasks/batch/create", "contacts/batch/update", "memberships/add"])
def test_an_answer_that_is_lost_makes_no_second_task_and_undoes_no_closed_one(
    account: stubs.HubSpot, lost: str
) -> None:
    hubspot, (_, ids) = destination(account, task={}), crowd(account, 3)
    champions = [person(number, segment="champions") for number in range(3)]
    list_id = hubspot.open("champions")
    account.lose(lost)
    with pytest.raises(Busy, match="no answer"):
        hubspot.add(list_id, champions, "b1")
    for task in account.tasks.values():
        task["hs_task_status"] = "COMPLETED"
    assert all(outcome.accepted for outcome in destination(account, task={}).add(list_id, champions, "b1"))
    assert sorted(contact for contacts in account.associations.values() for contact in contacts) == ids
    assert {task["hs_task_status"] for task in account.tasks.values()} == {"COMPLETED"}
    assert account.members[list_id] == {*ids}


def test_who_leaves_all_lists_and_comes_back_is_a_new_task(account: stubs.HubSpot) -> None:
    hubspot, (_, (id,)) = destination(account, task={}), crowd(account, 1)
    list_id = hubspot.open("champions")
    for _ in range(2):
        hubspot.add(list_id, [person(0, segment="champions")], "b1")
        hubspot.remove(list_id, [person(0)], "b2")
    assert [task["propensity_key"] for task in account.tasks.values()] == [f"{id}-1", f"{id}-2"]


def test_a_task_that_is_refused_leaves_the_contact_as_it_was_so_that_it_is_tried_again(account: stubs.HubSpot) -> None:
    hubspot, (_, ids) = destination(account, task={}), crowd(account, 2)
    champions = [person(number, segment="champions") for number in range(2)]
    list_id = hubspot.open("champions")
    error = stubs._error("VALIDATION_ERROR", "no such owner", objectWriteTraceId=[f"{ids[0]}-1"])
    account.refuse("tasks/batch/create", 207, stubs._batch([], [error]).body)
    outcomes = hubspot.add(list_id, champions, "b1")
    assert outcomes[0] == Outcome(False, "no task: VALIDATION_ERROR: no such owner")
    assert outcomes[1].accepted
    assert "propensity_segment" not in account.contacts[ids[0]]
    assert all(outcome.accepted for outcome in hubspot.add(list_id, champions, "b1"))
    assert [ids[0]] in account.associations.values()


def test_a_task_that_another_process_made_meanwhile_counts_as_made(account: stubs.HubSpot) -> None:
    hubspot, (_, (id,)) = destination(account, task={}), crowd(account, 1)
    list_id = hubspot.open("champions")
    account.tasks["1"] = {"propensity_key": f"{id}-1"}
    account.refuse("tasks/batch/read", 200, stubs._batch([]).body)
    assert hubspot.add(list_id, [person(0, segment="champions")], "b1") == [Outcome(True, f"contact {id}")]
    assert len(account.tasks) == 1


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("status", "body", "headers", "after_s"),
    [
        (429, {"message": "You have reached your limit.", "policyName": "TEN_SECONDLY_ROLLING"}, {}, 10),
        (429, {"message": "You have reached your daily limit.", "policyName": "DAILY"}, {}, 3600),
        (429, {"message": "slow down"}, {"Retry_After": "7"}, 7),
        (423, {"message": "locked"}, {"Retry_After": "2"}, 2),
        (477, {"message": "migration in progress"}, {"Retry_After": "60"}, 60),
        (500, None, {}, None),
        (502, None, {}, None),
        (504, {"message": "timeout"}, {}, None),
    ],
)
def test_what_passes_is_busy(account: stubs.HubSpot, status: int, body: Any, headers: Any, after_s: float) -> None:
    hubspot, (people, ids) = destination(account), crowd(account, 1)
    list_id = hubspot.open("champions")
    account.refuse("batch/read", status, body, **headers)
    with pytest.raises(Busy) as raised:
        hubspot.add(list_id, people, "b1")
    assert raised.value.after_s == after_s
    assert str(status) in str(raised.value)
    assert len(account.sent("batch/read")) == 1, "it retries nothing by itself"
    hubspot.add(list_id, people, "b1")
    assert account.members[list_id] == {*ids}


@pytest.mark.parametrize(
    ("status", "said"), [(400, "Property values were not valid"), (401, "is the token right"), (403, "scopes")]
)
def test_what_does_not_pass_is_rejected(account: stubs.HubSpot, status: int, said: str) -> None:
    hubspot, (people, _) = destination(account), crowd(account, 1)
    list_id = hubspot.open("champions")
    account.refuse("batch/update", status, account.refusal(status, "Property values were not valid").body)
    with pytest.raises(Rejected, match=said):
        hubspot.add(list_id, people, "b1")


def test_a_wrong_token_is_rejected_and_not_told(account: stubs.HubSpot) -> None:
    with pytest.raises(Rejected, match="is the token right") as raised:
        destination(account, token="pat-eu1-wrong").open("champions")
    assert "pat-eu1-wrong" not in str(raised.value)
    assert "pat-eu1-wrong" not in repr(Options(token=SecretStr("pat-eu1-wrong")))


def test_a_list_that_is_gone_is_rejected(account: stubs.HubSpot) -> None:
    hubspot, (people, _) = destination(account), crowd(account, 1)
    list_id = hubspot.open("champions")
    del account.lists[list_id]
    with pytest.raises(Rejected, match="List does not exist"):
        hubspot.add(list_id, people, "b1")


def test_who_leaves_a_list_that_is_gone_keeps_no_score(account: stubs.HubSpot) -> None:
    hubspot, (people, (id,)) = destination(account), crowd(account, 1)
    list_id = hubspot.open("champions")
    hubspot.add(list_id, people, "b1")
    del account.lists[list_id]
    assert hubspot.remove(list_id, people, "b2") == [Outcome(True, f"contact {id}")]
    assert {name: value for name, value in account.contacts[id].items() if value} == {"external_id": "u0"}


def test_options_that_say_more_than_when_the_list_was_made_make_what_is_missing(account: stubs.HubSpot) -> None:
    (people, _), list_id = crowd(account, 1), destination(account, fields=()).open("champions")
    later = destination(account, task={"segment": "high_intent"})
    assert all(outcome.accepted for outcome in later.add(list_id, people, "b1"))
    assert len(account.tasks) == 1
    assert all(outcome.accepted for outcome in destination(account).remove(list_id, people, "b2"))


def test_a_list_of_the_name_that_is_dynamic_is_rejected(account: stubs.HubSpot) -> None:
    account.lists["9"] = {
        "listId": "9", "listVersion": 1, "name": "Propensity champions", "objectTypeId": "0-1",
        "processingType": "DYNAMIC", "processingStatus": "COMPLETE",
    }  # fmt: skip
    with pytest.raises(Rejected, match="DYNAMIC, not static"):
        destination(account).open("champions")


def test_a_property_of_another_type_is_rejected(account: stubs.HubSpot) -> None:
    account.properties["contacts"]["propensity"] = stubs._property("propensity", "string")
    with pytest.raises(Rejected, match="propensity of contacts is of type string; it must be number"):
        destination(account).open("champions")


def test_without_a_unique_property_it_says_what_to_make() -> None:
    with stubs.HubSpot(unique=None) as account:
        with pytest.raises(Rejected, match="Require unique values"):
            destination(account).open("champions")
        account.properties["contacts"]["external_id"] = stubs._property("external_id", "string")
        with pytest.raises(Rejected, match="Require unique values"):
            destination(account).open("champions")
        account.properties["contacts"]["shop_id"] = stubs._property("shop_id", "string", unique=True)
        assert destination(account, id_property="shop_id").open("champions") in account.lists


def test_no_answer_in_time_is_busy(account: stubs.HubSpot) -> None:
    hubspot, (people, ids) = destination(account, timeout_s=0.3), crowd(account, 1)
    list_id = hubspot.open("champions")
    account.stall("memberships/add", 2)
    started = time.monotonic()
    with pytest.raises(Busy, match="no answer when putting on a list: ReadTimeoutError"):
        hubspot.add(list_id, people, "b1")
    assert time.monotonic() - started < 2
    assert all(outcome.accepted for outcome in hubspot.add(list_id, people, "b1"))
    wait_until(lambda: len(account.sent("memberships/add")) == 2)  # the stalled request, which changes nothing
    assert account.members[list_id] == {*ids}


def test_nobody_there_is_busy() -> None:
    with stubs.HubSpot() as account:
        hubspot = destination(account)
    with pytest.raises(Busy, match="no answer"):
        hubspot.open("champions")


# --- limits ---


@pytest.mark.parametrize("plan", [100, 190])
def test_as_many_batches_as_the_limits_allow_stay_within_the_plan(account: stubs.HubSpot, plan: int) -> None:
    options: dict[str, Any] = {"task": {}, "requests_per_10s": plan}
    crowd(account, 100)
    list_id = destination(account, **options).open("champions")
    hubspot = destination(account, **options)  # a new process, which looks at the properties again
    assert hubspot.limits.members == 100
    assert hubspot.limits.seconds == 10
    first, worst = 0, 0
    for segment in ("champions", "nurture", "champions", "nurture", "champions"):
        before = len(account.requests)
        hubspot.add(list_id, [person(number, segment=segment) for number in range(100)], "b1")
        sent = len(account.requests) - before
        first, worst = first or sent, max(worst, sent) if first else 0
    assert worst == 5, "contacts, tasks that are there, new tasks, fields, list"
    assert first + worst * (hubspot.limits.requests - 1) <= plan


def test_the_rolling_limit_of_the_platform_is_answered_with_its_wait(account: stubs.HubSpot) -> None:
    hubspot, (people, _) = destination(account), crowd(account, 1)
    list_id = hubspot.open("champions")
    account.window = (len(account.requests) + 1, 10.0)
    with pytest.raises(Busy, match="ten_secondly_rolling") as raised:
        hubspot.add(list_id, people, "b1")
    assert raised.value.after_s == 10
    assert account.throttled == 1


# --- the stub is strict ---


@pytest.mark.parametrize(
    ("break_it", "rule"),
    [
        (
            lambda hubspot, list_id, people: hubspot._contacts.read({"inputs": [{"id": str(n)} for n in range(101)]}),
            "100",
        ),
        (lambda hubspot, list_id, people: hubspot._contacts.read({"inputs": []}), "an input at least"),
        (lambda hubspot, list_id, people: hubspot._contacts.read({"inputs": [{"id": "1"}] * 2}), "Duplicate"),
        (
            lambda hubspot, list_id, people: hubspot._contacts.read({"idProperty": "email", "inputs": [{"id": "1"}]}),
            "unique",
        ),
        (lambda hubspot, list_id, people: hubspot._write({people: {"nonsense": "1"}}), "PROPERTY_DOESNT_EXIST"),
        (lambda hubspot, list_id, people: hubspot._write({people: {"propensity": "high"}}), "valid number"),
        (lambda hubspot, list_id, people: hubspot._write({people: {"propensity": 0.5}}), "is a string"),
        (lambda hubspot, list_id, people: hubspot._tasks.create({"inputs": [{"properties": {}}]}), "hs_timestamp"),
        (lambda hubspot, list_id, people: hubspot._memberships.add(int(list_id), [7]), "are strings"),
        (lambda hubspot, list_id, people: hubspot._memberships.add(int(list_id), []), "list of ids"),
        (lambda hubspot, list_id, people: hubspot._new_list("Propensity champions"), "of this name"),
        (lambda hubspot, list_id, people: hubspot._ensure("contacts", "Upper Case", "string"), "small letters"),
        (lambda hubspot, list_id, people: _unauthorised(hubspot).open("x"), "Authorization"),
    ],
)
def test_the_stub_notices_a_broken_rule(break_it: Any, rule: str) -> None:
    with stubs.HubSpot() as account:
        hubspot, (_, (id,)) = destination(account), crowd(account, 1)
        list_id = hubspot.open("champions")
        with pytest.raises(Exception, match=rule):
            break_it(hubspot, list_id, id)
        assert rule in account.broken[-1]


def _unauthorised(hubspot: HubSpot) -> HubSpot:
    del hubspot._lists.api_client.configuration.access_token
    hubspot._lists.api_client.configuration.access_token = None
    return hubspot


# --- options ---


def test_every_option_is_in_the_docs_with_its_default_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs/destinations/hubspot.md").read_text("utf-8")
    described = re.findall(r"^\| `(\w+)` \| (.+?) \|", page[: page.index("\n## What is sent\n")], re.MULTILINE)
    assert described == [
        (name, shown(field)) for name, field in [*Options.model_fields.items(), *Task.model_fields.items()]
    ]


def shown(field: FieldInfo) -> str:
    """A default as the page has it."""
    if field.is_required():
        return "required"
    value = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    return {None: "none", "": "empty"}.get(value, f"`{f'{value:g}' if isinstance(value, float) else value}`")


def test_a_task_without_the_field_segment_is_refused() -> None:
    with pytest.raises(ValidationError, match="add segment to fields"):
        Options(token=SecretStr("x"), fields=("propensity",), task={})


def test_a_task_for_a_segment_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="task.segment\n.*write one of champions, high_intent"):
        Options(token=SecretStr("x"), task={"segment": "champion"})


def test_a_token_in_the_clear_is_refused() -> None:
    with pytest.raises(ValidationError, match="no place for a secret") as raised:
        Options.model_validate({"token": "pat-eu1-clear"})
    assert "pat-eu1-clear" not in str(raised.value)
