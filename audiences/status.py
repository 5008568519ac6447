"""What the ledger knows of destinations, for people: what each has of each audience, and how the last runs ended.

No visitor's id and no key is in it, only counts. A platform's words may name somebody, so what has a digit or an @ is
left out of them, numbers up to 999 aside. So the same reason for different people is one reason, too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from audiences.destinations.registry import File
from audiences.leases import described
from audiences.ledger import INTENDED, WORKING, Ledger, is_held, is_refused
from audiences.tables import batches, lists, members, runs
from service.core.errors import PropensityError

RUNS: Final = 10
REASONS: Final = 3
UNTOLD: Final = "(no words)"
_WORD: Final = re.compile(r"[^\s,;:()\"']*[\d@][^\s,;:()\"']*")
_SMALL: Final = re.compile(r"\d{1,3}\.?")


class Reason(NamedTuple):
    """Why members are refused, in the platform's words without what names somebody."""

    words: str
    members: int


class Pile(NamedTuple):
    """Batches in one state, and how many members they are of."""

    batches: int = 0
    members: int = 0


class State(NamedTuple):
    """What a destination has of an audience."""

    destination: str
    audience: str
    has: int  # people that it may have
    synced_ms: int | None  # when it was last in step, if ever
    refused: int  # whom it did not take, or did not remove
    reasons: Sequence[Reason]  # the commonest ones
    unknown: Pile  # without an answer; the next run asks again
    working: Pile  # that the platform works off

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        nested = {"reasons": [one._asdict() for one in self.reasons]}
        return self._asdict() | nested | {"unknown": self.unknown._asdict(), "working": self.working._asdict()}


class Run(NamedTuple):
    """A synchronisation as it went."""

    destination: str
    audience: str | None  # none: all of them
    holder: str  # in words
    started_ms: int
    ended_ms: int | None
    result: str | None
    under_way: bool  # it has no end, and its lease is held


class Checked(NamedTuple):
    """Whether a destination lets us in; none where that cannot be tried without sending somebody."""

    destination: str
    works: bool | None
    words: str


def states(ledger: Ledger, audience: str | None = None, destination: str | None = None) -> list[State]:
    """What destinations have of audiences, by their names."""
    wanted = sa.select(lists.c.id, lists.c.destination, lists.c.audience, lists.c.synced_ms)
    for column, name in (lists.c.audience, audience), (lists.c.destination, destination):
        wanted = wanted if name is None else wanted.where(column == name)
    with ledger.reading.connect() as connection:
        found = connection.execute(wanted.order_by(lists.c.destination, lists.c.audience)).all()
        own = [row.id for row in found]
        has = _sizes(connection, members.c.list.in_(own) & is_held())
        reasons = _reasons(connection, own)
        piles = _piles(connection, own)
    return [
        State(
            destination=row.destination,
            audience=row.audience,
            has=has.get(row.id, 0),
            synced_ms=row.synced_ms,
            refused=reasons[row.id].total(),
            reasons=_commonest(reasons[row.id]),
            unknown=piles.get((row.id, INTENDED), Pile()),
            working=piles.get((row.id, WORKING), Pile()),
        )
        for row in found
    ]


def last_runs(
    ledger: Ledger, now_ms: int, audience: str | None = None, destination: str | None = None, count: int = RUNS
) -> list[Run]:
    """The last runs, the latest first; with an audience named those of all audiences too."""
    wanted = sa.select(runs).order_by(runs.c.id.desc()).limit(count)
    if destination is not None:
        wanted = wanted.where(runs.c.destination == destination)
    if audience is not None:
        wanted = wanted.where((runs.c.audience == audience) | runs.c.audience.is_(None))
    holders = ledger.leases.holders(now_ms)
    with ledger.reading.connect() as connection:
        found = connection.execute(wanted).all()
    return [
        Run(
            destination=row.destination,
            audience=row.audience,
            holder=described(row.holder),
            started_ms=row.started_ms,
            ended_ms=row.ended_ms,
            result=row.result,
            under_way=row.ended_ms is None and holders.get(row.destination) == row.holder,
        )
        for row in found
    ]


def check(file: File, name: str) -> Checked:
    """Build a destination of the file and ask it whether it lets us in. Nobody is sent, and nothing is tried again."""
    try:
        built = file.destination(name).build()
        ask = getattr(built, "check", None)
        if ask is None:
            return Checked(name, None, "cannot be tried without sending somebody; what the file says of it is right")
        return Checked(name, True, ask())
    except PropensityError as error:
        return Checked(name, False, str(error))


def anonymous(words: str) -> str:
    """A platform's words without those that may name a person, a job or a request."""
    return _WORD.sub(lambda found: found[0] if _SMALL.fullmatch(found[0]) else "…", words)


def _commonest(reasons: Counter[str]) -> list[Reason]:
    ordered = sorted(reasons.items(), key=lambda one: (-one[1], one[0]))
    return [Reason(*one) for one in ordered[:REASONS]]


def _sizes(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> Mapping[int, int]:
    counted = sa.select(members.c.list, sa.func.count()).where(wanted).group_by(members.c.list)
    return {row[0]: row[1] for row in connection.execute(counted)}


def _reasons(connection: sa.Connection, own: Sequence[int]) -> Mapping[int, Counter[str]]:
    counted = sa.select(members.c.list, members.c.answer, sa.func.count())
    counted = counted.where(members.c.list.in_(own) & is_refused()).group_by(members.c.list, members.c.answer)
    found: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for list_, answer, count in connection.execute(counted):
        found[list_][anonymous(answer) if answer else UNTOLD] += count
    return found


def _piles(connection: sa.Connection, own: Sequence[int]) -> Mapping[tuple[int, str], Pile]:
    people = sa.func.sum(sa.func.coalesce(batches.c.accepted, batches.c.members))
    counted = sa.select(batches.c.list, batches.c.state, sa.func.count(), people)
    open_ = batches.c.list.in_(own) & batches.c.state.in_((INTENDED, WORKING))
    found = connection.execute(counted.where(open_).group_by(batches.c.list, batches.c.state))
    return {(list_, state): Pile(count, int(sum_)) for list_, state, count, sum_ in found}
