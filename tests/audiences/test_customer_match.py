"""What both ways to Google's Customer Match promise alike, each by its official client against its stand-in."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from grpc import StatusCode as Code
from pydantic import SecretStr, ValidationError

from audiences.destinations import data_manager, google, registry
from audiences.destinations.customer_match import CustomerMatch, Options
from audiences.destinations.protocol import Busy, Destination, Outcome, Person, Purpose, Rejected
from service.core.errors import PropensityError
from tests.audiences import documented
from tests.audiences.people import hashed, identifiers, person
from tests.audiences.stubs.data_manager import DataManagerStub
from tests.audiences.stubs.google import GoogleStub
from tests.audiences.stubs.googleapis import Fault

pytestmark = pytest.mark.usefixtures("trusted")


@dataclass
class Way:
    """One of them."""

    kind: str
    module: ModuleType
    stub: Any
    upload: str  # the method that takes members
    make: str  # the method that makes a list
    library: str
    own: Mapping[str, Any] = field(default_factory=dict)  # options that the other has not
    secrets: tuple[str, ...] = ()

    def options(self, **changes: Any) -> Options:
        given = {**self.stub.options, **self.own, "customer_id": "123-456-7890", "timeout_s": 10}
        options: Options = self.module.Options.model_validate(given | changes)
        return options

    def build(self, **changes: Any) -> CustomerMatch:
        built: CustomerMatch = self.module.build("ours", self.options(**changes))
        return built

    def identifiers(self, *people: Person) -> set[tuple[str, str]]:
        return identifiers(self.module.FIELDS, *people)

    def held(self) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = self.stub.held("Propensity champions")
        return found

    @property
    def page(self) -> str:
        return f"{self.kind}.md"


def by_ads(stub: GoogleStub) -> Way:
    secrets = (stub.developer_token,)
    methods = ("AddOfflineUserDataJobOperations", "MutateUserLists")
    return Way("google-ads", google, stub, *methods, "google.ads.googleads.client", secrets=secrets)


def by_data_manager(stub: DataManagerStub) -> Way:
    own = {"customer_match_terms": "accepted"}
    methods = ("IngestAudienceMembers", "CreateUserList")
    return Way("google-data-manager", data_manager, stub, *methods, "google.ads.datamanager_v1", own)


@pytest.fixture(params=["google-ads", "google-data-manager"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    stub: GoogleStub | DataManagerStub
    if request.param == "google-ads":
        with GoogleStub().serving() as stub:
            yield by_ads(stub)
    else:
        with DataManagerStub().serving() as stub:
            yield by_data_manager(stub)
    assert stub.broken == []


@pytest.fixture
def ours(way: Way) -> CustomerMatch:
    return way.build()


# --- lists ---


def test_a_list_is_made_once_with_its_type_and_the_days_that_members_stay(way: Way) -> None:
    first = way.build(membership_days=90).open("champions")
    assert way.build(membership_days=90).open("champions") == first, "as after a kill between making and use"
    assert len(way.stub.lists) == 1
    assert way.stub.stay_days(way.stub.list_named("Propensity champions")) == 90
    assert way.stub.calls.count(way.make) == 1


def test_a_list_whose_members_would_be_gone_before_they_are_sent_again_is_refused(way: Way) -> None:
    way.stub.put("Propensity champions", days=30)
    with pytest.raises(Rejected, match="stay for 30 days; set membership_days: 30"):
        way.build().open("champions")
    built = way.build(membership_days=30)
    assert built.open("champions").endswith(way.stub.list_named("Propensity champions"))
    assert built.keeps_ms == 30 * 86_400_000


def test_a_list_is_found_by_its_name_whatever_is_in_it(way: Way, ours: CustomerMatch) -> None:
    for name in ("Propensity champions", 'Propensity "o\'neill" \\ sons'):
        way.stub.put(name)
    assert ours.open('"o\'neill" \\ sons').endswith(way.stub.list_named('Propensity "o\'neill" \\ sons'))
    assert len(way.stub.lists) == 2


def test_lists_of_others_are_not_used_and_all_pages_are_read(way: Way, ours: CustomerMatch) -> None:
    for _ in range(3):
        way.stub.put("Propensity champions", read_only=True)
    own = way.stub.put("Propensity champions")
    assert ours.open("champions").endswith(own)


def test_of_two_synchronisations_at_once_both_use_the_list_that_one_made(way: Way, ours: CustomerMatch) -> None:
    way.stub.before[way.make] = lambda: way.stub.put("Propensity champions")
    assert ours.open("champions").endswith(way.stub.list_named("Propensity champions"))
    search, make, again = way.stub.calls
    assert (search, make) == (again, way.make)


# --- members ---


def test_members_are_those_wanted_after_additions_and_removals(way: Way, ours: CustomerMatch) -> None:
    people = [person(1), person(2, emails=2, phones=1), person(3, emails=0, phones=2), person(4)]
    champions = ours.open("champions")
    added = ours.add(champions, people, "a")
    assert [outcome.accepted for outcome in added] == [True] * 4
    assert way.held() == way.identifiers(*people)
    ours.remove(champions, [people[1], people[3]], "b")
    assert way.held() == way.identifiers(people[0], people[2])


def test_adding_and_removing_twice_changes_nothing(way: Way, ours: CustomerMatch) -> None:
    champions = ours.open("champions")
    for _ in range(2):
        ours.add(champions, [person(1), person(1), person(2)], "a")
    assert way.held() == way.identifiers(person(1), person(2))
    for _ in range(2):
        ours.remove(champions, [person(1), person(7)], "b")
    assert way.held() == way.identifiers(person(2))


def test_who_has_nothing_to_send_or_no_hash_is_not_sent_and_the_others_are(way: Way, ours: CustomerMatch) -> None:
    raw = Person(hashed("raw"), {"google.email": ("somebody@example.com",)})
    upper = Person(hashed("upper"), {"google.email": (hashed("x").upper(),)})
    without = Person(hashed("none"), {"meta.email": (hashed("m"),)})
    champions = ours.open("champions")
    outcomes = ours.add(champions, [raw, person(1), without, upper], "a")
    assert [outcome.accepted for outcome in outcomes] == [False, True, False, False]
    assert "64 lower-case hex" in outcomes[0].answer
    assert "somebody" not in str(outcomes)
    assert "google.email nor google.phone" in outcomes[2].answer
    assert way.held() == way.identifiers(person(1))
    assert ours.purpose is Purpose.ADS


def test_nobody_to_send_asks_for_nothing(way: Way, ours: CustomerMatch) -> None:
    (outcome,) = ours.add("1", [Person(hashed("a"), {})], "a")
    assert outcome == Outcome(False, "not sent: has neither google.email nor google.phone")
    assert way.stub.calls == []


# --- errors ---


def test_no_answer_in_time_is_busy(way: Way) -> None:
    built = way.build(timeout_s=0.5)
    champions = built.open("champions")
    way.stub.faults.append(Fault(way.upload, Code.OK, after=True, sleep_s=3))
    started_s = time.monotonic()
    with pytest.raises(Busy, match="DEADLINE_EXCEEDED"):
        built.add(champions, [person(1)], "a")
    assert time.monotonic() - started_s < 3


def test_no_platform_at_all_is_busy(way: Way) -> None:
    with pytest.raises(Busy):
        way.build(endpoint="localhost:1", timeout_s=1).open("champions")
    with pytest.raises(Busy, match="access tokens does not answer"):
        way.build(token_url="http://127.0.0.1:1/token").open("champions")


# --- credentials and secrets ---


def test_a_token_that_ran_out_is_refreshed(way: Way, ours: CustomerMatch) -> None:
    champions = ours.open("champions")
    (token,) = way.stub.tokens_s
    ours._credentials.expiry = ours._credentials.expiry.replace(year=2000)
    way.stub.tokens_s[token] = 0.0
    ours.add(champions, [person(1)], "a")
    assert len(way.stub.tokens_s) == 2


def test_a_refresh_token_that_was_revoked_is_rejected_and_no_secret_is_told(
    way: Way, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    given = way.options(refresh_token=SecretStr("revoked-refresh-token"))
    with pytest.raises(Rejected, match="invalid_grant.*renew the refresh token") as told:
        way.module.build("ours", given).open("champions")
    words = "".join([str(told.value), repr(given), given.model_dump_json(), caplog.text, *capfd.readouterr()])
    for secret in ("revoked-refresh-token", way.stub.client_secret, *way.secrets):
        assert secret not in words


def test_nothing_that_was_sent_is_logged(
    way: Way,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOOGLE_SDK_PYTHON_LOGGING_SCOPE", "google.ads.datamanager_v1")
    caplog.set_level(logging.DEBUG)
    ours = way.build()
    champions = ours.open("champions")
    ours.add(champions, [person(1)], "a")
    way.stub.faults.append(Fault(way.upload, Code.UNAVAILABLE))
    with pytest.raises(Busy) as told:
        ours.add(champions, [person(1)], "a")
    words = "".join([str(told.value), caplog.text, *capfd.readouterr(), *(str(vars(one)) for one in caplog.records)])
    for secret in (*way.secrets, *way.stub.tokens_s, person(1).identifiers["google.email"][0]):
        assert secret not in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"customer_id": "12345"}, "ten digits"),
        ({"membership_days": 541}, "540"),
        ({"token_url": "http://example.com/token"}, "https://"),
        ({"client_secret": None}, "together"),
        ({"key_file": "key.json"}, "either key_file or"),
        ({"refresh_token": "clear text"}, "no place for a secret"),
        ({"budget": 1}, "budget"),
    ],
)
def test_a_wrong_option_is_told(way: Way, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        way.options(**changes)


def test_a_service_account_is_let_in_by_its_key(way: Way, tmp_path: Path) -> None:
    way.stub.write_key(tmp_path / "key.json")
    nobody = {"client_id": None, "client_secret": None, "refresh_token": None}
    ours = way.build(**nobody, key_file=tmp_path / "key.json")
    ours.add(ours.open("champions"), [person(1)], "a")
    assert way.held() == way.identifiers(person(1))


@pytest.mark.parametrize("text", ["", "{}", None])
def test_a_key_file_that_is_none_is_told(way: Way, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "key.json").write_text(text)
    with pytest.raises(PropensityError, match="key_file"):
        way.build(client_id=None, client_secret=None, refresh_token=None, key_file=tmp_path / "key.json")


def test_without_the_extra_the_error_names_it(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, way.library, None)
    monkeypatch.delattr(way.library, raising=False)
    with pytest.raises(PropensityError, match=rf"propensity\[{way.kind}\]"):
        way.build()


def test_the_file_of_destinations_builds_it(way: Way) -> None:
    given = {"kind": way.kind, **way.stub.options, **way.own, "login_customer_id": 9876543210}
    secrets = {name: value.get_secret_value() for name, value in given.items() if isinstance(value, SecretStr)}
    document = {"destinations": {"search": given | {name: f"${{{name}}}" for name in secrets}}}
    built = registry.read(yaml.safe_dump(document), "destinations.yaml", secrets).destination("search").build()
    own: Destination = way.module.build("search", way.options())  # as mypy sees it, too
    assert (built.name, built.forms) == (own.name, own.forms)
    assert built.open("champions").endswith(way.stub.list_named("Propensity champions"))


def test_the_page_describes_every_option_with_its_default_and_its_example_is_one(way: Way) -> None:
    assert documented.options(way.page) == documented.defaults(way.module.Options)
    (example,) = documented.examples(way.page)
    secrets = dict.fromkeys(registry.REFERENCE.findall(example), "x")
    entry = registry.read(example, "destinations.yaml", secrets).destination("search")
    assert entry.kind == way.kind
    way.module.Options.model_validate(dict(entry.options))
