"""Measures the synchronisation of a million members: time and memory, with a destination that takes everything at once.

    make bench-sync

What is measured is all that is ours: staging, comparing, and the ledger. The platform's own time comes on top.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from audiences import ledger, sync
from audiences.destinations.protocol import Limits, Outcome, Person, Purpose
from audiences.destinations.registry import Sending
from audiences.wanted import Candidate

MEMBERS: Final = 1_000_000


class Everything:
    """A destination that takes everybody, ten thousand a request."""

    name = "everything"
    purpose = Purpose.ADS
    limits = Limits(10_000, 10**9, 60)
    forms: tuple[str, ...] = ("google.email", "google.phone")
    fields: tuple[str, ...] = ("segment",)

    def open(self, audience: str) -> str:
        """The list is called like the audience."""
        return audience

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Taken."""
        return [Outcome(True, "ok")] * len(people)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Removed."""
        return [Outcome(True, "ok")] * len(people)


class Crowd:
    """Wanted people: `count` of them; the first `changed` are in another segment, the last `left` are gone."""

    def __init__(self, count: int, changed: int = 0, left: int = 0) -> None:
        self.count, self.changed, self.left = count, changed, left

    def audiences(self) -> Mapping[str, Sequence[str]]:
        """One."""
        return {"everybody": ("everything",)}

    def minimum(self, audience: str) -> int:
        """One person."""
        return 1

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        """Nobody."""
        return ()

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        """Everybody, hashed as they would come."""
        for number in range(self.count - self.left):
            key = hashlib.sha256(f"visitor-{number}".encode()).hexdigest()
            email = hashlib.sha256(f"visitor-{number}@example.com".encode()).hexdigest()
            phone = hashlib.sha256(f"+49301{number:08}".encode()).hexdigest()
            segment = "champions" if number < self.changed else "nurture"
            person = Person(key, {"google.email": (email,), "google.phone": (phone,)}, {"segment": segment})
            yield Candidate(person, "1", True)


def main() -> None:
    """Print a line for each of three runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", type=int, default=MEMBERS)
    parser.add_argument("--ledger", help="Address of a PostgreSQL, instead of SQLite.")
    given = parser.parse_args()
    percent = given.members // 100
    with tempfile.TemporaryDirectory(prefix="propensity-") as directory:
        path = Path(directory) / "ledger.db"
        with ledger.opened(given.ledger or f"sqlite:///{path}") as opened:
            for said, crowd in (
                ("first: everybody is added", Crowd(given.members)),
                ("again: nothing has changed", Crowd(given.members)),
                ("1 % have changed, 1 % have left", Crowd(given.members, percent, percent)),
            ):
                began = time.monotonic()
                [counts] = sync.run(opened, Everything(), crowd, Sending())
                seconds = time.monotonic() - began
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(
                    f"{said}: {counts.added:,} added, {counts.removed:,} removed, {counts.unchanged:,} unchanged, "
                    f"{seconds:.1f} s, at most {peak:,.0f} MiB of memory so far"
                )
        if not given.ledger:
            print(f"the ledger takes {path.stat().st_size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
