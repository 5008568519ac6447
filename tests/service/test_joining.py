"""The head of a joined visitor's values gives back what it was made of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from service import consent, joining
from service.core import events
from service.joining import Linked, Login


@settings(max_examples=30)
@given(
    some.lists(some.tuples(some.integers(0, 2**53), some.text(min_size=1, max_size=256)), min_size=1, max_size=8),
    some.binary(max_size=200),
)
def test_a_head_gives_back_its_logins_and_what_stands_behind_it(logins: list[tuple[int, str]], tail: bytes) -> None:
    given_logins = tuple(Login(*login) for login in logins)
    head = joining.head(given_logins)
    assert joining.split(head + tail) == Linked(head, given_logins, tail)
    assert len(head) % events.RECORD_BYTES == len(head) % consent.RECORD_BYTES == 1
    assert joining.owners([head + tail, None, b"", None, tail, tail]) == {0: logins[-1][1]}


EVENT = events.pack(1, 1, 1, 1, 1.0)


@pytest.mark.parametrize("value", [None, b"", EVENT, joining.MAGIC, joining.MAGIC + b"\x02\0[]", b"x" * 100])
def test_what_is_no_head_is_none(value: bytes | None) -> None:
    assert joining.split(value) is None


def test_an_event_is_of_who_logged_in_last_before_it_and_before_the_first_login_of_the_first() -> None:
    logins: tuple[Login, ...] = ()
    for login in (Login(10, "ann"), Login(30, "bob"), Login(20, "ann"), Login(40, "ann"), Login(5, "ann")):
        logins = joining.with_login(logins, login)
    assert logins == (Login(10, "ann"), Login(30, "bob"), Login(40, "ann"))
    owners = [joining.owner_at(logins, ts_ms) for ts_ms in (0, 10, 29, 30, 39, 40, 99)]
    assert owners == ["ann", "ann", "ann", "bob", "bob", "ann", "ann"]


def test_logins_are_bounded() -> None:
    logins: tuple[Login, ...] = ()
    for moment in range(100):
        logins = joining.with_login(logins, Login(moment, f"u-{moment}"))
    assert len(logins) == joining.MOST_LOGINS
    assert logins[-1] == Login(99, "u-99")
