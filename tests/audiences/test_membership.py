"""Membership: thresholds, stays, ranks, facts and the hold-out, by examples and by properties."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiences import definitions, membership
from audiences.definitions import Audience
from audiences.membership import Decision, Previous, Why, decide
from audiences.population import Population, Said, drawn
from loadtest import prove_hysteresis

NOW = 1_790_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR


def audience(text: str, *, margin: float = 0.5, min_stay: str = "0", min_size: int = 1) -> Audience:
    defaults = f"{{model: m, margin: {margin}, min_stay: {min_stay}, min_size: {min_size}}}"
    return definitions.read(f"defaults: {defaults}\naudiences: {{a: {{{text}}}}}", "test").audiences["a"]


def population(
    scores: Sequence[float],
    features: Mapping[str, Sequence[float]] | None = None,
    last_event_ms: Sequence[int] | None = None,
    **others: Sequence[float],
) -> Population:
    """Visitors v0, v1, ... with scores of the model `m` and of others."""
    ids = [f"v{place}" for place in range(len(scores))]
    columns = {name: np.array(values, np.float32) for name, values in (features or {}).items()}
    models = {"m": Said(np.array(scores, np.float32), columns, dict.fromkeys(columns, {}))}
    models |= {name: Said(np.array(values, np.float32)) for name, values in others.items()}
    last = np.array(last_event_ms if last_event_ms is not None else [NOW] * len(ids), np.int64)
    return Population(pa.array(ids, pa.large_string()), drawn(ids), last, models)


def previous(*entered_ms: int, control_ms: Sequence[int] | None = None) -> Previous:
    entered = np.array(entered_ms, np.int64)
    return Previous(entered, np.array(control_ms, np.int64) if control_ms is not None else np.zeros_like(entered))


def names(decision: Decision) -> str:
    """The members as `0 2`."""
    return " ".join(map(str, np.flatnonzero(decision.entered_ms)))


def reasons(decision: Decision) -> list[str]:
    return [Why(code).text for code in decision.why]


# --- two thresholds ---


def test_one_enters_from_the_upper_threshold_and_leaves_below_the_lower() -> None:
    one = audience("cut: {enter: 0.2, leave: 0.1}")
    everyone = population([0.2, 0.1999, 0.1, 0.0999])
    assert names(decide(one, everyone, previous(0, 0, 0, 0), NOW)) == "0"
    decision = decide(one, everyone, previous(5, 5, 5, 5), NOW)
    assert names(decision) == "0 1 2"
    assert decision.entered_ms.tolist() == [5, 5, 5, 0]
    assert reasons(decision) == ["unchanged", "unchanged", "unchanged", "score"]


def test_a_margin_widens_a_cut_by_odds() -> None:
    leave, enter = audience("cut: 0.2", margin=1).cut.thresholds(1)  # type: ignore[union-attr]
    assert leave / (1 - leave) == pytest.approx(0.25 / 2)
    assert enter / (1 - enter) == pytest.approx(0.25 * 2)


def test_the_first_time_the_cut_counts_without_its_margin() -> None:
    everyone = population([0.21, 0.19])
    assert names(decide(audience("cut: 0.2"), everyone, membership.nobody(2), NOW)) == "0"
    assert names(decide(audience("cut: 0.2"), everyone, previous(0, 0), NOW)) == ""


def test_one_stays_for_the_minimum_stay_whatever_the_score_is() -> None:
    one = audience("cut: {enter: 0.2, leave: 0.1}", min_stay="2d")
    everyone = population([0.01, 0.01])
    assert names(decide(one, everyone, previous(NOW - 2 * DAY + 1, NOW - 2 * DAY), NOW)) == "0"


def test_the_scores_of_another_model_have_thresholds_too() -> None:
    one = audience("cut: {enter: 0.2, leave: 0.1}, scores: {churn: {below: 0.5}}", margin=1)
    everyone = population([0.5] * 4, churn=[0.33, 0.34, 0.66, 0.67])
    assert names(decide(one, everyone, previous(0, 0, 0, 0), NOW)) == "0"
    assert names(decide(one, everyone, previous(5, 5, 5, 5), NOW)) == "0 1 2"


def test_a_visitor_whom_a_model_does_not_know_is_left_out() -> None:
    one = audience("cut: 0.1, scores: {churn: {below: 0.5}}")
    everyone = population([0.5, 0.5, math.nan], churn=[0.1, math.nan, 0.1])
    decision = decide(one, everyone, previous(0, 5, 5), NOW)
    assert names(decision) == "0"
    assert reasons(decision) == ["qualifies", "condition", "condition"]


# --- segments ---


def segmented(places: Sequence[int], micro: Sequence[int] = (), micro_names: Any = ()) -> Population:
    everyone = population([0.5] * len(places))
    said = Said(
        everyone.models["m"].propensity,
        segment=np.array(places, np.int8),
        micro=np.array(micro, np.int16) if len(micro) else None,
        micro_names=micro_names,
    )
    return everyone.with_model("m", said)


def test_members_are_who_is_in_the_segments() -> None:
    everyone = segmented([0, 1, 2, 5, 0])
    assert (
        names(decide(audience("segment: [champions, low_priority]"), everyone, previous(0, 0, 7, 0, 0), NOW)) == "0 3 4"
    )


def test_members_are_who_is_in_the_micro_segments_of_the_segment() -> None:
    text = """
