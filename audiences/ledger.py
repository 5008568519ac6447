"""The ledger: what was sent to which destination, when, why, and what the platform answered, in SQLite or PostgreSQL.

It is written ahead: the intent is there before the request and the outcome after it. So a batch that was intended and
has no outcome may have been taken or not, and its members are `open` until somebody asks the platform again.
`audiences.tables` has the tables.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from audiences.destinations.protocol import Outcome
from audiences.identifiers import Identifiers, joined, packed, unpacked
from audiences.leases import Lease, Leases
from audiences.tables import (
    batches,
    connected,
    deliveries,
    entries,
    file_of,
    history,
    is_prepared,
    lists,
    members,
    prepare,
    reader,
    runs,
    upsert,
)

DAY_MS: Final = 86_400_000
LONGEST_ANSWER: Final = 200
# After how long somebody is sent again of whom nothing changed. The last one of refusals is repeated.
AGAIN_AFTER_REFUSAL_MS: Final = (1 * DAY_MS, 7 * DAY_MS, 30 * DAY_MS)
AGAIN_AFTER_FAILURE_MS: Final = (0, *AGAIN_AFTER_REFUSAL_MS)

ADD: Final = "add"
REMOVE: Final = "remove"

INTENDED: Final = "intended"
WORKING: Final = "working"
SETTLED: Final = "settled"
REJECTED: Final = "rejected"
REPLACED: Final = "replaced"

ERASED: Final = "erased"  # why a member left, of whom nothing is kept once the removal is confirmed


class Known(NamedTuple):
    """A member as the ledger knows it."""

    key: bytes
    has: bytes | None
    refused: bytes | None
    open: int | None
    identifiers: Identifiers
    changed_ms: int = 0
    tries: int = 0
    due_ms: int | None = None


class Copy(NamedTuple):
    """What a destination has of an audience: when it was last in step, if ever, and how many people it may have."""

    destination: str
    synced_ms: int | None
    size: int


class List(NamedTuple):
    """One audience's list at one destination."""

    id: int
    audience: str
    list_id: str | None
    stale: bool


@dataclass(frozen=True)
class Intent:
    """What is about to be done with one member, and what the ledger is to know in either case."""

    known: Known  # as it was before
    why: str
    mark: bytes  # of what is sent
    sent: Identifiers
    after: Identifiers | None  # that the platform may have once it is taken; none: it is no member any more


@dataclass
class Batch:
    """A batch under way."""

    id: int
    name: str
    list: int
    operation: str
    intents: Sequence[Intent] = field(repr=False)


class Working(NamedTuple):
    """A batch that a platform took and works off, or did when it was asked last."""

    id: int
    operation: str
    answer: str  # names the job
    members: int
    settled_ms: int


class Undone(NamedTuple):
    """What became of the members of a batch that failed after it was taken."""

    members: int  # who will be sent again
    later: int = 0  # those of them who had failed before, and wait
    given_up: int = 0  # who failed too often, and are not among them


