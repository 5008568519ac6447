"""What every fault must leave alone: an answer for everybody, in time, with nobody else's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from tests.faults.traffic import Answer

DEADLINE_MS: Final = 50
# Beyond the deadline: the score itself, the way there and back, timers that count whole milliseconds.
LATENESS_MS: Final = 20
# A machine that keeps the processes waiting more often than that is not one to measure on.
MOST_STALLED: Final = 0.02


def undisturbed(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that no stall of the machine touched. The test is skipped if these are too few to say anything."""
    kept = [answer for answer in answers if not answer.is_stalled]
    stalled = 1 - len(kept) / len(answers)
    if stalled > MOST_STALLED:
        pytest.skip(f"the machine held up {stalled:.1%} of the requests; try again when it is idle")
    return kept


def assert_all_answered_in_time(answers: Sequence[Answer]) -> float:
    """Everybody got a 200 within the deadline and the lateness. Returns the longest latency, in milliseconds."""
    others = [(answer.number, answer.status, answer.raw[:200]) for answer in answers if answer.status != 200]
    assert not others, others[:5]
    longest = max(undisturbed(answers), key=lambda answer: answer.latency_ms)
    assert longest.latency_ms <= DEADLINE_MS + LATENESS_MS, (longest.number, longest.at_s, longest.latency_ms)
    return longest.latency_ms


def assert_degraded(answers: Sequence[Answer]) -> None:
    """All were scored without the feature cache and say so."""
    assert answers
    others = [(answer.at_s, answer.degraded) for answer in answers if answer.degraded != ["store"]]
    assert not others, others[:5]


def assert_sound(answers: Sequence[Answer]) -> None:
    """Nothing was missing."""
    assert answers
    others = [(answer.at_s, answer.latency_ms, answer.degraded) for answer in undisturbed(answers) if answer.degraded]
    assert not others, (len(others), others[:5])