defaults: {model: m, min_size: 1}
segments: {m: {micro: {champions: {mobile: {f: 1}}, nurture: {mobile: {f: 1}}}}}
audiences: {a: {segment: champions, micro: mobile}, b: {segment: champions, micro: [rest]}}
"""
    both = definitions.read(text, "test").audiences
    micro_names = (("champions", "mobile"), ("champions", "rest"), ("nurture", "mobile"), ("nurture", "rest"))
    everyone = segmented([0, 0, 4, 4], [0, 1, 2, 3], micro_names)
    assert names(decide(both["a"], everyone, previous(0, 0, 0, 0), NOW)) == "0"
    assert names(decide(both["b"], everyone, previous(0, 0, 0, 0), NOW)) == "1"


# --- the best by rank ---


def test_the_best_are_chosen_and_of_equals_always_the_same() -> None:
    everyone = population([0.3, 0.5, 0.5, 0.1])
    assert names(decide(audience("top: 2"), everyone, membership.nobody(4), NOW)) == "1 2"
    tied = population([0.5] * 50)
    first = decide(audience("top: 10"), tied, membership.nobody(50), NOW)
    backwards = Population(tied.ids[::-1], tied.drawn[::-1], tied.last_event_ms, tied.models)
    again = decide(audience("top: 10"), backwards, membership.nobody(50), NOW)
    assert (first.entered_ms > 0).sum() == 10
    assert (first.entered_ms == again.entered_ms[::-1]).all()


def test_a_member_makes_room_only_beyond_the_margin_of_ranks() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    one = audience("top: 2", margin=1)
    # Rank 4 is within 2 * 2 and stays; rank 2 is beyond 2 / 2 and has to wait.
    assert names(decide(one, population(scores), previous(5, 0, 0, 5, 0, 0), NOW)) == "0 3"
    assert names(decide(one, population(scores), previous(5, 0, 0, 0, 5, 0), NOW)) == "0 1"
    # Rank 1 is within 2 / 2 and enters at once; the worse of the two members makes room.
    assert names(decide(one, population(scores), previous(0, 5, 5, 0, 0, 0), NOW)) == "0 1"


def test_a_share_is_of_whom_the_facts_let_in() -> None:
    everyone = population([place / 100 for place in range(100)], {"f": [place % 2 for place in range(100)]})
    assert names(decide(audience("top: 4%, where: {f: 1}"), everyone, membership.nobody(100), NOW)) == "97 99"


def test_a_budget_is_never_overspent_by_a_minimum_stay() -> None:
    one = audience("budget: {spend: 1, per_contact: 0.4}", min_stay="2d")
    everyone = population([0.9, 0.8, 0.7, 0.1, 0.1])
    assert names(decide(one, everyone, previous(0, 0, 0, NOW - 1, NOW - 1), NOW)) == "3 4"
    assert names(decide(one, everyone, previous(0, 0, 0, NOW - 2 * DAY, NOW - 1), NOW)) == "0 4"


# --- facts ---


@pytest.mark.parametrize(
    ("condition", "held"),
    [
        ("{at_least: 2}", "2 3"),
        ("{more_than: 2}", "3"),
        ("{at_most: 2}", "0 1 2"),
        ("{below: 2}", "0 1"),
        ("{at_least: 1, below: 3}", "1 2"),
        ("[0, 3]", "0 3"),
        ("2", "2"),
        ("{is_not: 2}", "0 1 3 4"),
        ("{missing: true}", "4"),
        ("{missing: false}", "0 1 2 3"),
        ("{below: 2s}", "0 1"),
    ],
)
def test_conditions_on_a_feature(condition: str, held: str) -> None:
    everyone = population([0.5] * 5, {"f": [0, 1, 2, 3, math.nan]})
    assert names(decide(audience(f"where: {{f: {condition}}}"), everyone, membership.nobody(5), NOW)) == held


def test_categories_are_meant_by_their_names() -> None:
    said = Said(
        np.array([0.5] * 4, np.float32),
        {"device": np.array([0, 1, 2, np.nan], np.float32)},
        {"device": {"mobile": 0.0, "desktop": 1.0, "(other)": 2.0}},
    )
    everyone = population([0.5] * 4).with_model("m", said)
    for condition, held in (("mobile", "0"), ("[mobile, (other)]", "0 2"), ("{is_not: desktop}", "0 2 3")):
        one = audience(f"where: {{device: {condition}}}")
        assert names(decide(one, everyone, membership.nobody(4), NOW)) == held


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        ("within: 1d", "0 1"),
        ("older_than: 1d", "2 3"),
        ("within: 2d, older_than: 1h", "1 2"),
        ("older_than: 1h", "1 2 3"),
    ],
)
def test_the_last_event_decides(rule: str, held: str) -> None:
    everyone = population([0.5] * 4, last_event_ms=[NOW, NOW - DAY, NOW - DAY - 1, 0])
    assert names(decide(audience(f"last_event: {{{rule}}}"), everyone, membership.nobody(4), NOW)) == held


def test_facts_and_exclusions_count_at_once_against_a_minimum_stay() -> None:
    one = audience("where: {f: 1}", min_stay="9d")
    other = one.model_copy(update={"exclude": ("b",)})
    other._name = "a"
    everyone = population([0.5] * 3, {"f": [1, 0, 1]}).with_audience("b", np.array([False, False, True]))
    decision = decide(other, everyone, previous(NOW - 1, NOW - 1, NOW - 1), NOW)
    assert names(decision) == "0"
    assert reasons(decision) == ["unchanged", "condition", "excluded"]


# --- size and hold-out ---


def test_an_audience_that_is_too_small_is_empty_and_says_how_many_qualify() -> None:
    one = audience("cut: 0.1", min_size=3, min_stay="9d")
    everyone = population([0.5, 0.5, 0.01])
    decision = decide(one, everyone, previous(NOW - 1, 0, 0), NOW)
    assert decision.too_small
    assert (names(decision), int(decision.qualified.sum())) == ("", 2)
    assert reasons(decision) == ["too_small", "unchanged", "unchanged"]
    assert names(decide(one, population([0.5, 0.5, 0.5]), previous(0, 0, 0), NOW)) == "0 1 2"


def test_held_out_visitors_are_the_control_and_no_members() -> None:
    everyone = population([0.5] * 1000)
    decision = decide(audience("cut: 0.1, holdout: 20%"), everyone, membership.nobody(1000), NOW)
    members, control = decision.entered_ms > 0, decision.control_ms > 0
    assert not (members & control).any()
    assert (members | control).all()
    assert 150 < control.sum() < 250


def test_a_number_is_chosen_beside_the_hold_out_which_has_its_part_of_it() -> None:
    everyone = population(np.linspace(0.01, 0.9, 1000).tolist())
    decision = decide(audience("top: 90, holdout: 10%"), everyone, membership.nobody(1000), NOW)
    assert ((decision.entered_ms > 0).sum(), (decision.control_ms > 0).sum()) == (90, 10)


def test_the_hold_out_is_the_share_it_says_and_unrelated_between_salts() -> None:
    ids = [f"visitor-{place}" for place in range(100_000)]
    everyone = Population(pa.array(ids), drawn(ids), np.zeros(len(ids), np.int64), {})
    held = {
        salt: membership.held_out(audience(f"holdout: {{share: 10%, salt: {salt}}}"), everyone) for salt in ("a", "b")
    }
    for found in held.values():  # 100,000 draws of 0.1: five standard deviations are 475
        assert abs(int(found.sum()) - 10_000) < 475
    assert abs(int((held["a"] & held["b"]).sum()) - 1_000) < 150
    wider = membership.held_out(audience("holdout: {share: 20%, salt: a}"), everyone)
    assert (wider | ~held["a"]).all(), "a larger share holds out the same visitors, and more"


def slow_number(visitor: str, salt: str) -> int:
    """What `held_out` compares with the share, with Python's integers."""

    def first_eight(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    mixed = ((first_eight(visitor) ^ first_eight(salt)) + 0x9E3779B97F4A7C15) % 2**64
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) % 2**64
    return mixed ^ mixed >> 31


