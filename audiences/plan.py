"""A plan: the steps from what a destination has, by the ledger, to what it should have. Pure.

Both come in the order of keys and are read once, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from audiences.destinations.protocol import KEY, Person
from audiences.identifiers import Identifiers, without
from audiences.ledger import Known
from audiences.stage import Staged, difference

# Why a member is sent.
ENTERED: Final = "entered"
LEFT: Final = "left"  # the audience; of who was erased it is ledger.ERASED
CONSENT: Final = "consent"  # not given, or withdrawn
UNKNOWN: Final = "unknown"  # what came of the last request
IDENTIFIERS: Final = "identifiers"
FIELDS: Final = "fields"
RULES: Final = "rules"
AGAIN: Final = "again"  # refused or failed, though not for good
RENEW: Final = "renew"  # the destination would forget them
DELETED: Final = "deleted"  # the audience
MINIMUM: Final = "minimum"  # more people than there are

NOBODY: Final[Identifiers] = {}

# Shares of the time that a destination keeps a member: from the first on members are renewed, each at a moment of their
# own, and after the second at once.
EARLY: Final = 0.7
LATE: Final = 0.9


class Age(NamedTuple):
    """What says whether somebody is sent again although nothing changed."""

    now_ms: int
    keeps_ms: int | None = None  # the time that the destination keeps a member; none: for ever
    renewals: int = 0  # members that are renewed at most, but for those who are late


class Removal(NamedTuple):
    """Identifiers that are to go; `stays` who is a member with others."""

    known: Known
    identifiers: Identifiers
    why: str
    stays: bool


class Addition(NamedTuple):
    """A member that is to be sent."""

    known: Known
    person: Person
    mark: bytes
    why: str


class Unsent(NamedTuple):
    """A member about whom nothing is to be sent: `refused` before and unchanged since, else in step."""

    known: Known
    refused: bool


class Trace(NamedTuple):
    """A row of the ledger about somebody of whom the platform has nothing, and who is not wanted."""

    known: Known


Step = Removal | Addition | Unsent | Trace


def steps(known: Iterable[Known], wanted: Iterable[Staged], why_left: str, age: Age) -> Iterator[Step]:
    """What is to be done, in the order of keys; of who has other identifiers than before the removal comes first.

    Both arguments ascend by key. `why_left` is said of members who are wanted no more.
    """
    have, want = iter(known), iter(wanted)
    row, member = next(have, None), next(want, None)
    renewed = 0
    while row is not None or member is not None:
        if member is None or (row is not None and row.key < member.key):
            assert row is not None
            yield _unwanted(row, why_left)
            row = next(have, None)
            continue
        own = row if row is not None and row.key == member.key else None
        if member.person is not None:
            for step in _member(own, member.key, member.person, member.mark, age, renewed < age.renewals):
                renewed += isinstance(step, Addition) and step.why == RENEW
                yield step
        elif own is not None:
            yield _unwanted(own, CONSENT)
        member = next(want, None)
        if own is not None:
            row = next(have, None)


def taken(known: Iterable[Known], wanted: Iterable[Staged]) -> Iterator[Person]:
    """Everybody who is wanted and whom the destination has as wanted."""
    have = iter(known)
    row = next(have, None)
    for member in wanted:
        while row is not None and row.key < member.key:
            row = next(have, None)
        if row is not None and row.key == member.key and member.person is not None and row.has == member.mark:
            yield member.person


def _unwanted(row: Known, why: str) -> Step:
    if row.identifiers:
        return Removal(row, row.identifiers, why, stays=False)
    return Trace(row)


def _member(row: Known | None, key: bytes, person: Person, mark: bytes, age: Age, may_renew: bool) -> Iterator[Step]:
    known = row or Known(key, None, None, None, NOBODY)
    dropped = NOBODY if KEY in person.identifiers else without(known.identifiers, person.identifiers)
    why = ENTERED if row is None else _why(row, mark)
    if dropped:
        yield Removal(known, dropped, why, stays=True)
    if known.open is None and mark == known.refused:
        again = known.due_ms is not None and known.due_ms <= age.now_ms
        yield Addition(known, person, mark, AGAIN) if again else Unsent(known, refused=True)
    elif known.open is None and mark == known.has and not dropped:
        renews = _renews(known, age, may_renew)
        yield Addition(known, person, mark, RENEW) if renews else Unsent(known, refused=False)
    else:
        yield Addition(known, person, mark, why)


def _renews(known: Known, age: Age, may_renew: bool) -> bool:
    """Whether it is time to send a member again; the moments of members are spread by their keys, which are hashes."""
    if age.keeps_ms is None:
        return False
    share = (age.now_ms - known.changed_ms) / age.keeps_ms
    place = int.from_bytes(known.key[:4], "big") / 2**32
    return share >= LATE or (may_renew and share >= EARLY + (LATE - EARLY) * place)


def _why(row: Known, mark: bytes) -> str:
    if row.open is not None:
        return UNKNOWN
    before = row.has or row.refused
    return difference(before, mark) if before is not None and before != mark else IDENTIFIERS