class Ledger:
    """The tables, and each change of them that must happen at once or not at all. Not for several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.reading = reader(engine)
        self.insert = upsert(engine)
        self.leases = Leases(engine)

    # --- runs and lists ---

    def begin(self, destination: str, audience: str | None, holder: str, now_ms: int) -> int:
        """A new run's number."""
        with self._engine.begin() as connection:
            row = {"destination": destination, "audience": audience, "holder": holder, "started_ms": now_ms}
            return _number(connection, runs.insert().values(row))

    def end(self, run: int, result: str, now_ms: int) -> None:
        """Write how a run ended."""
        with self._engine.begin() as connection:
            connection.execute(runs.update().where(runs.c.id == run).values(ended_ms=now_ms, result=result))

    def lists(self, destination: str) -> list[List]:
        """The lists of a destination, by audience."""
        wanted = sa.select(lists.c.id, lists.c.audience, lists.c.list_id, lists.c.stale)
        with self.reading.connect() as connection:
            found = connection.execute(wanted.where(lists.c.destination == destination).order_by(lists.c.audience))
            return [List(*row) for row in found]

    def copies(self, audience: str) -> list[Copy]:
        """What destinations have of an audience, by destination."""
        held = (members.c.list == lists.c.id) & is_held()
        found = sa.select(lists.c.destination, lists.c.synced_ms, sa.func.count(members.c.key))
        found = found.select_from(lists.outerjoin(members, held)).where(lists.c.audience == audience)
        with self.reading.connect() as connection:
            rows = connection.execute(found.group_by(lists.c.id).order_by(lists.c.destination))
            return [Copy(*row) for row in rows]

    def destinations(self) -> set[str]:
        """The destinations that may have somebody."""
        held = sa.exists().where(members.c.list == lists.c.id)
        with self.reading.connect() as connection:
            return set(connection.execute(sa.select(lists.c.destination).where(held)).scalars())

    def list_of(self, destination: str, audience: str) -> List:
        """The list of an audience; a new one has no members and is not opened."""
        row = {"destination": destination, "audience": audience, "stale": True}
        with self._engine.begin() as connection:
            connection.execute(self.insert(lists).values(row).on_conflict_do_nothing())
        return next(one for one in self.lists(destination) if one.audience == audience)

    def opened(self, own: List, list_id: str) -> List:
        """Note the platform's id of a list."""
        with self._engine.begin() as connection:
            connection.execute(lists.update().where(lists.c.id == own.id).values(list_id=list_id))
        return own._replace(list_id=list_id)

    def in_step(self, own: List, now_ms: int, snapshot: bool) -> None:
        """Note that a list is what it should be; batches of runs before whose outcome never came are settled by now."""
        with self._engine.begin() as connection:
            change = {"synced_ms": now_ms, **({"stale": False} if snapshot else {})}
            connection.execute(lists.update().where(lists.c.id == own.id).values(change))
            left = (batches.c.list == own.id) & (batches.c.state == INTENDED)
            connection.execute(batches.update().where(left).values(state=REPLACED, settled_ms=now_ms))

    def is_stale(self, own: List) -> bool:
        """Whether the list changed since a snapshot was last written."""
        with self.reading.connect() as connection:
            return bool(connection.execute(sa.select(lists.c.stale).where(lists.c.id == own.id)).scalar_one())

    # --- members ---

    def known(self, own: List, page: int = 10_000) -> Iterator[Known]:
        """All members in the order of their keys, some at a time; what changes behind the reader does not matter."""
        columns = [members.c[name] for name in Known._fields]
        after = b""
        while True:
            wanted = sa.select(*columns).where((members.c.list == own.id) & (members.c.key > after))
            with self.reading.connect() as connection:
                rows = connection.execute(wanted.order_by(members.c.key).limit(page)).all()
            for row in rows:
                yield _known(row)
            if len(rows) < page:
                return
            after = bytes(rows[-1][0])

    def forget(self, own: List, keys: Sequence[bytes], erased: Sequence[bytes] = ()) -> None:
        """Drop members of whom the platform has nothing, and of those who were erased what was sent before."""
        with self._engine.begin() as connection:
            self._drop(connection, own.id, keys)
            self._purge(connection, erased)

    def _purge(self, connection: sa.Connection, keys: Sequence[bytes]) -> None:
        """Drop the keys of people from what was sent; how many they were stays with the batches."""
        for first in range(0, len(keys), 500):
            some = entries.c.key.in_(keys[first : first + 500])
            # A removal that the platform still works off is purged at its end.
            connection.execute(entries.delete().where(some & entries.c.identifiers.is_(None)))

    def _drop(self, connection: sa.Connection, list_: int, keys: Iterable[bytes]) -> None:
        gone = (members.c.list == list_) & (members.c.key == sa.bindparam("k"))
        if rows := [{"k": key} for key in keys]:
            connection.execute(members.delete().where(gone), rows)

    # --- batches ---

    def intend(
        self, own: List, run: int, operation: str, intents: Sequence[Intent], lease: Lease, now_ms: int
    ) -> Batch:
        """Write down what is about to be sent. Raises LeaseLost."""
        name = uuid.uuid4().hex
        with self._engine.begin() as connection:
            self.leases.hold(connection, lease, now_ms)
            row = {"name": name, "list": own.id, "run": run, "operation": operation, "state": INTENDED}
            counts = {"members": len(intents), "attempts": 0, "intended_ms": now_ms}
            batch = _number(connection, batches.insert().values(row | counts))
            connection.execute(
                entries.insert(), [{"batch": batch, "key": one.known.key, "why": one.why} for one in intents]
            )
            self._put(connection, own.id, [self._open(one, operation, batch) for one in intents], now_ms)
            connection.execute(lists.update().where(lists.c.id == own.id).values(stale=True))
        return Batch(batch, name, own.id, operation, intents)

    def _open(self, one: Intent, operation: str, batch: int) -> dict[str, Any]:
        maybe = joined(one.known.identifiers, one.sent) if operation == ADD else one.known.identifiers
        has = None if one.known.open else one.known.has
        row = {"key": one.known.key, "has": has, "refused": None, "open": batch, "identifiers": packed(maybe)}
        return row | {"tries": one.known.tries}

    def _put(self, connection: sa.Connection, list_: int, rows: Iterable[dict[str, Any]], now_ms: int) -> None:
        usual = {"answer": None, "tries": 0, "due_ms": None, "list": list_, "changed_ms": now_ms}
        whole = [usual | row for row in rows]
        if not whole:
            return
        put = self.insert(members)
        changed = {name: put.excluded[name] for name in whole[0] if name not in ("list", "key")}
        put = put.on_conflict_do_update(index_elements=["list", "key"], set_=changed)
        connection.execute(put, whole)

    def attempt(self, batch: Batch, lease: Lease, now_ms: int) -> None:
        """Note an attempt that is about to be made. Raises LeaseLost."""
        with self._engine.begin() as connection:
            self.leases.hold(connection, lease, now_ms)
            change = batches.update().where(batches.c.id == batch.id)
            connection.execute(change.values(attempts=batches.c.attempts + 1, attempted_ms=now_ms))

    def settle(self, batch: Batch, outcomes: Sequence[Outcome], lease: Lease, now_ms: int) -> None:
        """Write down what the platform said, member by member. Raises LeaseLost: then another run has asked again."""
        usual = _usual(outcomes)
        pairs = list(zip(batch.intents, outcomes, strict=True))
        state = WORKING if any(one.accepted and not one.final for one in outcomes) else SETTLED
        with self._engine.begin() as connection:
            self.leases.hold(connection, lease, now_ms)
            change: dict[str, Any] = {"state": state, "accepted": sum(one.accepted for one in outcomes)}
            change |= {"settled_ms": now_ms, "answer": usual}
            connection.execute(batches.update().where(batches.c.id == batch.id).values(change))
            self._settle_entries(connection, batch, pairs, usual)
            rows = [(one.known.key, _settled(one, outcome, batch.operation, now_ms)) for one, outcome in pairs]
            self._put(connection, batch.list, [row for _, row in rows if row is not None], now_ms)
            self._drop(connection, batch.list, [key for key, row in rows if row is None])
            if state == SETTLED:
                self._purge_erased(connection, batch.id)

    def _settle_entries(
        self, connection: sa.Connection, batch: Batch, pairs: Sequence[tuple[Intent, Outcome]], usual: str
    ) -> None:
        connection.execute(entries.update().where(entries.c.batch == batch.id).values(accepted=True))
        own = (entries.c.batch == batch.id) & (entries.c.key == sa.bindparam("k"))
        odd = [
            {"k": one.known.key, "said": outcome.accepted, "words": _short(outcome.answer)}
            for one, outcome in pairs
            if not outcome.accepted or _short(outcome.answer) != usual
        ]
        if odd:
            values: dict[str, Any] = {"accepted": sa.bindparam("said"), "answer": sa.bindparam("words")}
            connection.execute(entries.update().where(own).values(values), odd)
        if batch.operation == REMOVE:
            sent = [
                {"k": one.known.key, "ids": packed(one.sent)}
                for one, outcome in pairs
                if outcome.accepted and not outcome.final
            ]
            if sent:
                connection.execute(entries.update().where(own).values(identifiers=sa.bindparam("ids")), sent)

    def _purge_erased(self, connection: sa.Connection, batch: int) -> None:
        """Drop what was sent before of who was erased, once a batch has removed them."""
        erased = (entries.c.batch == batch) & (entries.c.why == ERASED) & entries.c.accepted.is_(True)
        keys = connection.execute(sa.select(entries.c.key).where(erased)).scalars().all()
        self._purge(connection, [bytes(key) for key in keys])

    def reject(self, batch: Batch, answer: str, lease: Lease, now_ms: int) -> None:
        """Write down that a batch was refused as a whole: everybody is what they were before."""
        with self._engine.begin() as connection:
            self.leases.hold(connection, lease, now_ms)
            change = {"state": REJECTED, "accepted": 0, "settled_ms": now_ms, "answer": _short(answer)}
            connection.execute(batches.update().where(batches.c.id == batch.id).values(change))
            connection.execute(entries.update().where(entries.c.batch == batch.id).values(accepted=False))
            before = [one.known for one in batch.intents]
            self._drop(connection, batch.list, [one.key for one in before if not _matters(one)])
            self._put(connection, batch.list, [_row(one) for one in before if _matters(one)], now_ms)

    # --- batches that a platform works off later ---

    def working(self, own: List) -> list[Working]:
        """The batches of a list that were taken, and whose end was not told yet."""
        columns = [batches.c.id, batches.c.operation, batches.c.answer, batches.c.accepted, batches.c.settled_ms]
        wanted = sa.select(*columns).where((batches.c.list == own.id) & (batches.c.state == WORKING))
        with self.reading.connect() as connection:
            return [Working(*row) for row in connection.execute(wanted.order_by(batches.c.id))]

    def undone_until(self, own: List, batch: Working, late_ms: int) -> float | None:
        """Until when an earlier batch of the other direction may undo this one, of somebody who is in both.

        None: nothing was under way when this one was sent. Infinity: something still is. A batch of which no answer
        came may be worked off for so long after it was sent. Those of the same run are about other people, or about
        other identifiers of theirs.
        """
        both = sa.select(entries.c.key).where(entries.c.batch == batch.id)
        run = sa.select(batches.c.run).where(batches.c.id == batch.id).scalar_subquery()
        is_lost = (batches.c.state.in_((INTENDED, REPLACED)) & (batches.c.attempts > 0)) | (batches.c.attempts > 1)
        lost_ms = sa.case((is_lost, batches.c.attempted_ms + late_ms), else_=0)
        ended_ms = sa.case((batches.c.state == SETTLED, batches.c.settled_ms), else_=0)
        rivals = (batches.c.list == own.id) & (batches.c.operation != batch.operation) & (batches.c.id < batch.id)
        rivals &= (batches.c.run != run) & sa.or_(
            batches.c.state == WORKING, lost_ms > batch.settled_ms, ended_ms > batch.settled_ms
        )
        rivals &= sa.exists().where((entries.c.batch == batches.c.id) & entries.c.key.in_(both))
        with self.reading.connect() as connection:
            found = connection.execute(sa.select(batches.c.state, lost_ms, ended_ms).where(rivals)).all()
        ends = [math.inf if state == WORKING else max(moments) for state, *moments in found]
        return max(ends, default=None)

    def conclude(self, own: List, batch: Working, outcome: Outcome, lease: Lease, now_ms: int) -> Undone:
        """Write down the end of a batch. Where it failed, its members are as if they had not been sent."""
        with self._engine.begin() as connection:
            self.leases.hold(connection, lease, now_ms)
            change: dict[str, Any] = {"state": SETTLED, "settled_ms": now_ms, "answer": _short(outcome.answer)}
            undone = Undone(0)
            if outcome.accepted:
                self._confirm(connection, own, batch)
            else:
                undo = self._undo_additions if batch.operation == ADD else self._undo_removals
                undone = undo(connection, own, batch, _short(outcome.answer), now_ms)
                change["accepted"] = 0
                connection.execute(entries.update().where(entries.c.batch == batch.id).values(accepted=False))
            connection.execute(batches.update().where(batches.c.id == batch.id).values(change))
            connection.execute(entries.update().where(entries.c.batch == batch.id).values(identifiers=None))
            if batch.operation == REMOVE:
                self._purge_erased(connection, batch.id)
        return undone

    def _confirm(self, connection: sa.Connection, own: List, batch: Working) -> None:
        tried = (members.c.list == own.id) & members.c.has.is_not(None) & (members.c.tries > 0)
        tried &= members.c.refused.is_(None) & members.c.key.in_(_taken(batch))
        connection.execute(members.update().where(tried).values(tries=0))

    def _undo_additions(self, connection: sa.Connection, own: List, batch: Working, answer: str, now_ms: int) -> Undone:
        """Have who was added not be there, but for those of whom a later batch tells; identifiers may be there."""
        later = sa.select(entries.c.key).join(batches, batches.c.id == entries.c.batch)
        later = later.where(
            (entries.c.batch > batch.id) & (batches.c.list == own.id) & entries.c.accepted.is_not(False)
        )
        missing = (members.c.list == own.id) & members.c.has.is_not(None)
        missing &= members.c.key.in_(_taken(batch)) & members.c.key.not_in(later)
        counted = sa.select(members.c.tries, sa.func.count()).where(missing).group_by(members.c.tries)
        tries: dict[int, int] = {row[0]: row[1] for row in connection.execute(counted)}
        waits = dict(enumerate(AGAIN_AFTER_FAILURE_MS))
        change = {
            "has": None,
            "refused": sa.func.coalesce(members.c.refused, members.c.has),
            "tries": members.c.tries + 1,
            "due_ms": sa.case({count: now_ms + wait for count, wait in waits.items()}, value=members.c.tries),
            "answer": answer,
            "changed_ms": now_ms,
        }
        connection.execute(members.update().where(missing).values(change))
        again = sum(number for count, number in tries.items() if count in waits)
        return Undone(again, again - tries.get(0, 0), sum(tries.values()) - again)

    def _undo_removals(self, connection: sa.Connection, own: List, batch: Working, answer: str, now_ms: int) -> Undone:
        """Have the platform still have what was to be removed; the next plan removes what nobody wants."""
        wanted = sa.select(entries.c.key, entries.c.identifiers)
        removed = connection.execute(wanted.where(entries.c.key.in_(_taken(batch)), entries.c.batch == batch.id)).all()
        there = sa.select(*[members.c[name] for name in Known._fields])
        there = there.where((members.c.list == own.id) & members.c.key.in_(_taken(batch)))
        known = {one.key: one for one in map(_known, connection.execute(there))}
        rows = []
        for key, identifiers in removed:
            before = known.get(bytes(key), Known(bytes(key), None, None, None, {}, now_ms))
            rows.append(_row(before._replace(identifiers=joined(before.identifiers, unpacked(identifiers)))))
        self._put(connection, own.id, [row | {"answer": answer} for row in rows], now_ms)
        return Undone(len(rows))

    def attempts_since(self, destination: str, since_ms: int) -> list[int]:
        """Moments of the requests since then, as far as the ledger knows: what a limit of rate has been used up by."""
        own = sa.select(lists.c.id).where(lists.c.destination == destination)
        wanted = sa.select(batches.c.attempted_ms, batches.c.attempts)
        late = (batches.c.intended_ms > since_ms - DAY_MS) & (batches.c.attempted_ms > since_ms)
        with self.reading.connect() as connection:
            found = connection.execute(wanted.where(late & batches.c.list.in_(own))).all()
        return sorted(moment for moment, count in found for _ in range(count))

    # --- what is kept ---

    def compact(self, before_ms: int) -> int:
        """Turn batches before a moment into counts a day, and drop runs; how many batches that were."""
        old = sa.select(batches.c.id, batches.c.list, batches.c.operation, batches.c.intended_ms).where(
            (batches.c.intended_ms < before_ms) & batches.c.state.not_in((INTENDED, WORKING))
        )
        with self.reading.connect() as connection:
            found = connection.execute(old.order_by(batches.c.id)).all()
        for batch, list_, operation, intended_ms in found:
            with self._engine.begin() as connection:
                self._count(connection, batch, list_, operation, intended_ms // DAY_MS * DAY_MS)
                connection.execute(entries.delete().where(entries.c.batch == batch))
                connection.execute(batches.delete().where(batches.c.id == batch))
        with self._engine.begin() as connection:
            connection.execute(runs.delete().where(runs.c.started_ms < before_ms))
            late = deliveries.c.dead & (deliveries.c.first_ms < before_ms)
            connection.execute(deliveries.delete().where(late))
        return len(found)

    def _count(self, connection: sa.Connection, batch: int, list_: int, operation: str, day_ms: int) -> None:
        taken = sa.func.sum(sa.case((entries.c.accepted.is_(True), 1), else_=0))
        counted = sa.select(entries.c.why, sa.func.count(), taken).where(entries.c.batch == batch)
        for why, sent, accepted in connection.execute(counted.group_by(entries.c.why)).all():
            row = {"list": list_, "day_ms": day_ms, "operation": operation, "why": why}
            put = self.insert(history).values(row | {"sent": sent, "accepted": accepted})
            more = {"sent": history.c.sent + put.excluded.sent, "accepted": history.c.accepted + put.excluded.accepted}
            put = put.on_conflict_do_update(index_elements=["list", "day_ms", "operation", "why"], set_=more)
            connection.execute(put)

    @property
    def engine(self) -> sa.Engine:
        """The database, for `triggers`, which keeps its own tables there."""
        return self._engine


def is_held() -> sa.ColumnElement[bool]:
    """Which members the platform may have."""
    return members.c.identifiers != packed({})


def is_refused() -> sa.ColumnElement[bool]:
    """Which members the platform did not take, or did not remove."""
    return members.c.refused.is_not(None) | members.c.answer.is_not(None)


def _known(row: Sequence[Any]) -> Known:
    key, has, refused, open_, identifiers, changed_ms, tries, due_ms = row
    return Known(bytes(key), has, refused, open_, unpacked(identifiers), changed_ms, tries, due_ms)


def _row(known: Known) -> dict[str, Any]:
    return {**known._asdict(), "identifiers": packed(known.identifiers) if known.identifiers else None}


def _taken(batch: Working) -> sa.Select[Any]:
    """The keys of who was in a batch and was accepted."""
    return sa.select(entries.c.key).where((entries.c.batch == batch.id) & entries.c.accepted.is_(True))


def _settled(one: Intent, outcome: Outcome, operation: str, now_ms: int) -> dict[str, Any] | None:
    """A member's row once the answer is there; None: there is nothing left to know."""
    known = one.known
    row: dict[str, Any] = {"key": known.key, "has": known.has, "refused": None, "open": None, "answer": None}
    if outcome.accepted:
        if one.after is None:
            return None
        row["tries"] = 0 if outcome.final else known.tries
        return row | {"has": one.mark if operation == ADD else None, "identifiers": packed(one.after)}
    if known.open:
        row["has"] = None
    row |= {"identifiers": packed(known.identifiers) if known.identifiers else None, "answer": _short(outcome.answer)}
    if operation == REMOVE:  # it is tried again at every run: it may be a withdrawal
        return row
    row["refused"] = one.mark
    if not outcome.final:
        row["tries"] = known.tries + 1 if known.refused in (None, one.mark) else 1
        row["due_ms"] = now_ms + AGAIN_AFTER_REFUSAL_MS[min(row["tries"], len(AGAIN_AFTER_REFUSAL_MS)) - 1]
    return row


def _matters(known: Known) -> bool:
    return bool(known.has or known.refused or known.open or known.identifiers)


def _usual(outcomes: Sequence[Outcome]) -> str:
    """The answer of the first that was accepted, which is most often that of all."""
    return next((_short(one.answer) for one in outcomes if one.accepted), "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[: LONGEST_ANSWER - 1] + "…"


def _number(connection: sa.Connection, insert: sa.Insert) -> int:
    key = connection.execute(insert).inserted_primary_key
    assert key is not None
    return int(key[0])


@contextmanager
def opened(url: str) -> Iterator[Ledger]:
    """The ledger at an address, its tables made where they are missing. Raises PropensityError."""
    with connected(url) as engine:
        if (file := file_of(engine)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # it names people, although by hashes alone
        prepare(engine)
        yield Ledger(engine)


@contextmanager
def existing(url: str) -> Iterator[Ledger | None]:
    """The ledger at an address, to read it; None where there is none, and none is made. Raises PropensityError."""
    with connected(url) as engine:
        file = file_of(engine)
        if file is not None and not file.exists():
            yield None
            return
        is_there = is_prepared(engine)
        if is_there:
            prepare(engine)
        yield Ledger(engine) if is_there else None
