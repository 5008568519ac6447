"""What the service holds of events that it receives in the order of time: a slow and obvious oracle of joins.

Events are read by `service.ingest` and `service.door`; whose they are is told by the pure parts of `service.joining`,
called as `Persons.join` and `Visitors.settle` call them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from service import door, ingest, joining
from service.door import Door
from service.ingest import Accepted, Catalogue, Ignored
from service.joining import Login

DOOR = Door.of(None, None)


class Held(NamedTuple):
    """An event, what it left, and under which id it was sent."""

    event: Mapping[str, Any]
    outcome: Accepted | Ignored
    sent_as: str


class Visitors:
    """Who there is after some events, and what each has."""

    def __init__(self) -> None:
        self.held: defaultdict[str, list[Held]] = defaultdict(list)
        self.logins: dict[str, tuple[Login, ...]] = {}
        self.joined: defaultdict[str, set[str]] = defaultdict(set)

    def owner(self, visitor_id: str) -> str:
        """Who is asked for when this one is."""
        logins = self.logins.get(visitor_id)
        return logins[-1].visitor_id if logins else visitor_id

    def receive(self, one: Held, ts_ms: int) -> None:
        """Take one event."""
        login = one.outcome.login if isinstance(one.outcome, Accepted) else None
        if login is not None:
            self._join(*login)
        logins = self.logins.get(one.sent_as)
        self.held[joining.owner_at(logins, ts_ms) if logins else one.sent_as].append(one)

    def _join(self, anonymous: str, login: Login) -> None:
        owner, known = self.owner(login.visitor_id), self.logins.get(anonymous, ())
        if owner == anonymous or (known and joining.owner_at(known, login.ts_ms) == owner):
            return
        is_full = anonymous not in self.joined[owner] and len(self.joined[owner]) >= joining.MOST_JOINED
        if is_full or self.joined[anonymous]:
            return
        self.joined[owner].add(anonymous)
        self.logins[anonymous] = joining.with_login(known, Login(login.ts_ms, owner))
        self.held[owner] += self.held.pop(anonymous, [])


def after(catalogue: Catalogue, sent: Iterable[Mapping[str, Any]], until_ms: int, received_ms: int) -> Visitors:
    """The visitors once everything up to a moment was received."""
    visitors = Visitors()
    for ts_ms, one in _in_order(catalogue, sent, received_ms):
        if ts_ms <= until_ms:
            visitors.receive(one, ts_ms)
    return visitors


def moments(
    catalogue: Catalogue, sent: Iterable[Mapping[str, Any]], received_ms: int
) -> Iterator[tuple[int, list[Held], Visitors]]:
    """Each millisecond with events, these, and the visitors after them."""
    visitors = Visitors()
    for ts_ms, together in groupby(_in_order(catalogue, sent, received_ms), itemgetter(0)):
        received = [one for _, one in together]
        for one in received:
            visitors.receive(one, ts_ms)
        yield ts_ms, received, visitors


def _in_order(catalogue: Catalogue, sent: Iterable[Mapping[str, Any]], received_ms: int) -> Iterator[tuple[int, Held]]:
    """Sound events by time; of a millisecond the logins come first."""
    taken = []
    for event in sent:
        outcome = ingest.parse(catalogue, event, received_ms)
        if isinstance(outcome, Accepted | Ignored) and event.get("timestamp") is not None:
            told = door.take(DOOR, event, outcome, received_ms, lambda what, became: None)
            login = told.login if isinstance(told, Accepted) else None
            ts_ms = ingest.timestamp_ms(event["timestamp"], received_ms)
            taken.append((ts_ms, login is None, login or (), Held(event, told, ingest.visitor_of(event))))
    for ts_ms, _, _, one in sorted(taken, key=lambda item: item[:3]):
        yield ts_ms, one
