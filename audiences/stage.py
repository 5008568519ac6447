"""A stage: everybody who should be on one list, on disk in the order of their keys, for one run.

An audience has millions of members and comes in the order of its shards; the ledger is read in the order of keys. A
nameless file of SQLite (in SQLITE_TMPDIR or TMPDIR) sorts them in bounded memory, and is gone with the process however
that ends.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Final, NamedTuple

import msgspec

from audiences.destinations.protocol import KEY, Person
from audiences.identifiers import Identifiers
from audiences.wanted import Candidate

ROWS_AT_ONCE: Final = 10_000
PART: Final = 8  # bytes of each part of a mark


class Staged(NamedTuple):
    """A wanted member: the mark of all that is sent, by which a change is told."""

    key: bytes
    mark: bytes
    person: Person | None  # none: not allowed


def mark(person: Person, rules: str) -> bytes:
    """24 bytes: 8 each of the digests of identifiers, fields and rules. Any change of one changes its part."""
    parts = (sorted(person.identifiers.items()), sorted(person.fields.items()), rules)
    return b"".join(hashlib.blake2b(msgspec.msgpack.encode(part), digest_size=PART).digest() for part in parts)


def difference(one: bytes, other: bytes) -> str:
    """What a change between two marks is called: identifiers, rules or fields."""
    for name, place in (("rules", 2), ("identifiers", 0)):
        if one[place * PART : (place + 1) * PART] != other[place * PART : (place + 1) * PART]:
            return name
    return "fields"


def _restricted(person: Person, forms: Sequence[str], fields: Sequence[str]) -> Person:
    """What a destination may know of a person: nothing that it does not keep."""
    identifiers = {form: person.identifiers[form] for form in forms if person.identifiers.get(form)}
    if KEY in forms:
        identifiers[KEY] = (person.key,)
    return Person(person.key, identifiers, {name: person.fields[name] for name in fields if name in person.fields})


def _digests(identifiers: Identifiers) -> list[tuple[str, str, bytes]]:
    return [
        (form, value, hashlib.blake2b(f"{form}\0{value}".encode(), digest_size=12).digest())
        for form, values in identifiers.items()
        if form != KEY
        for value in values
    ]


class Stage:
    """The wanted members of one list. `held` says which identifiers are theirs."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("", isolation_level=None)
        for line in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-32768", "temp_store=FILE"):
            self._file.execute(f"PRAGMA {line}")
        self._file.execute("CREATE TABLE came (place INTEGER PRIMARY KEY, key BLOB, mark BLOB, body BLOB)")
        self._file.execute("CREATE TABLE wanted (key BLOB PRIMARY KEY, mark BLOB, body BLOB) WITHOUT ROWID")
        self._file.execute("CREATE TABLE held (identifier BLOB)")
        self._indexed = False
        self.allowed = 0  # who agreed and can be named
        self.refusing = 0  # who did not agree

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fill(self, candidates: Iterable[Candidate], forms: Sequence[str], fields: Sequence[str]) -> None:
        """Take everybody who is wanted; who cannot be named in one of the forms is left out."""
        source = iter(candidates)
        while chunk := list(islice(source, ROWS_AT_ONCE)):
            rows: list[tuple[bytes, bytes, bytes | None]] = []
            held: list[tuple[bytes]] = []
            for one in chunk:
                person = _restricted(one.person, forms, fields)
                if not one.allowed:
                    rows.append((bytes.fromhex(person.key), b"", None))
                elif person.identifiers:
                    body = msgspec.msgpack.encode((person.identifiers, person.fields))
                    rows.append((bytes.fromhex(person.key), mark(person, one.rules), body))
                    held.extend((digest,) for _, _, digest in _digests(person.identifiers))
            self._file.execute("BEGIN")
            self._file.executemany("INSERT INTO came (key, mark, body) VALUES (?, ?, ?)", rows)
            self._file.executemany("INSERT INTO held VALUES (?)", held)
            self._file.execute("COMMIT")
        # In the order of keys a table is written, and later read, from its beginning to its end.
        self._file.execute("INSERT OR REPLACE INTO wanted SELECT key, mark, body FROM came ORDER BY key, place")
        self._file.execute("DROP TABLE came")
        counted = "SELECT count(body), count(*) - count(body) FROM wanted"
        self.allowed, self.refusing = self._file.execute(counted).fetchone()

    def clear(self) -> None:
        """Want nobody."""
        self._file.execute("DELETE FROM wanted")
        self._file.execute("DELETE FROM held")
        self._indexed = False

    def members_in_order(self) -> Iterator[Staged]:
        """Everybody once, in the order of keys."""
        for key, mark, body in self._file.execute("SELECT key, mark, body FROM wanted ORDER BY key"):
            yield _staged(key, mark, body)

    def held(self, people: Iterable[Identifiers]) -> set[tuple[str, str]]:
        """Those of the identifiers, as (form, value), that somebody who is wanted has."""
        if not self._indexed:
            self._file.execute("CREATE INDEX IF NOT EXISTS by_identifier ON held (identifier)")
            self._indexed = True
        found: set[tuple[str, str]] = set()
        for identifiers in people:
            for form, value, digest in _digests(identifiers):
                if self._file.execute("SELECT 1 FROM held WHERE identifier = ? LIMIT 1", (digest,)).fetchone():
                    found.add((form, value))
        return found


def _staged(key: bytes, mark: bytes, body: bytes | None) -> Staged:
    if body is None:
        return Staged(key, mark, None)
    identifiers, fields = msgspec.msgpack.decode(body)
    named: dict[str, Any] = {form: tuple(values) for form, values in identifiers.items()}
    return Staged(key, mark, Person(key.hex(), named, fields))
