"""The synchronisation against a destination in memory, over both kinds of ledger."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from audiences import leases, sync, tables
from audiences import ledger as ledgers
from audiences.destinations.protocol import KEY, Busy, Limits, Outcome, Person, Purpose, Rejected
from audiences.destinations.registry import Sending
from audiences.ledger import Ledger
from service.core.errors import PropensityError
from tests.audiences.people import People, Somebody, hashed, key_of
from tests.audiences.postgres import both

PATIENT = Sending(patience_s=60, first_wait_s=0.001, longest_wait_s=0.002)
SHORT = Sending(patience_s=0.2, first_wait_s=0.001, longest_wait_s=0.002)
ANNA, BERT, CARL = Somebody("anna"), Somebody("bert"), Somebody("carl")


class Killed(BaseException):
    """Stands for the end of the process: no handler of errors sees it."""


@dataclass
class Memory:
    """Holds lists by each single identifier, as ad platforms do; who has `bad` in a field is refused."""

    name: str = "ours"
    purpose: Purpose = Purpose.ADS
    limits: Limits = Limits(2, 100_000, 60)
    forms: tuple[str, ...] = ("google.email", "external_id")
    fields: tuple[str, ...] = ("segment",)
    lists: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[tuple[str, list[Person], str]] = field(default_factory=list)
    faults: list[BaseException | None] = field(default_factory=list)  # of the next requests, each before it is done
    late: list[BaseException | None] = field(default_factory=list)  # each after it is done

    def open(self, audience: str) -> str:
        self.lists.setdefault(f"list of {audience}", {})
        return f"list of {audience}"

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        self._begin("add", people, batch)
        for one in people:
            if one.fields.get("segment") != "bad":
                for values in one.identifiers.values():
                    self.lists[list_id].update(dict.fromkeys(values, str(one.fields.get("segment"))))
        self._end()
        return [Outcome(one.fields.get("segment") != "bad", "seen") for one in people]

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        self._begin("remove", people, batch)
        for one in people:
            for values in one.identifiers.values():
                for value in values:
                    self.lists[list_id].pop(value, None)
        self._end()
        return [Outcome(True, "seen") for _ in people]

    def _begin(self, operation: str, people: Sequence[Person], batch: str) -> None:
        assert len(people) <= self.limits.members
        self.requests.append((operation, list(people), batch))
        if self.faults and (fault := self.faults.pop(0)):
            raise fault

    def _end(self) -> None:
        if self.late and (fault := self.late.pop(0)):
            raise fault

    @property
    def sent(self) -> list[str]:
        """Operation and key of everybody in every request, since this was last asked."""
        said = [f"{operation} {one.key}" for operation, people, _ in self.requests for one in people]
        self.requests.clear()
        return said


@dataclass
class ByKey(Memory):
    """The same, of a destination that knows people by their key."""

    forms: tuple[str, ...] = (KEY, "google.email")


@pytest.fixture
def people() -> People:
    found = People()
    found.want("vip", ANNA, BERT, CARL)
    return found


@pytest.fixture
def platform() -> Memory:
    return Memory()


def run(
    ledger: Ledger,
    platform: Memory,
    people: People,
    audience: str | None = None,
    sending: Sending = PATIENT,
    **options: object,
) -> sync.Counts:
    counts = sync.run(ledger, platform, people, sending, audience, sync.Options(**options))  # type: ignore[arg-type]
    assert len(counts) == 1
    return counts[0]


def identifiers(*people: Somebody) -> set[str]:
    return {
        value for one in people for values in one.candidate.person.identifiers.values() for value in values
    }  # fmt: skip


def members(ledger: Ledger) -> list[sa.Row[tuple[object, ...]]]:
    with ledger.reading.connect() as connection:
        return list(connection.execute(sa.select(tables.members)))


def everything(ledger: Ledger) -> str:
    """All values of all tables, as text; keys as hex digits."""
    with ledger.reading.connect() as connection:
        rows = [row for table in tables.all_tables.sorted_tables for row in connection.execute(sa.select(table))]
    return " ".join(value.hex() if isinstance(value, bytes) else str(value) for row in rows for value in row)


# --- what is sent ---


@both
def test_everybody_who_is_wanted_is_sent_once(ledger: Ledger, platform: Memory, people: People) -> None:
    counts = run(ledger, platform, people)
    assert (counts.wanted, counts.added, counts.batches, counts.complete) == (3, 3, 2, True)
    assert sorted(platform.sent) == sorted(f"add {key_of(name)}" for name in ("anna", "bert", "carl"))
    assert set(platform.lists["list of vip"]) == identifiers(ANNA, BERT, CARL)
    counts = run(ledger, platform, people)
    assert (counts.unchanged, counts.added, platform.sent) == (3, 0, [])


def test_who_did_not_agree_is_never_sent_and_who_withdraws_is_removed(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    people.want("vip", replace(ANNA, allowed=False))
    assert run(ledger, platform, people).without_consent == 1
    assert key_of("anna") not in " ".join(platform.sent)
    people.want("vip", ANNA, replace(BERT, allowed=False))
    assert run(ledger, platform, people).why == {"add: entered": 1, "remove: consent": 1}
    assert platform.sent == [f"remove {key_of('bert')}", f"add {key_of('anna')}"], "withdrawals wait for nothing"
    assert set(platform.lists["list of vip"]) == identifiers(ANNA, CARL)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (replace(ANNA, email="anna@new.example"), "identifiers"),
        (replace(ANNA, segment="champions"), "fields"),
        (replace(ANNA, rules="2"), "rules"),
    ],
)
@both
def test_a_change_is_sent_with_its_cause(
    ledger: Ledger, platform: Memory, people: People, changed: Somebody, why: str
) -> None:
    run(ledger, platform, people)
    platform.requests.clear()
    people.want("vip", changed)
    assert run(ledger, platform, people).why == {f"add: {why}": 1}
    assert {one.rpartition(" ")[2] for one in platform.sent} == {key_of("anna")}
    assert set(platform.lists["list of vip"]) == identifiers(changed, BERT, CARL), "no identifier of before is left"
    assert run(ledger, platform, people).unchanged == 3


def test_what_a_destination_does_not_keep_is_neither_sent_nor_a_change(ledger: Ledger, people: People) -> None:
    platform = Memory(forms=("google.email",), fields=())
    run(ledger, platform, people)
    [person, _] = platform.requests[0][1]
    assert (list(person.identifiers), person.fields) == (["google.email"], {})
    people.want("vip", replace(ANNA, segment="champions"))
    assert run(ledger, platform, people).added == 0


def test_who_has_no_identifier_that_is_understood_is_not_sent(ledger: Ledger, people: People) -> None:
    platform = Memory(forms=("meta.phone",))
    assert run(ledger, platform, people).wanted == 0
    assert run(ledger, ByKey(name="other"), replace_to(people, "other")).wanted == 3, "but a key everybody has"


def replace_to(people: People, *names: str) -> People:
    return replace(people, to=names)


def test_who_is_known_by_key_is_sent_anew_without_a_removal(ledger: Ledger, people: People) -> None:
    platform = ByKey()
    run(ledger, platform, people)
    platform.requests.clear()
    people.want("vip", replace(ANNA, email="anna@new.example"))
    run(ledger, platform, people)
    assert platform.sent == [f"add {key_of('anna')}"]
    assert hashed("anna@example.com") not in everything(ledger)


def test_an_identifier_that_another_member_has_stays(ledger: Ledger, platform: Memory, people: People) -> None:
    people.want("vip", replace(BERT, email="anna@example.com"))
    run(ledger, platform, people)
    del people.lists["vip"]["anna"]
    assert run(ledger, platform, people).why == {"remove: left": 1}
    assert set(platform.lists["list of vip"]) == identifiers(replace(BERT, email="anna@example.com"), CARL)
    assert len(members(ledger)) == 2


# --- lists that end ---


def test_the_list_of_an_audience_that_was_deleted_is_emptied(ledger: Ledger, platform: Memory, people: People) -> None:
    run(ledger, platform, people)
    people.lists = {"other": {}}
    counts = {one.audience: one for one in sync.run(ledger, platform, people, PATIENT)}
    assert counts["vip"].why == {"remove: deleted": 3}
    assert platform.lists["list of vip"] == {}
    assert members(ledger) == []


def test_a_feature_cache_without_any_audience_empties_no_list_unless_that_is_said(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    people.lists = {}
    with pytest.raises(sync.NothingDefined, match="PROPENSITY_REDIS_URL is right, or say --remove-all"):
        run(ledger, platform, people)
    run(ledger, platform, people, remove_all=True)
    assert platform.lists["list of vip"] == {}


def test_an_audience_that_does_not_go_there_any_more_is_removed(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    people.to = ("elsewhere",)
    run(ledger, platform, people, "vip")
    assert platform.lists["list of vip"] == {}
    platform.name = "new"
    with pytest.raises(PropensityError, match=r"does not go to new; write destinations: \[new\]"):
        run(ledger, platform, people, "vip")
    with pytest.raises(PropensityError, match="no audience 'vop'; there is vip"):
        run(ledger, platform, people, "vop")


def test_below_its_minimum_a_list_is_emptied(ledger: Ledger, platform: Memory, people: People) -> None:
    people.least = 4
    few = run(ledger, platform, people)
    assert (few.added, few.wanted, few.below) == (0, 3, 4)
    people.least = 3
    enough = run(ledger, platform, people)
    assert (enough.added, enough.below) == (3, 0)
    people.want("vip", replace(ANNA, allowed=False))
    assert run(ledger, platform, people).why == {"remove: minimum": 3}
    assert platform.lists["list of vip"] == {}


@both
def test_nothing_of_who_was_erased_is_left_once_the_removal_is_confirmed(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    del people.lists["vip"]["anna"], people.lists["vip"]["bert"]
    people.gone = ["anna"]
    platform.faults = [Busy("not now")] * 1000
    with pytest.raises(Busy):
        run(ledger, platform, people, sending=SHORT)
    assert hashed("anna@example.com") in everything(ledger), "it is needed until it is removed"
    platform.faults = []
    assert run(ledger, platform, people).why == {"remove: erased": 1, "remove: left": 1}
    kept = everything(ledger)
    assert hashed("anna@example.com") not in kept
    assert key_of("anna") not in kept
    assert hashed("bert@example.com") not in kept
    assert key_of("bert") in kept, "that the removal was sent is history for a while"


# --- what goes wrong ---


def test_a_dry_run_counts_the_same_and_sends_and_writes_nothing(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    people.want("vip", replace(ANNA, email="new@new.example"), Somebody("dora"), replace(CARL, allowed=False))
    del people.lists["vip"]["bert"]
    platform.requests.clear()
    before = everything(ledger)
    would = run(ledger, platform, people, dry_run=True)
    assert (platform.sent, everything(ledger)) == ([], before)
    assert run(ledger, platform, people).why == would.why


@both
def test_who_is_refused_is_not_sent_again_until_something_changes(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    people.want("vip", replace(ANNA, segment="bad"))
    counts = run(ledger, platform, people)
    assert (counts.refused, counts.added, counts.complete) == (1, 3, False)
    platform.requests.clear()
    counts = run(ledger, platform, people)
    assert (counts.refused, counts.refused_before, counts.complete, platform.sent) == (0, 1, False, [])
    assert {row.answer for row in members(ledger) if row.refused} == {"seen"}
    people.want("vip", ANNA)
    assert run(ledger, platform, people).complete
    assert platform.sent == [f"add {key_of('anna')}"]


def test_who_is_refused_when_changed_stays_as_before_and_can_be_removed(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    people.want("vip", replace(ANNA, segment="bad"))
    assert run(ledger, platform, people).refused == 1
    people.want("vip", replace(ANNA, allowed=False))
    run(ledger, platform, people)
    assert set(platform.lists["list of vip"]) == identifiers(BERT, CARL)


@both
def test_a_busy_platform_is_asked_again_under_the_same_name(ledger: Ledger, platform: Memory, people: People) -> None:
    platform.faults = [Busy("429", after_s=0.01), Busy("500"), None]
    platform.late = [Busy("no answer in time")]
    assert run(ledger, platform, people).complete
    names = [batch for _, _, batch in platform.requests]
    assert len(names) == 5
    assert len(set(names[:4])) == 1, "a batch keeps its name"
    assert len(set(names)) == 2


@both
def test_what_a_platform_that_stays_busy_may_have_taken_is_sent_again_by_the_next_run(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    platform.faults, platform.late = [None, *[Busy("503")] * 1000], [None, Busy("lost")]
    with pytest.raises(Busy, match="503"):
        run(ledger, platform, people, sending=SHORT)
    first = {one.key for one in platform.requests[0][1]}
    platform.faults, platform.late = [], []
    platform.requests.clear()
    assert run(ledger, platform, people).why == {"add: unknown": 1}
    assert not first & {one.rpartition(" ")[2] for one in platform.sent}, "what was settled is not sent again"


@both
def test_a_rejected_batch_leaves_everybody_as_they_were(ledger: Ledger, platform: Memory, people: People) -> None:
    platform.faults = [Rejected("the token has expired")]
    with pytest.raises(Rejected, match="the token has expired"):
        run(ledger, platform, people)
    assert members(ledger) == []
    assert run(ledger, platform, people).why == {"add: entered": 3}
    people.want("vip", replace(ANNA, segment="champions"))
    before = sorted(members(ledger), key=lambda row: bytes(row.key))
    platform.faults = [Rejected("the token has expired")]
    with pytest.raises(Rejected):
        run(ledger, platform, people)
    after = sorted(members(ledger), key=lambda row: bytes(row.key))
    assert [row[:6] for row in after] == [row[:6] for row in before]


def test_a_rejection_after_an_unanswered_attempt_leaves_the_outcome_open(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    platform.faults, platform.late = [None, Rejected("no")], [Busy("lost")]
    with pytest.raises(Rejected):
        run(ledger, platform, people)
    people.want("vip", *(replace(one, allowed=False) for one in (ANNA, BERT, CARL)))
    run(ledger, platform, people)
    assert platform.lists["list of vip"] == {}, "what may have been taken is taken back"


# --- killed at every step ---


def test_killed_before_and_after_every_request_and_every_commit_the_next_run_ends_the_same(tmp_path: Path) -> None:
    dice = random.Random(1)
    kills = Counter[str]()
    with ledgers.opened(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        platform, people = Memory(), People()
        for step in range(50):
            change(people, dice)
            kills += kill_somewhere(ledger, platform, people, dice)
            if dice.random() < 0.7:
                change(people, dice)
            run(ledger, platform, people)
            allowed = [one for one in people.lists["vip"].values() if one.allowed]
            should = {
                value: one.segment
                for one in allowed
                for values in one.candidate.person.identifiers.values()
                for value in values
            }
            assert platform.lists["list of vip"] == should, step
    assert kills["before a request"] > 6
    assert kills["after a request"] > 6
    assert kills["at a commit"] > 6


@both
def test_who_is_as_before_again_after_a_kill_is_sent_since_the_platform_may_have_the_change(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    run(ledger, platform, people)
    people.want("vip", replace(ANNA, segment="champions"))
    platform.late = [Killed()]
    with pytest.raises(Killed):
        run(ledger, platform, people)
    platform.late = []
    people.want("vip", ANNA)
    assert run(ledger, platform, people).why == {"add: unknown": 1}
    assert set(platform.lists["list of vip"].values()) == {ANNA.segment}


@both
def test_who_withdraws_after_a_kill_is_not_sent_again_and_taken_back(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    platform.late = [Killed()]
    with pytest.raises(Killed):
        run(ledger, platform, people)
    platform.late = []
    open_ = {bytes(row.key).hex() for row in members(ledger)}
    assert len(open_) == 2
    people.want("vip", *(replace(one, allowed=False) for one in (ANNA, BERT, CARL) if key_of(one.name) in open_))
    platform.requests.clear()
    run(ledger, platform, people)
    assert sorted(platform.sent)[1:] == sorted(f"remove {key}" for key in open_)
    assert len(platform.lists["list of vip"]) == 2


def change(people: People, dice: random.Random) -> None:
    """Let everybody be somebody else, and some be no member."""
    for name in range(8):
        one = Somebody(f"v{name}", f"v{dice.randrange(3)}@{name}.example", dice.random() < 0.7)
        people.want("vip", replace(one, segment=dice.choice(("champions", "nurture"))))
        if dice.random() < 0.2:
            del people.lists["vip"][f"v{name}"]


def kill_somewhere(ledger: Ledger, platform: Memory, people: People, dice: random.Random) -> Counter[str]:
    """End a run as a kill does; which kind of end it was, if the run was not over before."""
    place, number = dice.choice(("before a request", "after a request", "at a commit")), dice.randrange(6)
    if place == "at a commit":
        count = [0]

        def die(connection: sa.Connection) -> None:
            count[0] += 1
            if count[0] == number + 3:
                raise Killed

        sa.event.listen(ledger.engine, "commit", die)
        try:
            run(ledger, platform, people)
        except Killed:
            return Counter([place])
        finally:
            sa.event.remove(ledger.engine, "commit", die)
        return Counter()
    faults = platform.faults if place == "before a request" else platform.late
    faults[:] = [*[None] * number, Killed()]
    try:
        run(ledger, platform, people)
    except Killed:
        return Counter([place])
    finally:
        faults.clear()
    return Counter()


# --- two at once ---


@both
def test_a_second_run_is_refused_and_waits_if_it_is_told_to(ledger: Ledger, platform: Memory, people: People) -> None:
    assert ledger.leases.take("ours", "elsewhere/1/77/x", now(), 60_000) is None
    with pytest.raises(leases.Held, match="process 77 of elsewhere is synchronising ours; wait for it with --wait"):
        run(ledger, platform, people)
    assert platform.sent == []
    ledger.leases.give_back("ours", "elsewhere/1/77/x")
    assert run(ledger, platform, people).complete


@both
def test_a_lease_that_ended_is_taken_over_and_its_holder_writes_no_more(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    assert ledger.leases.take("ours", "elsewhere/1/77/x", now(), 50) is None
    assert run(ledger, platform, people, wait_s=5).complete
    with pytest.raises(leases.LeaseLost):
        ledger.leases.keep(leases.Lease("ours", "elsewhere/1/77/x", 50), now())


def test_a_process_that_was_killed_holds_nothing(ledger: Ledger, platform: Memory, people: People) -> None:
    me = leases.holder()
    host, namespace, _, _ = me.split("/")
    assert ledger.leases.take("ours", f"{host}/{namespace}/4194999/1", now(), 10**9) is None
    assert run(ledger, platform, people).complete
    assert not leases.is_gone(me)


def now() -> int:
    return sync.Clock().now_ms()


# --- what is kept ---


@both
def test_what_was_sent_becomes_counts_a_day_after_its_time(ledger: Ledger, platform: Memory, people: People) -> None:
    run(ledger, platform, people)
    people.want("vip", replace(ANNA, segment="bad"))
    run(ledger, platform, people)
    run(ledger, platform, people, retention_ms=-1000)
    with ledger.reading.connect() as connection:
        counts = [tuple(row) for row in connection.execute(sa.select(tables.history))]
        left = [
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (tables.batches, tables.entries)
        ]
    assert sorted(row[2:] for row in counts) == [("add", "entered", 3, 3), ("add", "fields", 1, 0)]
    assert left == [0, 0]
    assert run(ledger, platform, people).refused_before == 1, "members outlive it"


@both
def test_the_ledger_says_what_was_sent_when_why_and_what_was_answered(
    ledger: Ledger, platform: Memory, people: People
) -> None:
    people.want("vip", replace(ANNA, segment="bad"))
    run(ledger, platform, people)
    with ledger.reading.connect() as connection:
        batches = connection.execute(sa.select(tables.batches).order_by(tables.batches.c.id)).all()
        entries = connection.execute(sa.select(tables.entries)).all()
        [last] = connection.execute(sa.select(tables.runs)).all()
    assert [(row.operation, row.state, row.members, row.attempts) for row in batches] == [
        ("add", "settled", 2, 1),
        ("add", "settled", 1, 1),
    ]
    assert sum(row.accepted for row in batches) == 2
    assert all(abs(now() - row.settled_ms) < 60_000 for row in batches)
    assert {(row.key.hex(), row.why, row.accepted) for row in entries} == {
        (key_of("anna"), "entered", False),
        (key_of("bert"), "entered", True),
        (key_of("carl"), "entered", True),
    }
    assert last.ended_ms >= last.started_ms
    assert last.result == "3 of vip sent"


@both
def test_the_rate_counts_what_a_run_before_has_sent(ledger: Ledger, people: People) -> None:
    platform = Memory(limits=Limits(1, 3, 600))
    ledger.leases.take("ours", "me", now(), 60_000)
    lists, options = ledger.opened(ledger.list_of("ours", "vip"), "list of vip"), sync.Options()
    platform.open("vip")
    with sync._Sender(ledger, platform, PATIENT, options, "me", 1, sync.Clock()) as sender:
        for one in (ANNA, BERT, CARL):
            person = one.candidate.person
            known = ledgers.Known(bytes.fromhex(person.key), None, None, None, {})
            intent = ledgers.Intent(known, "entered", b"", person.identifiers, person.identifiers)
            sender.send(lists, "add", [person], [intent])
        assert sender.limiter.try_acquire("ours", blocking=False) is False
    with sync._Sender(ledger, platform, PATIENT, options, "me", 2, sync.Clock()) as sender:
        assert sender.limiter.try_acquire("ours", blocking=False) is False
    platform.limits = Limits(1, 4, 600)
    with sync._Sender(ledger, platform, PATIENT, options, "me", 3, sync.Clock()) as sender:
        assert sender.limiter.try_acquire("ours", blocking=False) is True
