"""Triggers against a webhook that fails for whom it is told to, over both kinds of ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from audiences import leases, tables, triggers
from audiences.destinations.protocol import Busy
from audiences.ledger import Ledger
from audiences.triggers import Event, Options, Read, Told, Trigger
from tests.audiences.hooks import Hook, hooked
from tests.audiences.people import key_of
from tests.audiences.postgres import both
from tests.audiences.receiving import SECRET

START = 1_790_000_000_000


@pytest.fixture
def hook() -> Iterator[Hook]:
    with hooked() as found:
        yield found


@dataclass
class Log:
    """Journals in memory, by name."""

    lines: dict[str, list[Event]] = field(default_factory=lambda: {"segments shop": []})
    gone: Collection[str] = ()
    forgotten: int = 0  # lines that are not kept any more

    def move(self, visitor: str, *segments: str) -> None:
        own = self.lines["segments shop"]
        for segment in segments:
            number = len(own) + 1
            at = (START + number, visitor, key_of(visitor))
            own.append(Event("segments shop", str(number), "segment_entered", *at, {"segment": segment}))

    def names(self, options: Options) -> Sequence[str]:
        return sorted(self.lines)

    def end(self, name: str) -> str:
        return str(len(self.lines[name]))

    def read(self, name: str, cursor: str, count: int) -> Read:
        first = int(cursor or 0)
        gone = bool(cursor) and first < self.forgotten
        found = self.lines[name][max(first, self.forgotten) :][:count]
        return Read(found, found[-1].cursor if found else cursor, gone)

    def erased(self, visitor_ids: Sequence[str]) -> Collection[str]:
        return {one for one in visitor_ids if one in self.gone}


@dataclass
class Bench:
    """A trigger with a clock that is set by hand."""

    ledger: Ledger
    log: Log
    options: Options
    now_ms: int = START
    name: str = "sales"

    def __post_init__(self) -> None:
        self.trigger = Trigger(self.name, self.options, self.ledger, "me")
        assert self.trigger.hold(self.now_ms) is None

    def run(self) -> Told:
        told = triggers.run([self.trigger], self.log, lambda: self.now_ms, lambda: True)
        return told[self.name]


@pytest.fixture
def bench(ledger: Ledger, hook: Hook) -> Bench:
    return Bench(ledger, Log(), options(hook))


def options(hook: Hook, **given: object) -> Options:
    usual: Mapping[str, object] = {"attempts": 3, "first_wait_s": 10, "longest_wait_s": 20, "start": "kept"}
    return Options.model_validate({"url": hook.url, "secret": SecretStr(SECRET), **usual, **given})


@both
def test_every_event_is_told_once_and_signed_and_in_order_for_each_visitor(bench: Bench, hook: Hook) -> None:
    for segment in ("nurture", "warm_prospects", "champions"):
        for visitor in range(10):
            bench.log.move(f"v{visitor}", segment)
    told = bench.run()
    assert (told.taken, told.delivered, told.failed, told.waiting, told.complete) == (30, 30, 0, 0, True)
    assert hook.forged == 0
    assert len(set(hook.ids)) == 30
    assert {tuple(hook.of(f"v{visitor}")) for visitor in range(10)} == {("nurture", "warm_prospects", "champions")}
    assert bench.run().taken == 0
    assert len(hook.told) == 30


@both
def test_one_that_fails_blocks_its_visitor_and_nobody_else(bench: Bench, hook: Hook) -> None:
    bench.log.move("anna", "nurture", "champions")
    bench.log.move("bert", "nurture", "champions")
    hook.answers["anna"] = 503
    told = bench.run()
    assert (told.delivered, told.failed, told.waiting, told.complete) == (2, 1, 2, False)
    assert hook.of("bert") == ["nurture", "champions"]
    hook.answers.clear()
    assert bench.run().delivered == 0, "it is not due yet"
    bench.now_ms += 13_000
    assert bench.run().delivered == 2
    assert hook.of("anna") == ["nurture", "champions"]


@both
def test_after_its_attempts_an_event_is_dead_and_can_be_replayed(bench: Bench, hook: Hook) -> None:
    bench.log.move("anna", "nurture", "champions")
    hook.answers["anna"] = 500
    for _ in range(3):
        bench.run()
        bench.now_ms += 30_000
    [dead] = bench.trigger.dead()
    assert (dead.attempts, json.loads(dead.body)["data"]["segment"]) == (3, "nurture")
    assert dead.answer == f"127.0.0.1:{hook.port} answers 500: Internal Server Error"
    hook.answers.clear()
    assert bench.run().delivered == 1, "the next of the visitor goes on"
    assert bench.trigger.replay({"evt_none"}, bench.now_ms) == 0
    assert bench.trigger.replay({dead.event}, bench.now_ms) == 1
    assert bench.run().delivered == 1
    assert hook.of("anna") == ["champions", "nurture"]
    assert (bench.trigger.dead(), bench.run().complete) == ([], True)


def test_waits_grow_and_a_receiver_may_ask_for_longer(bench: Bench, hook: Hook) -> None:
    bench.log.move("anna", "nurture")
    hook.answers["anna"] = 429
    dues = []
    for _ in range(2):
        bench.run()
        with bench.ledger.reading.connect() as connection:
            due_ms = connection.execute(sa.select(tables.deliveries.c.due_ms)).scalar_one()
        dues.append(due_ms - bench.now_ms)
        bench.now_ms = due_ms
    assert 7_500 <= dues[0] <= 12_500
    assert 15_000 <= dues[1] <= 25_000


def test_a_run_that_is_killed_after_a_delivery_tells_it_again_under_the_same_id(bench: Bench, hook: Hook) -> None:
    bench.log.move("anna", "nurture")
    bench.trigger.take(bench.log, bench.now_ms, Told())
    [row] = bench.trigger.due(bench.now_ms)
    assert bench.trigger._post(row) is None  # and nothing is written down
    assert bench.run().delivered == 1
    assert len(hook.ids) == 2
    assert len(set(hook.ids)) == 1


def test_a_new_trigger_begins_now_unless_it_says_otherwise(ledger: Ledger, hook: Hook) -> None:
    log = Log()
    log.move("anna", "nurture")
    bench = Bench(ledger, log, options(hook, start="now"))
    assert bench.run().taken == 0
    log.move("anna", "champions")
    assert bench.run().delivered == 1
    assert hook.of("anna") == ["champions"]


def test_only_what_is_asked_for_is_told(ledger: Ledger, hook: Hook) -> None:
    bench = Bench(ledger, Log(), options(hook, events=["audience_left"]))
    bench.log.move("anna", "nurture")
    assert bench.run().taken == 0


def test_what_waits_or_is_dead_of_an_erased_visitor_is_dropped(bench: Bench, hook: Hook) -> None:
    bench.log.move("anna", "nurture", "champions")
    bench.log.move("bert", "nurture")
    hook.answers |= {"anna": 500, "bert": 500}
    for _ in range(3):
        bench.run()
        bench.now_ms += 30_000
    hook.answers.clear()
    bench.log.gone = {"anna"}
    told = bench.run()
    assert (told.erased, told.delivered) == (2, 0)
    at = (START, None, key_of("bert"))
    bench.log.lines["segments shop"].append(
        Event("segments shop", "99", "audience_left", *at, {"audience": "vip", "why": "erased"})
    )
    bench.run()
    with bench.ledger.reading.connect() as connection:
        assert connection.execute(sa.select(tables.deliveries)).all() == []
    [last] = hook.told
    assert last["data"] == {"visitor_id": None, "visitor_key": key_of("bert"), "audience": "vip", "why": "erased"}


def test_what_was_not_kept_until_it_was_read_is_said(bench: Bench) -> None:
    bench.log.move("anna", "nurture")
    bench.run()
    bench.log.move("anna", "warm_prospects", "champions")
    bench.log.forgotten = 2
    told = bench.run()
    assert (told.taken, told.lost, told.complete) == (1, 1, False)


@both
def test_a_trigger_that_is_held_elsewhere_writes_nothing(bench: Bench) -> None:
    bench.log.move("anna", "nurture")
    bench.trigger.let_go()
    assert bench.ledger.leases.take("trigger sales", "elsewhere/1/2/3", bench.now_ms, 10**9) is None
    with pytest.raises(leases.LeaseLost):
        bench.run()
    with bench.ledger.reading.connect() as connection:
        assert connection.execute(sa.select(tables.deliveries)).all() == []


@pytest.mark.parametrize("key", ["audiences", "models"])
def test_a_name_that_nothing_can_have_is_refused_when_the_file_is_read(hook: Hook, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.0"):
        options(hook, **{key: ["../vip"]})


def test_while_a_receiver_hangs_no_other_run_takes_any_trigger_over(
    ledger: Ledger, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "LEASE_MS", 800)
    log, holders = Log(), set[str | None]()
    hanging, other = (Bench(ledger, log, options(hook), _now_ms(), name) for name in ("sales", "other"))
    for visitor in range(12 * triggers.LANES):
        log.move(f"v{visitor}", "nurture")

    def hang(trigger: Trigger, row: triggers.Waiting) -> Busy:
        time.sleep(0.1)
        holders.update(ledger.leases.take(f"trigger {name}", "elsewhere", _now_ms(), 1) for name in ("sales", "other"))
        return Busy("does not answer")

    monkeypatch.setattr(Trigger, "_post", hang)
    told = triggers.run([hanging.trigger, other.trigger], log, _now_ms, lambda: True)
    assert told["sales"].failed == 12 * triggers.LANES
    assert holders == {"me"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
