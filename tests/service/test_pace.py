"""Owns the promise that groups stay short and queues no longer than what can be answered in time."""

from __future__ import annotations

import pytest

from service.pace import GROUP, GROUP_S, Pace

DEADLINE_S = 0.05


def after(cost_s: float, groups: int = 50) -> Pace:
    """The pace of a process that has scored full groups of visitors who cost so much each."""
    pace = Pace()
    for _ in range(groups):
        pace.learn(pace.group, pace.group * cost_s)
    return pace


@pytest.mark.parametrize("cost_s", [1e-6, 3e-5, 1e-4, 1e-3, 0.1])
def test_a_group_is_as_large_as_what_is_scored_in_a_few_milliseconds(cost_s: float) -> None:
    group = after(cost_s).group
    assert 1 <= group <= GROUP
    assert group == 1 or group * cost_s <= GROUP_S * 1.01
    assert group == GROUP or (group + 1) * cost_s > GROUP_S * 0.99


@pytest.mark.parametrize("cost_s", [3e-5, 1e-3, 0.01])
def test_who_stands_behind_more_than_half_of_its_time_is_not_in_time(cost_s: float) -> None:
    pace, behind = after(cost_s), DEADLINE_S / 2 / cost_s
    assert pace.is_in_time(int(behind * 0.99), DEADLINE_S)
    assert not pace.is_in_time(int(behind * 1.01) + 1, DEADLINE_S)
    assert pace.is_in_time(0, 0.001)


def test_a_costly_model_is_known_after_a_few_groups() -> None:
    assert after(1e-3, groups=12).cost_s == pytest.approx(1e-3)


def test_a_machine_that_was_held_up_once_makes_nobody_wait_outside() -> None:
    pace = after(3e-5)
    pace.learn(10, 0.2)
    assert pace.cost_s < 5e-5
    for _ in range(20):
        pace.learn(50, 50 * 3e-5)
    assert pace.cost_s == pytest.approx(3e-5, rel=0.02)


def test_what_every_group_costs_is_not_taken_for_what_a_visitor_costs() -> None:
    pace = after(3e-5)
    for _ in range(100):
        pace.learn(1, 2e-4)
    assert pace.cost_s == pytest.approx(3e-5)


def test_a_cost_that_was_believed_too_high_is_corrected_by_single_scores_too() -> None:
    pace = after(3e-5)
    for _ in range(10):
        pace.learn(64, 0.5)
    for _ in range(40):
        pace.learn(1, 2e-4)
    assert pace.cost_s == pytest.approx(2e-4, rel=0.05)
