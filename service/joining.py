"""What stands under the keys of an anonymous visitor who turned out to be a known one. Pure.

All three values of such a visitor - events, traits, what was said - begin with the same *head*: MAGIC, the length of
the text that follows in two bytes, and that text, JSON `[[ts_ms, "ID"], ...]`: the logins, who was known from which
moment on. What is appended later stands behind the head until it has been moved to its owner; see `Visitors.settle`.

The head is one byte longer than whole records of either size, so that the length of the value, which APPEND returns,
tells that there is one. Its 22nd byte is the high byte of a kind that no event has, which is looked at anyway when a
history is read. So visitors who were never joined cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

MAGIC: Final = b"propensity:joined:v1\xfd\xff"
# Of devices that are shared; older logins are forgotten, what was moved for them stays where it is.
MOST_LOGINS: Final = 8
# Anonymous visitors who are joined into one; beyond that somebody logs in a machine, or every visitor.
MOST_JOINED: Final = 256

_STEP: Final = 48  # a multiple of the sizes of all records
_TEXT_AT: Final = len(MAGIC) + 2


class Login(NamedTuple):
    """Who an anonymous visitor was known as from a moment on, in Unix milliseconds."""

    ts_ms: int
    visitor_id: str


class Linked(NamedTuple):
    """A value that begins with a head: the head, its logins in the order of time, and what stands behind it."""

    head: bytes
    logins: tuple[Login, ...]
    tail: bytes

    @property
    def owner(self) -> str:
        """Who is asked for when the anonymous visitor is."""
        return self.logins[-1].visitor_id


def is_linked(value: object) -> bool:
    """Whether a value begins with a head."""
    return type(value) is bytes and value.startswith(MAGIC)


def split(value: bytes | None) -> Linked | None:
    """The parts of a value that begins with a head; None for any other."""
    if value is None or not value.startswith(MAGIC):
        return None
    size = int.from_bytes(value[len(MAGIC) : _TEXT_AT], "little")
    end = _padded(_TEXT_AT + size)
    try:
        logins = tuple(Login(int(ts_ms), str(name)) for ts_ms, name in json.loads(value[_TEXT_AT : _TEXT_AT + size]))
    except (ValueError, TypeError):  # not by us; it reads as records that are broken
        return None
    return Linked(value[:end], logins, value[end:]) if logins else None


def owners(values: Sequence[object]) -> dict[int, str]:
    """By the place of each visitor who was joined into another, that other one; from events and traits in turn."""
    for value in values[::2]:
        if type(value) is bytes and value.startswith(MAGIC):
            break
    else:  # nearly always, and half the time of what follows
        return {}
    return {
        place: linked.owner
        for place, value in enumerate(values[::2])
        if type(value) is bytes and value.startswith(MAGIC) and (linked := split(value)) is not None
    }


def head(logins: Sequence[Login]) -> bytes:
    """The head that says these logins, which are in the order of time."""
    text = json.dumps(logins, separators=(",", ":")).encode()
    return (MAGIC + len(text).to_bytes(2, "little") + text).ljust(_padded(_TEXT_AT + len(text)), b"\0")


def _padded(size: int) -> int:
    return -(-(size - 1) // _STEP) * _STEP + 1


def owner_at(logins: Sequence[Login], ts_ms: int) -> str:
    """Whose an event of a moment is: of who logged in last before it, or else of the first who did."""
    past = [login for login in logins if login.ts_ms <= ts_ms]
    return (past[-1] if past else logins[0]).visitor_id


def with_login(logins: Sequence[Login], login: Login) -> tuple[Login, ...]:
    """The logins and one more; unchanged where that changes nobody's owner."""
    if logins and owner_at(logins, login.ts_ms) == login.visitor_id:
        return tuple(logins)
    return tuple(sorted([*logins, login]))[-MOST_LOGINS:]


def by_owner(logins: Sequence[Login], blob: bytes, size: int) -> Iterator[tuple[str, bytes]]:
    """The records of a blob, `size` bytes each, by whose they are. Each begins with its moment, i64."""
    if len(logins) == 1:
        yield logins[0].visitor_id, blob
        return
    parts: dict[str, list[bytes]] = {}
    for start in range(0, len(blob), size):
        record = blob[start : start + size]
        ts_ms = int.from_bytes(record[:8], "little", signed=True)
        parts.setdefault(owner_at(logins, ts_ms), []).append(record)
    for visitor_id, records in parts.items():
        yield visitor_id, b"".join(records)