def test_the_hold_out_is_what_is_written_down() -> None:
    # The first output of SplitMix64 seeded with 0, as its authors publish it.
    assert membership._mixed(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]
    ids = ["anna", "ü", *(f"visitor-{place}" for place in range(200))]
    everyone = Population(pa.array(ids), drawn(ids), np.zeros(len(ids), np.int64), {})
    held = membership.held_out(audience("holdout: {share: 25%, salt: spring}"), everyone)
    assert held.tolist() == [slow_number(one, "spring") < 2**62 for one in ids]


# --- properties ---

TEXTS = (
    "cut: 0.3",
    "cut: {enter: 0.4, leave: 0.2}",
    "top: 5",
    "top: 30%",
    "top: 6, holdout: 30%",
    "budget: {spend: 2, per_contact: 0.4}",
    "cut: 0.3, holdout: 40%, scores: {churn: {below: 0.5}}",
    "top: 5, where: {f: {below: 2}}, scores: {churn: {below: 0.5}}",
)
# Few different scores, so that there are ties.
values = st.integers(0, 20).map(lambda place: place / 20)
visitors = st.lists(
    st.tuples(values, values, st.integers(0, 3), st.sampled_from([0, 1, 30, 60, 90])), min_size=1, max_size=40
)
texts = st.sampled_from(TEXTS)
margins = st.sampled_from([0, 0.25, 1])
stays = st.sampled_from(["0", "2d"])
sizes = st.sampled_from([1, 4])


