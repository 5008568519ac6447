"""Triggers: movements between segments and changes of audiences, told to webhooks as they happen.

Events come from the journals of the feature cache and wait in the ledger, which the cursor is moved on in with the same
transaction. So each is told at least once, under an id that does not change, and those of a visitor in their order: one
that fails blocks the visitor's others until it is delivered or dead, and nobody else's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol, get_args

import sqlalchemy as sa
from pydantic import Field, ValidationError

from audiences.destinations import registry
from audiences.destinations.protocol import Busy, DestinationError
from audiences.leases import Lease
from audiences.ledger import Ledger
from audiences.signed import Endpoint, post
from audiences.tables import cursors, deliveries
from service.core.errors import PropensityError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Kind = Literal["segment_entered", "segment_left", "audience_entered", "audience_left"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

PAGE: Final = 1000
MOST_WAITING: Final = 20_000  # beyond which no more is read: the journals hold the rest
AT_ONCE: Final = 200
LANES: Final = 8
LEASE_MS: Final = 120_000


class Options(Endpoint):
    """One trigger of `destinations.yaml`."""

    events: tuple[Kind, ...] = Field(KINDS, min_length=1, description="What is told.")
    models: tuple[Name, ...] | None = Field(None, description="Models whose segments are told of; all unless given.")
    audiences: tuple[Name, ...] | None = Field(None, description="Audiences that are told of; all unless given.")
    start: Literal["now", "kept"] = Field(
        "now", description="Where a new trigger begins: now, or as far back as is kept."
    )
    attempts: int = Field(12, ge=1, description="Attempts until an event is dead.")
    first_wait_s: float = Field(5, gt=0, description="Seconds before the second attempt; doubled for each further.")
    longest_wait_s: float = Field(3600, gt=0, description="Seconds between two attempts at most.")


class Event(NamedTuple):
    """Something that happened to a visitor. Without a `visitor_id` it is about somebody who was erased."""

    source: str
    cursor: str
    kind: Kind
    at_ms: int
    visitor_id: str | None
    visitor_key: str
    data: Mapping[str, str | None]

    @property
    def id(self) -> str:
        """The same whenever the event is read."""
        return f"evt_{hashlib.sha256(f'{self.source}/{self.cursor}/{self.kind}'.encode()).hexdigest()[:32]}"

    @property
    def body(self) -> str:
        """What is posted."""
        at = datetime.datetime.fromtimestamp(self.at_ms / 1000, datetime.UTC)
        visitor = {"visitor_id": self.visitor_id, "visitor_key": self.visitor_key}
        data = {**visitor, **self.data}
        return json.dumps({"type": self.kind, "timestamp": at.isoformat(timespec="milliseconds"), "data": data})


class Read(NamedTuple):
    """Events after a cursor, and the cursor to go on from; `gone` where some in between are not kept any more."""

    events: Sequence[Event]
    cursor: str
    gone: bool = False


class Sources(Protocol):
    """Where events come from."""

    def names(self, options: Options) -> Sequence[str]:
        """The journals that a trigger follows."""

    def end(self, name: str) -> str:
        """The cursor of what happens from now on."""

    def read(self, name: str, cursor: str, count: int) -> Read:
        """What happened after a cursor, from the first that is kept if it is empty; no events at the end."""

    def erased(self, visitor_ids: Sequence[str]) -> Collection[str]:
        """Those who were erased."""


@dataclass
class Told:
    """What a run did."""

    taken: int = 0  # from the journals
    delivered: int = 0
    failed: int = 0  # attempts
    died: int = 0
    erased: int = 0  # events of visitors who are to be forgotten
    waiting: int = 0  # at the end
    lost: int = 0  # journals of which some was not kept until it was read

    @property
    def complete(self) -> bool:
        """Whether all that happened is told."""
        return not (self.died or self.waiting or self.lost)


class Waiting(NamedTuple):
    """A delivery that is due, or dead."""

    id: int
    event: str
    body: str
    attempts: int
    first_ms: int
    answer: str | None

    @property
    def visitor_id(self) -> str | None:
        """Whom it is about."""
        found: str | None = json.loads(self.body)["data"]["visitor_id"]
        return found


def load(file: registry.File, name: str | None = None) -> dict[str, Options]:
    """The triggers of the file, or the one of a name. Raises PropensityError."""
    if not file.triggers:
        raise PropensityError(f"{file.document.name}: no triggers; write triggers: NAME: {{url: ..., secret: ...}}")
    return {one: _options(file, one) for one in (file.triggers if name is None else [name])}


def _options(file: registry.File, name: str) -> Options:
    given = file.trigger(name)
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        wrong = registry.problems(("triggers", name), error, Options.model_fields)
        raise PropensityError(file.document.told(wrong)) from None


class Trigger:
    """One trigger's queue in the ledger. Its lease must be held by whoever takes or delivers."""

    def __init__(self, name: str, options: Options, ledger: Ledger, holder: str) -> None:
        self.name, self.options = name, options
        self._ledger, self._engine = ledger, ledger.engine
        self.lease = Lease(f"trigger {name}", holder, LEASE_MS)
        self._own = deliveries.c.trigger == name
        self._insert = ledger.insert

    def hold(self, now_ms: int) -> str | None:
        """Take the lease; who has it instead, or None."""
        return self._ledger.leases.take(*self.lease[:2], now_ms, self.lease.lease_ms)

    def keep(self, now_ms: int) -> None:
        """Hold the lease for longer. Raises LeaseLost where somebody else has it."""
        self._ledger.leases.keep(self.lease, now_ms)

    def let_go(self) -> None:
        """End the lease."""
        self._ledger.leases.give_back(self.lease.name, self.lease.holder)

    # --- taking events ---

    def take(self, sources: Sources, now_ms: int, told: Told) -> bool:
        """Read one page of every journal and queue it in the order of time. Whether there was anything."""
        pages: dict[str, str] = {}
        events: list[Event] = []
        if self.waiting() < MOST_WAITING:
            for source in sources.names(self.options):
                read = self._read(sources, source)
                if read is not None:
                    pages[source] = read.cursor
                    told.lost += read.gone
                    events += read.events
        wanted = [one for one in events if one.kind in self.options.events]
        wanted.sort(key=lambda one: one.at_ms)  # stable, so what is of one journal keeps its order
        gone = [bytes.fromhex(one.visitor_key) for one in events if one.visitor_id is None]
        with self._engine.begin() as connection:
            self._ledger.leases.hold(connection, self.lease, now_ms)
            told.erased += self._forget(connection, gone)
            rows = [self._row(one, now_ms) for one in wanted]
            if rows:
                connection.execute(self._insert(deliveries).on_conflict_do_nothing(), rows)
            for source, cursor in pages.items():
                put = self._insert(cursors).values(name=self._cursor(source), cursor=cursor)
                put = put.on_conflict_do_update(index_elements=["name"], set_={"cursor": cursor})
                connection.execute(put)
        told.taken += len(wanted)
        return bool(events)

    def _read(self, sources: Sources, source: str) -> Read | None:
        with self._ledger.reading.connect() as connection:
            wanted = sa.select(cursors.c.cursor).where(cursors.c.name == self._cursor(source))
            row = connection.execute(wanted).one_or_none()
        if row is None and self.options.start == "now":
            return Read((), sources.end(source))
        cursor = "" if row is None else str(row[0] or "")
        read = sources.read(source, cursor, PAGE)
        return read if read.events or read.gone else None

    def _cursor(self, source: str) -> str:
        return f"trigger {self.name}: {source}"

    def _row(self, event: Event, now_ms: int) -> dict[str, Any]:
        own = {"trigger": self.name, "event": event.id, "visitor": bytes.fromhex(event.visitor_key)}
        return own | {"body": event.body, "attempts": 0, "first_ms": now_ms, "due_ms": now_ms, "dead": False}

    def _forget(self, connection: sa.Connection, visitors: Sequence[bytes]) -> int:
        """Drop all that waits or is dead of visitors."""
        dropped = 0
        for first in range(0, len(visitors), 500):
            some = deliveries.c.visitor.in_(visitors[first : first + 500])
            dropped += connection.execute(deliveries.delete().where(self._own & some)).rowcount
        return dropped

    def forget_erased(self, sources: Sources, told: Told) -> None:
        """Drop the events of visitors who were erased after they happened, dead ones too."""
        after = 0
        while rows := self._select((deliveries.c.id > after), AT_ONCE * 5):
            after = rows[-1].id
            ids = sorted({one.visitor_id for one in rows if one.visitor_id is not None})
            if gone := sources.erased(ids):
                told.erased += self._forget_all(gone)

    def _forget_all(self, visitor_ids: Iterable[str]) -> int:
        keys = [hashlib.sha256(one.encode("utf-8", "surrogatepass")).digest() for one in visitor_ids]
        with self._engine.begin() as connection:
            return self._forget(connection, keys)

    # --- delivering them ---

    def waiting(self) -> int:
        """How many events wait."""
        with self._ledger.reading.connect() as connection:
            counted = sa.select(sa.func.count()).where(self._own & deliveries.c.dead.is_(False))
            return int(connection.execute(counted).scalar_one())

    def _select(self, where: sa.ColumnElement[bool], count: int | None) -> list[Waiting]:
        columns = (deliveries.c[name] for name in Waiting._fields)
        wanted = sa.select(*columns).where(self._own & where).order_by(deliveries.c.id).limit(count)
        with self._ledger.reading.connect() as connection:
            return [Waiting(*row) for row in connection.execute(wanted)]

    def due(self, now_ms: int) -> list[Waiting]:
        """The first event of each visitor that waits, where its time has come."""
        before = deliveries.alias()
        earlier = sa.exists().where(
            (before.c.trigger == self.name)
            & before.c.dead.is_(False)
            & (before.c.visitor == deliveries.c.visitor)
            & (before.c.id < deliveries.c.id)
        )
        return self._select(deliveries.c.dead.is_(False) & (deliveries.c.due_ms <= now_ms) & ~earlier, AT_ONCE)

    def deliver(
        self,
        sources: Sources,
        clock_ms: Callable[[], int],
        told: Told,
        pool: ThreadPoolExecutor,
        keep: Callable[[], None],
    ) -> bool:
        """Post what is due, side by side for different visitors. Whether anything was.

        `keep` is called from time to time: a receiver that hangs takes minutes for what is due.
        """
        rows = self.due(clock_ms())
        if not rows:
            return False
        keep()
        gone = set(sources.erased(sorted({one.visitor_id for one in rows if one.visitor_id is not None})))
        if gone:
            told.erased += self._forget_all(gone)
            rows = [one for one in rows if one.visitor_id not in gone]
        kept_ms, answers = clock_ms(), []
        for answer in pool.map(self._post, rows):
            answers.append(answer)
            if clock_ms() - kept_ms > LEASE_MS // 4:
                keep()
                kept_ms = clock_ms()
        now_ms = clock_ms()
        failed = [(row, error) for row, error in zip(rows, answers, strict=True) if error is not None]
        done = [row.id for row, error in zip(rows, answers, strict=True) if error is None]
        changes = [self._failure(row, error, now_ms) for row, error in failed]
        with self._engine.begin() as connection:
            self._ledger.leases.hold(connection, self.lease, now_ms)
            connection.execute(deliveries.delete().where(deliveries.c.id.in_(done)))
            if changes:
                which = deliveries.c.id == sa.bindparam("which")
                values: dict[str, Any] = {
                    name: sa.bindparam(f"new_{name}") for name in ("attempts", "due_ms", "dead", "answer")
                }
                connection.execute(deliveries.update().where(which).values(values), changes)
        told.delivered += len(done)
        told.failed += len(failed)
        told.died += sum(change["new_dead"] for change in changes)
        return True

    def _post(self, row: Waiting) -> DestinationError | None:
        try:
            post(self.options, row.event, row.body.encode("utf-8"), datetime.datetime.now(datetime.UTC))
        except DestinationError as error:
            return error
        return None

    def _failure(self, row: Waiting, error: DestinationError, now_ms: int) -> dict[str, Any]:
        attempts, options = row.attempts + 1, self.options
        wait_s = min(options.longest_wait_s, options.first_wait_s * 2.0 ** (attempts - 1)) * random.uniform(0.75, 1.25)
        asked = error.after_s if isinstance(error, Busy) and error.after_s is not None else 0.0
        return {
            "which": row.id,
            "new_attempts": attempts,
            "new_due_ms": now_ms + round(1000 * max(wait_s, min(asked, options.longest_wait_s))),
            "new_dead": attempts >= options.attempts,
            "new_answer": str(error)[:200],
        }

    # --- the dead ---

    def dead(self, count: int | None = None) -> list[Waiting]:
        """Events that were given up, oldest first."""
        return self._select(deliveries.c.dead.is_(True), count)

    def replay(self, events: Collection[str] | None, now_ms: int) -> int:
        """Let dead events be delivered again, all or those of some ids, in the order they had."""
        which = self._own & deliveries.c.dead.is_(True)
        if events is not None:
            which &= deliveries.c.event.in_(events)
        with self._engine.begin() as connection:
            change = {"dead": False, "attempts": 0, "due_ms": now_ms, "first_ms": now_ms}
            return connection.execute(deliveries.update().where(which).values(change)).rowcount


def run(
    triggers: Sequence[Trigger],
    sources: Sources,
    clock_ms: Callable[[], int],
    pause: Callable[[], bool],
) -> dict[str, Told]:
    """Take and deliver, by each trigger, until nothing is due and `pause` says to end. Leases must be held."""
    told = {trigger.name: Told() for trigger in triggers}
    for trigger in triggers:
        trigger.forget_erased(sources, told[trigger.name])

    def keep() -> None:
        for trigger in triggers:
            trigger.keep(clock_ms())

    with ThreadPoolExecutor(LANES) as pool:
        while True:
            busy = False
            for trigger in triggers:
                own = told[trigger.name]
                busy |= trigger.take(sources, clock_ms(), own)
                busy |= trigger.deliver(sources, clock_ms, own, pool, keep)
            if not busy and pause():
                break
    for trigger in triggers:
        told[trigger.name].waiting = trigger.waiting()
    return told
