"""What the ledger tells of destinations and runs, over both kinds of ledger, and that it names nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from audiences import leases, status, sync
from audiences.destinations import registry
from audiences.destinations.protocol import Busy, Limits, Outcome, Person, Purpose
from audiences.destinations.registry import Sending
from audiences.ledger import Ledger
from audiences.status import Pile, Reason
from tests.audiences.people import People, Somebody
from tests.audiences.postgres import both

SHORT = Sending(patience_s=0.05, first_wait_s=0.001, longest_wait_s=0.002)
NOW_MS = 1_790_000_000_000
ELSEWHERE = "elsewhere/1/77/x"


class Killed(BaseException):
    """Stands for the end of the process: no handler of errors sees it."""


@dataclass
class Platform:
    """Refuses people in words that name them, works others off later, or fails."""

    name: str = "ours"
    purpose: Purpose = Purpose.ADS
    limits: Limits = Limits(100, 100_000, 60)
    forms: tuple[str, ...] = ("external_id",)
    fields: tuple[str, ...] = ()
    refuses: dict[str, str] = field(default_factory=dict)  # by external_id
    later: bool = False
    fault: BaseException | None = None

    def open(self, audience: str) -> str:
        return audience

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        return self._answer(people)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        return self._answer(people)

    def _answer(self, people: Sequence[Person]) -> list[Outcome]:
        if self.fault is not None:
            raise self.fault
        said = [self.refuses.get(one.identifiers["external_id"][0]) for one in people]
        return [
            Outcome(True, "job 5001: RUNNING", not self.later) if one is None else Outcome(False, one) for one in said
        ]


def run(ledger: Ledger, platform: Platform, people: People, at_ms: int = NOW_MS, audience: str | None = None) -> None:
    sync.run(ledger, platform, people, SHORT, audience, clock=sync.Clock(lambda: at_ms))


def crowd(*names: str) -> list[Somebody]:
    return [Somebody(name) for name in names]


@both
def test_what_a_destination_has_and_refuses_is_counted_with_its_words_and_without_names(ledger: Ledger) -> None:
    people = People()
    people.want("vip", *crowd("anna", "bert", "u-1001", "u-1002", "u-1003"))
    people.want("all", *crowd("anna"))
    unknown = {name: f"error 400: no such user: {name}, e-mail {name}@example.com" for name in ("u-1001", "u-1002")}
    run(ledger, Platform(refuses={**unknown, "u-1003": "session 4611686018427387904: invalid entry"}), people)
    all_, vip = status.states(ledger)
    assert (all_.audience, all_.has, all_.refused, all_.reasons) == ("all", 1, 0, [])
    assert (vip.destination, vip.audience, vip.has, vip.synced_ms, vip.refused) == ("ours", "vip", 2, NOW_MS, 3)
    assert vip.reasons == [
        Reason("error 400: no such user: …, e-mail …", 2),
        Reason("session …: invalid entry", 1),
    ]
    assert (vip.unknown, vip.working) == (Pile(), Pile())
    assert status.states(ledger, "vip") == status.states(ledger, "vip", "ours") == [vip]
    assert status.states(ledger, "vip", "theirs") == []


@both
def test_only_the_commonest_reasons_are_told_and_a_refused_removal_is_one(ledger: Ledger) -> None:
    words = ["wrong", "wrong", "wrong", "old", "old", "new", "new", "odd", "rare"]
    refuses = {f"person{place}": word for place, word in enumerate(words)}
    people = People()
    people.want("vip", *crowd(*refuses, "anna"))
    run(ledger, Platform(refuses=refuses), people)
    (state,) = status.states(ledger)
    assert state.refused == len(words)
    assert [tuple(one) for one in state.reasons] == [("wrong", 3), ("new", 2), ("old", 2)]
    people.lists["vip"] = {"anna": Somebody("anna", allowed=False)}
    run(ledger, Platform(refuses={"anna": "not today"}), people)
    (state,) = status.states(ledger)
    assert (state.has, state.refused, state.reasons) == (1, 1, [Reason("not today", 1)])


@both
def test_batches_that_are_worked_off_or_have_no_answer_are_told(ledger: Ledger) -> None:
    people = People()
    people.want("vip", *crowd("anna", "bert"))
    run(ledger, Platform(later=True, refuses={"bert": "no"}), people)
    (state,) = status.states(ledger)
    assert (state.has, state.working, state.unknown) == (1, Pile(1, 1), Pile())
    people.want("vip", *crowd("carl", "dora"))
    with pytest.raises(Killed):
        run(ledger, Platform(fault=Killed()), people)
    (state,) = status.states(ledger)
    assert (state.has, state.working, state.unknown) == (3, Pile(1, 1), Pile(1, 2))


@both
def test_the_last_runs_are_told_with_how_they_ended(ledger: Ledger) -> None:
    people = People(to=("ours", "theirs"))
    people.want("vip", *crowd("anna"))
    for minute in range(status.RUNS):
        run(ledger, Platform("theirs"), people, NOW_MS + 60_000 * minute, audience="vip")
    late_ms = NOW_MS + 3_600_000
    with pytest.raises(Busy):
        run(ledger, Platform(fault=Busy("503: down")), people, late_ms)
    found = status.last_runs(ledger, late_ms)
    assert len(found) == status.RUNS
    assert (found[0].destination, found[0].audience, found[0].result) == ("ours", None, "503: down")
    assert (found[0].started_ms, found[0].ended_ms) == (late_ms, late_ms)
    assert (found[1].destination, found[1].audience, found[1].result) == ("theirs", "vip", "0 of vip sent")
    assert [one.destination for one in status.last_runs(ledger, late_ms, destination="ours")] == ["ours"]
    assert [one.audience for one in status.last_runs(ledger, late_ms, audience="all")] == [None]


@both
def test_a_run_without_an_end_is_under_way_while_its_lease_is_held_and_else_interrupted(ledger: Ledger) -> None:
    ledger.leases.take("ours", ELSEWHERE, NOW_MS, 60_000)
    ledger.begin("ours", None, ELSEWHERE, NOW_MS)
    (one,) = status.last_runs(ledger, NOW_MS)
    assert (one.under_way, one.ended_ms, one.holder) == (True, None, "process 77 of elsewhere")
    gone = "/".join([*leases.holder().split("/")[:2], "4194305", "1"])  # a process that this machine does not have
    for holder in "elsewhere/1/78/x", gone:
        ledger.leases.give_back("ours", ELSEWHERE)
        ledger.leases.take("ours", holder, NOW_MS, 60_000)
        (one,) = status.last_runs(ledger, NOW_MS)
        assert (one.under_way, one.ended_ms) == (False, None)
        ledger.leases.give_back("ours", holder)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("answers 422: Unprocessable", "answers 422: Unprocessable"),
        ("no contact has this external_id", "no contact has this external_id"),
        ("visitor-143 is unknown (id=8f14e45f)", "… is unknown (…)"),
        ("anna@example.com bounced.", "… bounced."),
        ("job 5001: FAILED", "job …: FAILED"),
    ],
)
def test_words_lose_what_may_name_somebody_and_keep_small_numbers(words: str, left: str) -> None:
    assert status.anonymous(words) == left


def test_a_destination_that_cannot_be_asked_or_built_says_so() -> None:
    text = """
    destinations:
      hook: {kind: webhook, url: "https://x.example", secret: "${SECRET}", purpose: crm}
      wrong: {kind: filse, url: lists}
    """
    environment: dict[str, Any] = {"SECRET": "whsec_" + "QUJD" * 8}
    file = registry.read(text, "destinations.yaml", environment)
    hook = status.check(file, "hook")
    assert (hook.works, hook.words[:42]) == (None, "cannot be tried without sending somebody; ")
    wrong = status.check(file, "wrong")
    assert (wrong.works, wrong.words) == (
        False,
        "destinations.yaml:4: destinations.wrong.kind: is no kind; did you mean 'files'?",
    )
    assert status.check(file, "none").words == "destinations.yaml: no destination 'none'; it has hook, wrong"