def drawn_case(rows: Sequence[tuple[float, float, int, int]], one: Audience) -> tuple[Population, Previous]:
    """A population and who was in before, some hours ago each; on either side of the hold-out."""
    everyone = population([row[0] for row in rows], {"f": [row[2] for row in rows]}, churn=[row[1] for row in rows])
    since = np.array([NOW - row[3] * HOUR if row[3] else 0 for row in rows], np.int64)
    held = membership.held_out(one, everyone)
    return everyone, Previous(np.where(held, 0, since), np.where(held, since, 0))


@given(visitors, texts, margins, stays, sizes, st.integers(0, 2**32))
@settings(max_examples=150)
def test_deciding_again_after_any_part_was_written_decides_the_same(
    rows: list[tuple[float, float, int, int]], text: str, margin: float, stay: str, size: int, seed: int
) -> None:
    one = audience(text, margin=margin, min_stay=stay, min_size=size)
    everyone, before = drawn_case(rows, one)
    decided = decide(one, everyone, before, NOW)
    written = np.random.default_rng(seed).random(len(rows)) < 0.5
    part = Previous(
        np.where(written, decided.entered_ms, before.entered_ms),
        np.where(written, decided.control_ms, before.control_ms),
    )
    for state in (decided.previous, part):
        again = decide(one, everyone, state, NOW)
        assert again.entered_ms.tolist() == decided.entered_ms.tolist()
        assert again.control_ms.tolist() == decided.control_ms.tolist()


