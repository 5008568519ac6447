"""The circuit breaker, step by step."""

from __future__ import annotations

import pytest

from service.breaker import Breaker, State


@pytest.fixture
def seen() -> list[State]:
    return []


@pytest.fixture
def breaker(seen: list[State]) -> Breaker:
    return Breaker(3, seen.append)


def opened(breaker: Breaker) -> Breaker:
    for _ in range(3):
        breaker.failed()
    return breaker


def test_it_starts_closed_and_says_so(breaker: Breaker, seen: list[State]) -> None:
    assert breaker.is_closed
    assert seen == [State.CLOSED]


def test_failures_in_a_row_open_it(breaker: Breaker, seen: list[State]) -> None:
    breaker.failed()
    breaker.failed()
    assert breaker.is_closed
    breaker.failed()
    assert not breaker.is_closed
    assert seen == [State.CLOSED, State.OPEN]


def test_a_success_between_failures_keeps_it_closed(breaker: Breaker) -> None:
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.is_closed


def test_a_trial_that_succeeds_closes_it_and_failures_are_counted_anew(breaker: Breaker, seen: list[State]) -> None:
    opened(breaker).try_again()
    assert not breaker.is_closed
    breaker.succeeded()
    breaker.failed()
    assert breaker.is_closed
    assert seen == [State.CLOSED, State.OPEN, State.HALF_OPEN, State.CLOSED]


def test_a_trial_that_fails_opens_it_at_once(breaker: Breaker, seen: list[State]) -> None:
    opened(breaker).try_again()
    breaker.failed()
    assert breaker.state is State.OPEN
    assert seen[-2:] == [State.HALF_OPEN, State.OPEN]


def test_an_answer_that_comes_late_does_not_close_it(breaker: Breaker) -> None:
    opened(breaker).succeeded()
    assert breaker.state is State.OPEN
