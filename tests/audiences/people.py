"""Wanted people in memory, for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from audiences.destinations.protocol import Person, Purpose
from audiences.wanted import Candidate


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def person(number: int, emails: int = 1, phones: int = 0) -> Person:
    """Somebody with so many addresses and numbers, and an address of which Google is not told."""
    identifiers = {
        "google.email": tuple(sorted(hashed(f"{number}-{one}@example.com") for one in range(emails))),
        "google.phone": tuple(sorted(hashed(f"+1555{number:07}{one}") for one in range(phones))),
        "meta.email": (hashed(f"meta {number}"),),
    }
    return Person(key_of(f"visitor-{number}"), {form: values for form, values in identifiers.items() if values})


def identifiers(fields: Mapping[str, str], *people: Person) -> set[tuple[str, str]]:
    """All that there is of people, under the names that a platform gives the forms."""
    return {(fields[form], value) for one in people for form in fields for value in one.identifiers.get(form, ())}


@dataclass
class Somebody:
    """A visitor."""

    name: str
    email: str = ""
    allowed: bool = True
    segment: str = "warm_prospects"
    rules: str = "1"

    @property
    def candidate(self) -> Candidate:
        identifiers = {"google.email": (hashed(self.email or f"{self.name}@example.com"),), "external_id": (self.name,)}
        return Candidate(Person(key_of(self.name), identifiers, {"segment": self.segment}), self.rules, self.allowed)


@dataclass
class People:
    """Audiences by name, all of them going to all destinations in `to`."""

    lists: dict[str, dict[str, Somebody]] = field(default_factory=dict)
    to: Sequence[str] = ("ours",)
    least: int = 1
    gone: list[str] = field(default_factory=list)

    def want(self, audience: str, *people: Somebody) -> None:
        self.lists.setdefault(audience, {}).update({one.name: one for one in people})

    def audiences(self) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(self.lists, self.to)

    def minimum(self, audience: str) -> int:
        return self.least

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        return (one.candidate for one in self.lists[audience].values())

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        return set(keys) & {key_of(name) for name in self.gone}
