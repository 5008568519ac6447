"""Wanted people: who should be on an audience's list, and what a destination of some purpose may know of them.

`Wanted` is what the synchronisation asks; `audiences/live.py` answers it from the service's data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from audiences.destinations.protocol import Person, Purpose


class Candidate(NamedTuple):
    """A member of an audience, with what may be said of them."""

    person: Person
    rules: str  # version of the rules by which the identifiers were normalised and hashed
    allowed: bool  # whether they agreed to the purpose; who did not is never sent, and removed where they were


class Wanted(Protocol):
    """Who should be where."""

    def audiences(self) -> Mapping[str, Sequence[str]]:
        """The audiences that are defined, and to which destinations each of them goes."""

    def minimum(self, audience: str) -> int:
        """The fewest people that a list of the audience may have."""

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        """All members in any order, some held in memory at a time; one that comes twice counts as it came last."""

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        """Those of the keys whose visitors were erased, as far as that is remembered."""
