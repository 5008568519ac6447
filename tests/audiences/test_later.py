"""What Google does after the run that sent something: jobs and requests that fail, and members who expire."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sqlalchemy as sa

from audiences import plan, sync, tables
from audiences.destinations import data_manager, google
from audiences.destinations.protocol import Busy, Limits, Outcome, Person
from audiences.destinations.registry import Sending
from audiences.ledger import DAY_MS, Known, Ledger
from audiences.stage import Staged
from tests.audiences.people import People, Somebody, hashed, key_of
from tests.audiences.postgres import both
from tests.audiences.stubs.data_manager import DataManagerStub, id_of
from tests.audiences.stubs.google import GoogleStub

pytestmark = pytest.mark.usefixtures("trusted")

SENDING = Sending(patience_s=0.3, first_wait_s=0.05, longest_wait_s=0.05)
FAILED = "INSUFFICIENT_TRANSACTIONS"  # a reason that both of Google's enumerations have
ANNA, BERT, CARL, DORA = (Somebody(name) for name in ("anna", "bert", "carl", "dora"))


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Account:
    """Google by one of its APIs, what is wanted there, a ledger, and a clock that all of them go by."""

    stub: GoogleStub | DataManagerStub
    ledger: Ledger
    people: People = field(default_factory=People)
    now_ms: int = 1_790_000_000_000
    batch: int = 2
    days: int = 540
    around: Callable[[Any], Any] = lambda destination: destination

    def pass_days(self, days: float) -> None:
        self.now_ms += round(days * DAY_MS)
        self.stub.pass_days(days)

    def build(self) -> google.GoogleAds | data_manager.DataManager:
        given = self.stub.options | {"membership_days": self.days}
        if isinstance(self.stub, GoogleStub):
            return google.build("ours", google.Options.model_validate(given))
        given["customer_match_terms"] = "accepted"
        return data_manager.build("ours", data_manager.Options.model_validate(given))

    def run(self, **options: Any) -> sync.Counts:
        ours = self.build()
        ours.limits = Limits(self.batch, 100_000, 1.0)
        clock = sync.Clock(lambda: self.now_ms)
        (counts,) = sync.run(
            self.ledger, self.around(ours), self.people, SENDING, None, sync.Options(**options), clock=clock
        )
        return counts

    def under_way(self, number: int) -> str:
        """The answer to additions that are under way."""
        is_job = isinstance(self.stub, GoogleStub)
        return f"job {number}: RUNNING" if is_job else f"addition {id_of(number)}: PROCESSING"

    def failed(self, number: int, members: int) -> str:
        """The end of additions that failed."""
        is_job = isinstance(self.stub, GoogleStub)
        return f"job {number}: FAILED {FAILED}" if is_job else f"addition {id_of(number)}: FAILED, {members} {FAILED}"

    def held(self) -> set[str]:
        return {value for _, value in self.stub.held("Propensity vip")}

    def rows(self) -> list[sa.Row[Any]]:
        with self.ledger.reading.connect() as connection:
            return list(connection.execute(sa.select(tables.members)))

    def named(self) -> set[str]:
        """Of whom there is anything in what was sent."""
        with self.ledger.reading.connect() as connection:
            return {bytes(key).hex() for key in connection.execute(sa.select(tables.entries.c.key)).scalars()}

    def states(self) -> list[tuple[str, str, str, int]]:
        table = tables.batches.c
        with self.ledger.reading.connect() as connection:
            found = connection.execute(
                sa.select(table.operation, table.state, table.answer, table.accepted).order_by(table.id)
            )
            return [tuple(row) for row in found]


@pytest.fixture(params=[GoogleStub, DataManagerStub])
def account(ledger: Ledger, request: pytest.FixtureRequest) -> Iterator[Account]:
    with request.param().serving() as stub:
        stub.requests_a_minute = None  # the test is faster than its clock
        yield Account(stub, ledger)
        assert stub.broken == []


def emails(*people: Somebody) -> set[str]:
    return {hashed(one.email or f"{one.name}@example.com") for one in people}


# --- jobs that fail later ---


@both
def test_members_of_a_job_that_failed_after_the_run_are_sent_again_by_the_next_one(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.stub.hold = True
    counts = account.run()
    assert (counts.added, counts.working, counts.failed, counts.complete) == (2, 2, 0, True)
    account.stub.finish(fail=FAILED)
    assert account.run(dry_run=True).working == 2, "that does not ask"
    counts = account.run()
    assert (counts.failed, dict(counts.why), counts.working) == (2, {"add: again": 2}, 2)
    assert counts.notes == [f"{account.failed(5000, 2)}: 2 were not added after all; 2 are sent again"]
    assert account.states() == [
        ("add", "settled", account.failed(5000, 2), 0),
        ("add", "working", account.under_way(5001), 2),
    ]
    account.stub.finish()
    counts = account.run()
    assert (counts.unchanged, counts.added, counts.working, counts.notes) == (2, 0, 0, [])
    assert account.held() == emails(ANNA, BERT)
    assert {(row.tries, row.due_ms) for row in account.rows()} == {(0, None)}


@both
def test_only_members_of_the_job_that_failed_are_sent_again(account: Account) -> None:
    account.people.want("vip", ANNA, BERT, CARL, DORA)
    account.stub.hold = True
    account.run()
    assert account.stub.running() == [5000, 5001]
    account.stub.finish(fail=FAILED, jobs=[5001])
    counts = account.run()
    assert (counts.failed, counts.unchanged, dict(counts.why)) == (2, 2, {"add: again": 2})
    assert counts.working == 4, "two in a job that has not ended, and two in a new one"
    account.stub.finish()
    assert account.run().unchanged == 4
    assert account.held() == emails(ANNA, BERT, CARL, DORA)


@both
def test_who_withdraws_from_a_job_that_did_a_part_and_failed_is_removed(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.stub.hold = True
    account.run()
    account.stub.finish(fail=FAILED, share=0.5)
    (there,) = account.held()
    withdrawing = next(one for one in (ANNA, BERT) if there in emails(one))
    account.people.want("vip", replace(withdrawing, allowed=False))
    account.stub.hold = False
    assert account.run().why == {"remove: consent": 1, "add: again": 1}
    assert account.held() == emails(BERT if withdrawing is ANNA else ANNA)


@both
def test_a_removal_whose_job_failed_is_made_again_until_it_is_done(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.run()
    account.people.want("vip", replace(ANNA, allowed=False))
    account.stub.hold = True
    assert account.run().why == {"remove: consent": 1}
    assert account.run().why == {}, "it is under way"
    for _ in range(6):
        account.stub.finish(fail=FAILED)
        assert account.held() == emails(ANNA, BERT)
        counts = account.run()
        assert dict(counts.why) == {"remove: consent": 1}
        assert counts.notes[0].endswith("1 were not removed after all; 1 are sent again")
    account.stub.finish()
    account.run()
    assert account.held() == emails(BERT)
    assert [bytes(row.key).hex() for row in account.rows()] == [key_of("bert")]


@both
def test_an_address_of_before_is_removed_although_the_first_job_that_should_failed(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.run()
    moved = replace(ANNA, email="anna@new.example")
    account.people.want("vip", moved)
    account.stub.hold = True
    assert account.run().why == {"add: identifiers": 1}
    removing, adding = account.stub.running()
    account.stub.finish(fail=FAILED, jobs=[removing])
    account.stub.finish(jobs=[adding])
    assert account.held() == emails(ANNA, moved, BERT)
    account.stub.hold = False
    account.run()
    assert account.held() == emails(moved, BERT)
    assert account.run().why == {}


@both
def test_of_who_was_erased_nothing_goes_before_google_has_worked_off_the_removal(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.run()
    del account.people.lists["vip"]["anna"]
    account.people.gone = ["anna"]
    account.stub.hold = True
    assert account.run().why == {"remove: erased": 1}
    account.stub.finish(fail=FAILED)
    account.stub.hold = False
    assert account.held() == emails(ANNA, BERT)
    assert account.run().why == {"remove: erased": 1}
    assert account.held() == emails(BERT)
    assert account.named() == {key_of("anna"), key_of("bert")}, "the end was not told yet"
    account.run()
    assert account.named() == {key_of("bert")}


def test_who_fails_again_waits_for_longer_each_time_and_in_the_end_for_a_change(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.stub.hold = True
    account.run()
    for wait_days in (0, 1, 7, 30):
        account.stub.finish(fail=FAILED)
        account.pass_days(0.01)
        counts = account.run()
        if wait_days:
            assert counts.notes[0].endswith("2 were not added after all; 2 failed again and wait for some days")
            assert (counts.failed, counts.refused_before, counts.added, counts.complete) == (2, 2, 0, False)
            account.pass_days(wait_days - 0.02)
            assert account.run().added == 0
            account.pass_days(0.02)
            counts = account.run()
        assert dict(counts.why) == {"add: again": 2}
    account.stub.finish(fail=FAILED)
    counts = account.run()
    assert counts.notes[0].endswith("2 failed too often and wait until something about them changes")
    assert {row.answer for row in account.rows()} == {account.failed(5004, 2)}
    account.pass_days(400)
    assert account.run().refused_before == 2
    account.stub.hold = False
    account.people.want("vip", replace(ANNA, email="anna@new.example"))
    assert account.run().why == {"add: identifiers": 1}


def test_a_job_of_which_google_tells_no_end_for_a_week_counts_as_failed(account: Account) -> None:
    account.people.want("vip", ANNA)
    account.stub.hold = True
    account.run()
    account.pass_days(6.9)
    assert account.run().working == 1
    account.pass_days(0.2)
    counts = account.run()
    assert dict(counts.why) == {"add: again": 1}
    assert counts.notes[0].startswith(f"{account.under_way(5000)}, and no end of it for a week")


by_data_manager = pytest.mark.parametrize("account", [DataManagerStub], indirect=True)


class Losing:
    """A destination in a process that is killed after its next request."""

    def __init__(self, ours: Any) -> None:
        vars(self).update(vars(ours))
        self.ours = ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ours, name)

    def add(self, *given: Any) -> Sequence[Outcome]:
        self.ours.add(*given)
        raise Killed

    def remove(self, *given: Any) -> Sequence[Outcome]:
        self.ours.remove(*given)
        raise Killed


@by_data_manager
@both
def test_a_withdrawal_outlives_an_addition_that_no_answer_came_of(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.stub.hold = True
    account.around = Losing
    with pytest.raises(Killed):
        account.run()
    account.around = lambda ours: ours
    account.people.want("vip", replace(ANNA, allowed=False))
    counts = account.run()
    assert (account.stub.running(), counts.removed, counts.working) == ([5000, 5001, 5002], 1, 2)
    account.stub.finish(jobs=[5001, 5002])
    account.stub.finish(jobs=[5000])  # which nobody asks of
    assert account.held() == emails(ANNA, BERT)
    account.pass_days(0.5)
    counts = account.run()
    assert (counts.removed, counts.working, counts.notes) == (0, 1, []), "it may not have come yet"
    account.pass_days(0.6)
    counts = account.run()
    assert counts.notes == [
        f"removal {id_of(5001)}: SUCCESS, and one that was under way may have undone it: "
        "1 were not removed after all; 1 are sent again"
    ]
    account.stub.finish()
    assert account.held() == emails(BERT)
    counts = account.run()
    assert (counts.why, counts.working, counts.notes) == ({}, 0, [])
    assert account.named() == {key_of("anna"), key_of("bert")}


@by_data_manager
@both
def test_a_withdrawal_is_sent_at_once_and_again_when_additions_under_way_have_ended(account: Account) -> None:
    account.people.want("vip", ANNA, BERT, CARL)
    account.stub.hold = True
    account.run()
    account.people.want("vip", replace(ANNA, allowed=False))
    account.pass_days(0.01)
    assert account.run().why == {"remove: consent": 1}
    account.stub.finish(jobs=[5002])
    account.pass_days(0.01)
    counts = account.run()
    assert (counts.why, counts.working) == ({}, 4), "the additions are under way, and the removal counts as if it was"
    account.stub.finish(jobs=[5000, 5001])
    assert account.held() == emails(ANNA, BERT, CARL)
    account.pass_days(0.01)
    assert account.run().why == {"remove: consent": 1}
    account.stub.finish()
    assert account.held() == emails(BERT, CARL)
    account.pass_days(0.01)
    counts = account.run()
    assert (counts.why, counts.working, counts.unchanged) == ({}, 0, 2)


@by_data_manager
def test_what_is_about_other_people_is_not_sent_again(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.run()
    account.pass_days(0.01)
    account.run()
    account.stub.hold = True
    account.people.want("vip", CARL, DORA)
    account.pass_days(0.01)
    account.run()
    account.people.want("vip", replace(ANNA, allowed=False))
    account.pass_days(0.01)
    assert account.run().why == {"remove: consent": 1}
    removal = max(account.stub.running())
    account.stub.finish(jobs=[removal])
    account.pass_days(0.01)
    counts = account.run()
    assert (counts.why, counts.working, counts.notes) == ({}, 2, [])
    account.stub.finish()
    account.pass_days(0.01)
    assert account.run().why == {}
    assert account.held() == emails(BERT, CARL, DORA)


@by_data_manager
def test_an_addition_outlives_a_removal_that_no_answer_came_of(account: Account) -> None:
    account.people.want("vip", ANNA, BERT)
    account.run()
    account.run()
    account.people.want("vip", replace(ANNA, allowed=False))
    account.stub.hold = True
    account.around = Losing
    with pytest.raises(Killed):
        account.run()
    account.around = lambda ours: ours
    account.people.want("vip", ANNA)
    assert account.run().why == {"add: unknown": 1}
    account.stub.finish(jobs=[5002])
    account.stub.finish(jobs=[5001])
    assert account.held() == emails(BERT)
    account.stub.hold = False
    account.pass_days(1.1)
    assert account.run().why == {"add: again": 1}
    assert account.held() == emails(ANNA, BERT)
    account.run()
    assert {row.tries for row in account.rows()} == {0}


@by_data_manager
def test_of_additions_that_were_done_in_part_a_note_says_so_and_nobody_is_sent_again(account: Account) -> None:
    assert isinstance(account.stub, DataManagerStub)
    account.people.want("vip", ANNA, BERT)
    account.stub.miss = dict.fromkeys(emails(ANNA), "UNKNOWN_CONSENT")
    account.run()
    counts = account.run()
    said = f"addition {id_of(5000)}: PARTIAL_SUCCESS, 1 UNKNOWN_CONSENT"
    assert counts.notes == [f"{said}: of 2 some were not taken, and whom is not told"]
    assert (counts.why, counts.unchanged, counts.failed) == ({}, 2, 0)
    assert account.states() == [("add", "settled", said, 2)]
    account.people.want("vip", replace(ANNA, allowed=False))
    assert account.run().why == {"remove: consent": 1}, "who may be there"


def test_an_account_goes_on_from_one_api_to_the_other_and_nobody_is_sent_again(ledger: Ledger) -> None:
    with GoogleStub().serving() as before, DataManagerStub().serving() as after:
        account = Account(before, ledger)
        account.people.want("vip", ANNA, BERT)
        account.run()
        account.run()
        number = after.put("Propensity vip")
        after.change(number, False, [[("email_address", value)] for _, value in before.held("Propensity vip")])
        assert number == before.list_named("Propensity vip").rpartition("/")[2]
        account.stub = after
        account.people.want("vip", replace(ANNA, allowed=False))
        counts = account.run()
        assert (dict(counts.why), counts.unchanged) == ({"remove: consent": 1}, 1)
        assert account.held() == emails(BERT)
        assert after.broken == []


def test_lists_are_as_wanted_although_jobs_fail_later_and_runs_are_killed(account: Account) -> None:
    dice = random.Random(20_261_129)
    chaos = Chaos(account, dice)
    for _ in range(12):
        for _ in range(5):
            chaos.go_on()
        chaos.settle()
        wanted = emails(*(one for one in account.people.lists["vip"].values() if one.allowed))
        assert account.held() == wanted
        assert not [row for row in account.rows() if row.refused and row.due_ms is None], "nobody is given up"
        assert account.run().why == {}
    assert (chaos.kills > 10, chaos.failed > 10) == (True, True), (chaos.kills, chaos.failed)


@dataclass
class Chaos:
    """Changes of what is wanted, runs that are killed, and jobs that end late, in any order, and not always well."""

    account: Account
    dice: random.Random
    kills: int = 0
    failed: int = 0
    started: dict[int, int] = field(default_factory=dict)  # when jobs were seen first

    def go_on(self) -> None:
        account, dice = self.account, self.dice
        account.stub.hold = True
        account.around = lambda ours: Fragile(ours, account, dice)
        change(account.people, dice)
        self._pass_days(dice.choice((0.1, 2)))
        try:
            account.run()
        except Killed:
            self.kills += 1
        except Busy:  # jobs of the opposite direction are under way
            pass
        self._finish(0.5)

    def settle(self) -> None:
        account = self.account
        account.around = lambda ours: ours
        self._pass_days(0.1)
        self._finish(1)
        account.stub.hold = False
        for days in (0.1, 1, 7, 30):
            account.pass_days(days)
            account.run()

    def _pass_days(self, days: float) -> None:
        """A job takes a day at most."""
        account = self.account
        account.pass_days(days)
        account.stub.finish(jobs=[number for number, at_ms in self.started.items() if account.now_ms >= at_ms + DAY_MS])

    def _finish(self, share: float) -> None:
        running = self.account.stub.running()
        self.started.update(dict.fromkeys(set(running) - set(self.started), self.account.now_ms))
        for number in self.dice.sample(running, len(running)):
            if self.dice.random() < share:
                fails = self.dice.random() < 0.4
                self.failed += fails
                self.account.stub.finish(FAILED if fails else None, [number], self.dice.random())


def change(people: People, dice: random.Random) -> None:
    for name in range(8):
        if dice.random() < 0.3:
            people.want("vip", Somebody(f"v{name}", f"v{dice.randrange(3)}@{name}.example", dice.random() < 0.7))
        if dice.random() < 0.1:
            people.lists.get("vip", {}).pop(f"v{name}", None)


class Fragile:
    """A destination in a process that may be killed before and after each request; nobody comes who did not agree."""

    def __init__(self, ads: Any, account: Account, dice: random.Random) -> None:
        self.ads, self.account, self.dice = ads, account, dice
        self.name, self.purpose, self.limits, self.keeps_ms = ads.name, ads.purpose, ads.limits, ads.keeps_ms
        self.forms, self.fields, self.late_ms = ads.forms, ads.fields, getattr(ads, "late_ms", None)

    def _at_risk(self, call: Callable[..., Any], *given: Any) -> Any:
        if self.dice.random() < 0.1:
            raise Killed
        answer = call(*given)
        if self.dice.random() < 0.1:
            raise Killed
        return answer

    def open(self, audience: str) -> str:
        return str(self._at_risk(self.ads.open, audience))

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        allowed = {key_of(one.name) for one in self.account.people.lists["vip"].values() if one.allowed}
        assert {one.key for one in people} <= allowed
        found: Sequence[Outcome] = self._at_risk(self.ads.add, list_id, people, batch)
        return found

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        found: Sequence[Outcome] = self._at_risk(self.ads.remove, list_id, people, batch)
        return found

    def review(self, answers: Sequence[str]) -> Sequence[Outcome | None]:
        found: Sequence[Outcome | None] = self._at_risk(self.ads.review, answers)
        return found


# --- members who expire ---


def test_members_are_sent_again_before_google_drops_them_and_not_all_on_one_day(account: Account) -> None:
    account.batch = 3
    account.people.want("vip", *(Somebody(f"v{number}") for number in range(60)))
    everybody = emails(*account.people.lists["vip"].values())
    account.run()
    sent: list[int] = []
    for _ in range(3 * 540 // 9):
        account.pass_days(9)
        counts = account.run()
        assert set(counts.why) <= {"add: renew"}
        sent.append(counts.added)
        assert account.held() == everybody
    assert sum(sent[:41]) == 0, "nobody in the first 369 days"
    assert sum(sent[:54]) == 60, "everybody once in 486 days"
    assert max(sent) < 12, "spread"
    assert 2 * 60 <= sum(sent) <= 4 * 60


def test_who_is_late_is_renewed_at_once(account: Account) -> None:
    account.people.want("vip", *(Somebody(f"v{number}") for number in range(30)))
    account.run()
    account.run()  # Google's Data Manager tells for 50 days what became of a request
    account.pass_days(500)
    assert account.run().why == {"add: renew": 30}
    account.run()
    account.pass_days(60)
    assert account.run().why == {}
    assert len(account.held()) == 30


def test_a_change_counts_as_sent(account: Account) -> None:
    account.people.want("vip", ANNA)
    account.run()
    account.pass_days(370)
    account.people.want("vip", replace(ANNA, rules="2"))
    assert account.run().why == {"add: rules": 1}
    account.pass_days(370)
    assert account.run().why == {}


def test_where_members_stay_for_ever_nobody_is_renewed() -> None:
    key = hashlib.sha256(b"anna").digest()
    known = Known(key, b"mark", None, None, {"external_id": ("anna",)}, changed_ms=0)
    member = Staged(key, b"mark", Person(key.hex(), {"external_id": ("anna",)}))
    ages = [plan.Age(10**15, keeps_ms, 1) for keeps_ms in (None, 540 * DAY_MS)]
    steps = [next(plan.steps([known], [member], plan.LEFT, age)) for age in ages]
    assert isinstance(steps[0], plan.Unsent)
    assert isinstance(steps[1], plan.Addition)
    assert steps[1].why == plan.RENEW


def test_no_more_are_renewed_at_a_time_than_is_said_unless_they_are_late() -> None:
    people = [Person(hashed(str(number)), {"external_id": (str(number),)}) for number in range(200)]
    members = [Staged(bytes.fromhex(one.key), b"mark", one) for one in sorted(people, key=lambda one: one.key)]
    known = [Known(one.key, b"mark", None, None, one.person.identifiers, changed_ms=0) for one in members if one.person]
    for share, count in ((0.69, 0), (0.899, 10), (0.9, 200)):
        age = plan.Age(round(share * DAY_MS), DAY_MS, 10)
        assert sum(isinstance(one, plan.Addition) for one in plan.steps(known, members, plan.LEFT, age)) == count


# --- ledgers of before ---


@both
def test_a_ledger_of_the_version_before_is_brought_up_to_date(
    ledger: Ledger, ledger_url: str, account: Account
) -> None:
    account.people.want("vip", ANNA)
    account.run()
    with ledger.engine.begin() as connection:
        for column in tables._SINCE_VERSION_1:
            connection.execute(sa.text(f"ALTER TABLE {column.table.name} DROP COLUMN {column.name}"))
        connection.execute(tables._schema.update().values(version=1))
    tables.prepare(ledger.engine)
    account.people.want("vip", BERT)
    counts = account.run()
    assert (counts.unchanged, dict(counts.why)) == (1, {"add: entered": 1})
    assert {(row.tries, row.due_ms) for row in account.rows()} == {(0, None)}
