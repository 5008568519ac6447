"""Owns the promise that Klaviyo ends up with the wanted lists and fields, and that no rule of it is broken."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from audiences.destinations.klaviyo import Klaviyo, Options, build
from audiences.destinations.protocol import Busy, Outcome, Person, Rejected
from tests.audiences.stubs import klaviyo as stubs

FIELDS = {"propensity": 0.25, "propensity_model": "shop", "propensity_segment": "high_intent"}


@pytest.fixture
def account() -> Iterator[stubs.Klaviyo]:
    with stubs.Klaviyo() as stub:
        yield stub
    assert stub.broken == []
    assert stub.faults == []
    assert not any(id.startswith("NEW") for id in stub.profiles), "no profile is ever made"


def destination(account: stubs.Klaviyo, **options: Any) -> Klaviyo:
    options = {"fields": ("propensity", "model", "segment"), **options}
    key = SecretStr(options.pop("api_key", stubs.KEY))
    return build("mail", Options(**{"api_key": key, "endpoint": account.url, "job_poll_s": 0.01, **options}))


def person(number: int, *, ids: tuple[str, ...] | None = None, **fields: Any) -> Person:
    own = {"propensity": 0.25, "model": "shop", "segment": "high_intent", **fields}
    return Person(f"{number:064x}", {"external_id": ids or (f"u{number}",)}, own)


def crowd(account: stubs.Klaviyo, n: int) -> tuple[list[Person], list[str]]:
    """So many people who are profiles, and the ids of these."""
    return [person(number) for number in range(n)], [account.profile(f"u{number}") for number in range(n)]


def test_a_percentile_is_kept_on_profiles(account: stubs.Klaviyo) -> None:
    klaviyo, (people, (id,)) = destination(account, fields=("percentile",)), crowd(account, 1)
    klaviyo.add(klaviyo.open("champions"), [Person(people[0].key, people[0].identifiers, {"percentile": 87})], "b1")
    assert account.profiles[id]["properties"]["propensity_percentile"] == 87


def test_a_check_reads_and_makes_nothing(account: stubs.Klaviyo) -> None:
    account.profile("u1")
    assert destination(account).check() == "Klaviyo shows lists and profiles"
    assert [str(request) for request in account.requests] == ["GET /api/lists", "GET /api/profiles"]
    assert account.lists == {}


def test_a_check_tells_credentials_that_are_wrong(account: stubs.Klaviyo) -> None:
    with pytest.raises(Rejected, match="401 .*; is api_key right?") as error:
        destination(account, api_key="of-another").check()
    assert "of-another" not in str(error.value)
    account.refuse("/api/profiles", 403, {})
    with pytest.raises(Rejected, match="403 .* scopes"):
        destination(account).check()


def test_members_are_on_the_list_with_their_fields(account: stubs.Klaviyo) -> None:
    klaviyo, (people, ids) = destination(account), crowd(account, 1000)
    champions = klaviyo.open("champions")
    outcomes = klaviyo.add(champions, people, "b1")
    assert account.lists == {champions: "Propensity champions"}
    assert account.members[champions] == {*ids}
    assert outcomes == [Outcome(True, f"profile {id}") for id in ids]
    assert account.profiles[ids[3]] == {"external_id": "u3", "properties": {**FIELDS, "propensity_lists": [champions]}}
    assert len(account.sent("GET /api/profiles$")) == 10
    assert len(account.sent("POST /api/profile-bulk-import-jobs")) == 1
    assert len(account.sent("relationships/profiles")) == 1


def test_the_list_is_filled_after_the_fields_so_that_what_it_triggers_finds_them(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account), crowd(account, 1)
    klaviyo.add(klaviyo.open("champions"), people, "b1")
    assert [str(request) for request in account.requests[2:]] == [
        "GET /api/profiles",
        "POST /api/profile-bulk-import-jobs",
        "GET /api/profile-bulk-import-jobs/J000003",
        "POST /api/lists/L000002/relationships/profiles",
    ]


def test_the_list_is_made_once(account: stubs.Klaviyo) -> None:
    name = 'the "best", all of them'
    first = destination(account).open(name)
    assert destination(account).open(name) == first
    assert account.lists == {first: f"Propensity {name}"}


def test_a_list_whose_making_went_unanswered_is_not_made_again(account: stubs.Klaviyo) -> None:
    klaviyo = destination(account)
    account.lose("POST /api/lists")
    with pytest.raises(Busy, match="no answer"):
        klaviyo.open("champions")
    assert klaviyo.open("champions") in account.lists
    assert len(account.lists) == 1


def test_adding_again_changes_nothing(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account), crowd(account, 5)
    list_id = klaviyo.open("everyone")
    outcomes = klaviyo.add(list_id, people, "b1")
    before = copy.deepcopy((account.members, account.profiles))
    assert klaviyo.add(list_id, people, "b2") == outcomes
    assert (account.members, account.profiles) == before


def test_who_is_no_profile_is_not_accepted_and_the_others_are_in_their_order(account: stubs.Klaviyo) -> None:
    klaviyo = destination(account)
    known = account.profile("u2")
    list_id = klaviyo.open("champions")
    outcomes = klaviyo.add(list_id, [person(1), person(2), person(3)], "b1")
    none = Outcome(False, "no profile has this external_id", final=False)
    assert outcomes == [none, Outcome(True, f"profile {known}"), none]
    assert account.members[list_id] == {known}


def test_nobody_known_sends_no_empty_batch(account: stubs.Klaviyo) -> None:
    klaviyo = destination(account)
    list_id = klaviyo.open("champions")
    assert [one.accepted for one in klaviyo.add(list_id, [person(1)], "b1")] == [False]
    assert [one.accepted for one in klaviyo.remove(list_id, [person(1)], "b2")] == [True]
    assert account.sent("import|relationships") == []


def test_leaving_the_last_list_removes_the_fields_and_leaving_another_does_not(account: stubs.Klaviyo) -> None:
    klaviyo, id = destination(account), account.profile("u0", favourite="shoes")
    first, second = klaviyo.open("champions"), klaviyo.open("warm")
    klaviyo.add(first, [person(0)], "b1")
    klaviyo.add(second, [person(0)], "b2")
    leaving = Person(person(0).key, {"external_id": ("u0",)})
    assert klaviyo.remove(first, [leaving], "b3") == [Outcome(True, f"profile {id}")]
    kept = {"favourite": "shoes", **FIELDS, "propensity_lists": [second]}
    assert account.profiles[id]["properties"] == kept
    klaviyo.remove(second, [leaving], "b4")
    assert account.profiles[id]["properties"] == {"favourite": "shoes"}
    assert account.members == {first: set(), second: set()}
    assert klaviyo.remove(second, [leaving], "b5") == [Outcome(True, f"profile {id}")]


def test_several_profiles_of_one_id_come_and_go_together_over_pages() -> None:
    with stubs.Klaviyo(page=2) as account:
        klaviyo, ids = destination(account), [account.profile("u1") for _ in range(5)]
        list_id = klaviyo.open("champions")
        assert klaviyo.add(list_id, [person(1)], "b1") == [Outcome(True, f"profile {', '.join(ids)}")]
        assert account.members[list_id] == {*ids}
        klaviyo.remove(list_id, [person(1)], "b2")
        assert account.members[list_id] == set()
        assert len(account.sent("GET /api/profiles$")) == 6
        assert account.broken == []


def test_long_and_odd_ids_are_found(account: stubs.Klaviyo) -> None:
    ids = [f'{number}/"é ,]\\)' + "x" * 200 for number in range(100)]
    made, klaviyo = [account.profile(id) for id in ids], destination(account)
    list_id = klaviyo.open("champions")
    people = [person(number, ids=(id,)) for number, id in enumerate(ids)]
    assert all(outcome.accepted for outcome in klaviyo.add(list_id, people, "b1"))
    assert account.members[list_id] == {*made}


def test_without_fields_only_lists_are_kept(account: stubs.Klaviyo) -> None:
    klaviyo, (people, ids) = destination(account, fields=()), crowd(account, 3)
    list_id = klaviyo.open("champions")
    klaviyo.add(list_id, people, "b1")
    klaviyo.remove(list_id, people[:1], "b2")
    assert account.members[list_id] == {*ids[1:]}
    assert account.sent("import") == []


# --- imports ---


def test_profiles_that_an_import_refuses_are_not_accepted_and_not_on_the_list(account: stubs.Klaviyo) -> None:
    klaviyo, (people, ids) = destination(account), crowd(account, 250)
    list_id = klaviyo.open("champions")
    account.failing = {id: f"refuses {id}" for id in ids[::2]}  # more errors than a page holds
    outcomes = klaviyo.add(list_id, people, "b1")
    assert [outcome.accepted for outcome in outcomes] == [False, True] * 125
    assert outcomes[2] == Outcome(False, f"invalid: refuses {ids[2]}")
    assert account.members[list_id] == {*ids[1::2]}
    assert len(account.sent("import-errors")) == 2


def test_an_error_that_names_nobody_counts_for_everybody(account: stubs.Klaviyo) -> None:
    klaviyo, (people, ids) = destination(account), crowd(account, 2)
    list_id = klaviyo.open("champions")
    account.failing = {ids[0]: "x"}
    error = {"type": "import-error", "id": "e", "attributes": {"code": "odd", "title": "", "detail": "?", "source": {}}}
    account.refuse("import-errors", 200, {"data": [error], "links": {}})
    assert klaviyo.add(list_id, people, "b1") == [Outcome(False, "odd: ?")] * 2
    assert account.members[list_id] == set()


def test_an_import_that_takes_several_looks_is_waited_for() -> None:
    with stubs.Klaviyo(polls=5) as account:
        klaviyo, (people, ids) = destination(account), crowd(account, 3)
        list_id = klaviyo.open("champions")
        assert all(outcome.accepted for outcome in klaviyo.add(list_id, people, "b1"))
        assert len(account.sent("GET /api/profile-bulk-import-jobs/")) == 5
        assert account.members[list_id] == {*ids}
        assert account.broken == []


def test_an_import_that_does_not_end_is_busy_and_nobody_is_on_the_list() -> None:
    with stubs.Klaviyo(polls=1000) as account:
        klaviyo, (people, _) = destination(account, job_wait_s=0.1, job_poll_s=0.05), crowd(account, 3)
        list_id = klaviyo.open("champions")
        with pytest.raises(Busy, match="still processing after 0.1 s"):
            klaviyo.add(list_id, people, "b1")
        assert account.members[list_id] == set()
        assert account.broken == []


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("status", "headers", "after_s"),
    [(429, {"Retry_After": "7"}, 7), (429, {}, None), (500, {}, None), (503, {}, None)],
)
def test_what_passes_is_busy(account: stubs.Klaviyo, status: int, headers: Any, after_s: float | None) -> None:
    klaviyo, (people, ids) = destination(account), crowd(account, 1)
    list_id = klaviyo.open("champions")
    account.refuse("POST /api/lists/", status, account.refusal(status, "later").body, **headers)
    with pytest.raises(Busy, match=f"{status} later") as raised:
        klaviyo.add(list_id, people, "b1")
    assert raised.value.after_s == after_s
    assert len(account.sent("POST /api/lists/")) == 1, "it retries nothing by itself"
    klaviyo.add(list_id, people, "b1")
    assert account.members[list_id] == {*ids}


def test_an_error_that_is_no_json_is_busy_too(account: stubs.Klaviyo) -> None:
    account.refuse("GET /api/lists", 502, "<html>Bad gateway</html>")
    with pytest.raises(Busy, match="502"):
        destination(account).open("champions")


@pytest.mark.parametrize(
    ("status", "said"), [(400, "Invalid"), (401, "is api_key right"), (403, "scopes"), (410, "Invalid")]
)
def test_what_does_not_pass_is_rejected(account: stubs.Klaviyo, status: int, said: str) -> None:
    account.refuse("GET /api/lists", status, account.refusal(status, "Invalid").body)
    with pytest.raises(Rejected, match=said):
        destination(account).open("champions")


def test_a_wrong_key_is_rejected_and_not_told(account: stubs.Klaviyo) -> None:
    with pytest.raises(Rejected, match="is api_key right") as raised:
        destination(account, api_key="pk_wrong").open("champions")
    assert "pk_wrong" not in str(raised.value)
    assert "pk_wrong" not in repr(Options(api_key=SecretStr("pk_wrong")))


def test_a_list_that_is_gone_is_rejected(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account), crowd(account, 1)
    list_id = klaviyo.open("champions")
    del account.lists[list_id]
    with pytest.raises(Rejected, match="does not exist"):
        klaviyo.add(list_id, people, "b1")


def test_who_leaves_a_list_that_is_gone_keeps_no_score(account: stubs.Klaviyo) -> None:
    klaviyo, (people, (id,)) = destination(account), crowd(account, 1)
    list_id = klaviyo.open("champions")
    klaviyo.add(list_id, people, "b1")
    del account.lists[list_id]
    assert klaviyo.remove(list_id, people, "b2") == [Outcome(True, f"profile {id}")]
    assert account.profiles[id]["properties"] == {}


@pytest.mark.parametrize("lost", ["POST /api/profile-bulk-import-jobs", "POST /api/lists/", "DELETE /api/lists/"])
def test_an_answer_that_is_lost_is_made_up_for_by_the_next_attempt(account: stubs.Klaviyo, lost: str) -> None:
    klaviyo, (people, ids) = destination(account), crowd(account, 3)
    list_id = klaviyo.open("champions")
    act = klaviyo.remove if lost.startswith("DELETE") else klaviyo.add
    klaviyo.add(list_id, people[:2], "b0")
    account.lose(lost)
    with pytest.raises(Busy, match="no answer"):
        act(list_id, people, "b1")
    assert all(outcome.accepted for outcome in act(list_id, people, "b1"))
    assert account.members[list_id] == (set() if act == klaviyo.remove else {*ids})
    assert all(("propensity" in account.profiles[id]["properties"]) == (act == klaviyo.add) for id in ids)


def test_no_answer_in_time_is_busy(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account, timeout_s=0.3), crowd(account, 1)
    list_id = klaviyo.open("champions")
    account.stall("GET /api/profiles", 2)
    started = time.monotonic()
    with pytest.raises(Busy, match="no answer when reading profiles: ReadTimeoutError"):
        klaviyo.add(list_id, people, "b1")
    assert time.monotonic() - started < 2
    assert all(outcome.accepted for outcome in klaviyo.add(list_id, people, "b1"))


# --- limits ---


def test_as_many_batches_as_the_limits_allow_stay_within_every_rate(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account), crowd(account, 1000)
    assert klaviyo.limits.members == 1000
    a_minute = klaviyo.limits.requests * 60 / klaviyo.limits.seconds
    list_id = klaviyo.open("champions")
    before = len(account.requests)
    klaviyo.add(list_id, people, "b1")
    sent = [str(request) for request in account.requests[before:]]
    for route, (burst, steady) in {
        "GET /api/profiles": stubs.LARGE,
        "POST /api/profile-bulk-import-jobs": stubs.MEDIUM,
        f"POST /api/lists/{list_id}/relationships/profiles": stubs.MEDIUM,
    }.items():
        assert 0 < sent.count(route) <= burst
        assert sent.count(route) * a_minute <= steady
    assert account.throttled == 0


def test_the_rate_of_a_route_is_answered_with_its_wait(account: stubs.Klaviyo) -> None:
    klaviyo, (people, _) = destination(account, fields=()), crowd(account, 1)
    list_id = klaviyo.open("champions")
    with pytest.raises(Busy, match="throttled") as raised:
        for _ in range(151):
            klaviyo.add(list_id, people, "b1")
    assert raised.value.after_s == 3
    assert account.throttled == 1


# --- the stub is strict ---


@pytest.mark.parametrize(
    ("break_it", "rule"),
    [
        (
            lambda klaviyo, list_id: klaviyo._profiles.get_profiles(filter="any(external_id,[])", fields_profile=["x"]),
            "fields",
        ),
        (
            lambda klaviyo, list_id: klaviyo._profiles.get_profiles(filter='equals(email,"a@example.com")'),
            "filter of profiles",
        ),
        (lambda klaviyo, list_id: klaviyo._lists.add_profiles_to_list(list_id, _members(1001)), "1000"),
        (lambda klaviyo, list_id: klaviyo._lists.add_profiles_to_list(list_id, _members(1)), "profiles exist"),
        (
            lambda klaviyo, list_id: klaviyo._lists.remove_profiles_from_list(list_id, {"data": []}),
            "a profile at least",
        ),
        (lambda klaviyo, list_id: klaviyo._import([{"type": "profile", "attributes": {}}]), "identifier"),
        (lambda klaviyo, list_id: klaviyo._import([_profile(1)] * 10_001), "10,000"),
        (lambda klaviyo, list_id: klaviyo._import([_profile(110_000)]), "100 KB"),
        (lambda klaviyo, list_id: klaviyo._import([_profile(90_000)] * 60), "5 MB"),
        (lambda klaviyo, list_id: _without(klaviyo, "revision").open("x"), "revision"),
        (lambda klaviyo, list_id: _unauthorised(klaviyo).open("x"), "Authorization"),
    ],
)
def test_the_stub_notices_a_broken_rule(break_it: Any, rule: str) -> None:
    with stubs.Klaviyo() as account:
        klaviyo = destination(account)
        list_id = klaviyo.open("champions")
        with pytest.raises(Exception, match=rule):
            break_it(klaviyo, list_id)
        assert rule in account.broken[-1]


def _members(n: int) -> dict[str, Any]:
    return {"data": [{"type": "profile", "id": f"p{number}"} for number in range(n)]}


def _profile(size: int) -> dict[str, Any]:
    return {"type": "profile", "id": "p", "attributes": {"properties": {"note": "x" * size}}}


def _without(klaviyo: Klaviyo, header: str) -> Klaviyo:
    del klaviyo._lists.api_client.default_headers[header]
    return klaviyo


def _unauthorised(klaviyo: Klaviyo) -> Klaviyo:
    klaviyo._lists.api_client.configuration.api_key = {}
    return klaviyo


def test_a_key_in_the_clear_is_refused() -> None:
    with pytest.raises(ValidationError, match="no place for a secret") as raised:
        Options.model_validate({"api_key": "pk_clear"})
    assert "pk_clear" not in str(raised.value)


def test_every_option_is_in_the_docs_with_its_default_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs/destinations/klaviyo.md").read_text("utf-8")
    described = re.findall(r"^\| `(\w+)` \| (.+?) \|", page[: page.index("\n## What is sent\n")], re.MULTILINE)
    assert described == [(name, shown(field)) for name, field in Options.model_fields.items()]


def shown(field: FieldInfo) -> str:
    """A default as the page has it."""
    if field.is_required():
        return "required"
    value = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    return {None: "none", "": "empty"}.get(value, f"`{f'{value:g}' if isinstance(value, float) else value}`")


def test_a_field_that_nobody_gives_is_refused() -> None:
    with pytest.raises(ValidationError, match="Input should be 'propensity', 'percentile', 'segment' or 'model'"):
        Options(api_key=SecretStr("x"), fields=("propensty",))