@given(visitors, margins, stays)
def test_who_enters_was_above_the_one_and_who_leaves_below_the_other(
    rows: list[tuple[float, float, int, int]], margin: float, stay: str
) -> None:
    one = audience("cut: 0.3", margin=margin, min_stay=stay)
    everyone, before = drawn_case(rows, one)
    decided = decide(one, everyone, before, NOW)
    leave, enter = (np.float32(bound) for bound in one.cut.thresholds(margin))  # type: ignore[union-attr]
    stayed_ms = 2 * DAY if stay == "2d" else 0
    for score, was, now in zip(everyone.models["m"].propensity, before.entered_ms, decided.entered_ms, strict=True):
        if was:
            assert bool(now) == (score >= leave or NOW - was < stayed_ms)
            assert now in (0, was)
        else:
            assert bool(now) == (score >= enter)
            assert now in (0, NOW)


@given(visitors, st.integers(1, 12), margins, stays)
def test_the_top_never_exceeds_its_number_by_more_than_the_margin(
    rows: list[tuple[float, float, int, int]], number: int, margin: float, stay: str
) -> None:
    one = audience(f"top: {number}", margin=margin, min_stay=stay)
    everyone, before = drawn_case(rows, one)
    decided = decide(one, everyone, before, NOW)
    size = int((decided.entered_ms > 0).sum())
    assert min(number, len(rows)) <= size <= math.floor(number * (1 + margin))
    # Slowly and obviously: by rank, nobody leaves within the margin unless there is no place, nor stays beyond it.
    order = sorted(
        range(len(rows)), key=lambda i: (-everyone.models["m"].propensity[i], everyone.drawn[i] >> np.uint64(32))
    )
    rank = {visitor: place for place, visitor in enumerate(order, 1)}
    protected = [NOW - int(was) < 2 * DAY and was > 0 and stay == "2d" for was in before.entered_ms]
    for visitor, (was, now) in enumerate(zip(before.entered_ms, decided.entered_ms, strict=True)):
        if rank[visitor] <= number / (1 + margin) and size < math.floor(number * (1 + margin)):
            assert now
        if was and now and rank[visitor] > number * (1 + margin) and not protected[visitor]:
            assert size == min(number, len(rows)), "it stays only where nobody else takes the place"


@given(st.lists(st.text(max_size=8), min_size=1, max_size=30, unique=True), st.integers(1, 99))
def test_the_hold_out_depends_on_the_visitor_alone(ids: list[str], share: int) -> None:
    one = audience(f"holdout: {share}%")

    def held(some: Sequence[str]) -> list[bool]:
        everyone = Population(pa.array(some, pa.large_string()), drawn(some), np.zeros(len(some), np.int64), {})
        return [bool(flag) for flag in membership.held_out(one, everyone)]

    assert held(ids) == [held([alone])[0] for alone in ids]
    assert held(ids[::-1]) == held(ids)[::-1]


# --- what hysteresis is for ---


# Purchases are drawn: those of 3,000 members differ by another percent by chance, those of 13,000 do not.
@pytest.mark.parametrize(("chosen", "margin", "within"), [("cut: 0.1", 0.5, 0.02), ("top: 3000", 1.0, 0.03)])
def test_noise_around_the_cut_takes_a_tenth_of_the_list_operations_and_conversion_stays(
    chosen: str, margin: float, within: float
) -> None:
    world = prove_hysteresis.World(noise=0.2, change=0, visitors=60_000)
    plain, calm = prove_hysteresis.run(
        world, [prove_hysteresis.audience(chosen, 0), prove_hysteresis.audience(chosen, margin, "3d")]
    )
    assert plain.after_first > 5_000, "there is something to save"
    assert calm.after_first * 10 <= plain.after_first
    assert calm.true_conversion == pytest.approx(plain.true_conversion, rel=0.02)
    assert calm.conversion == pytest.approx(plain.conversion, rel=within)
    assert calm.members.mean() == pytest.approx(plain.members.mean(), rel=0.05)
