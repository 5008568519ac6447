"""Membership: who belongs to an audience now, given who belonged to it before.

Scores tremble. So what depends on them has two thresholds, one to enter and one to leave, and a minimum stay. Facts do
not: conditions on features, the last event, exclusions and the hold-out count at once, also against a minimum stay.

Deciding again, with what was decided before or with any part of it, decides the same: a refresh that was cut off is
ended by another.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from audiences.conditions import all_hold, was_here
from audiences.definitions import Audience
from audiences.population import Flags, Floats, Population, Times
from service.core.movement import widened
from service.core.segments import SEGMENTS

# Of a score of 1.0, as float32 orders bits.
_HIGHEST_BITS: Final = 0x3F800000


class Why(IntEnum):
    """Why somebody entered an audience or left it; UNCHANGED for all others."""

    UNCHANGED = 0
    QUALIFIES = 1  # entered
    SCORE = 2  # left, as all below: a score, a rank or a segment beyond the threshold to leave
    CONDITION = 3
    EXCLUDED = 4
    HELD_OUT = 5
    TOO_SMALL = 6
    GONE = 7  # no score of the visitor any more

    @property
    def text(self) -> str:
        """As it stands in the journal of changes."""
        return self.name.lower()


class Previous(NamedTuple):
    """Since when each visitor is a member, and one of the hold-out, int64[V]; 0 for who is none.

    `is_first`: nothing was ever decided, so that who is between the thresholds is not out, but was not looked at yet.
    """

    entered_ms: Times
    control_ms: Times
    is_first: bool = False


def nobody(count: int) -> Previous:
    """The state of an audience that nothing was decided of yet."""
    return Previous(np.zeros(count, np.int64), np.zeros(count, np.int64), is_first=True)


@dataclass(frozen=True)
class Decision:
    """Who belongs now, of V visitors. `qualified` are those who do by what is written, hold-out and size aside."""

    entered_ms: Times  # 0 for who is no member
    control_ms: Times  # 0 for who is not of the hold-out
    why: npt.NDArray[np.int8]  # `Why`, of the members; those of the hold-out enter and leave without one
    qualified: Flags
    too_small: bool
    cut_off: float  # the lowest score of a member; NaN where there is none or no model is asked

    @property
    def previous(self) -> Previous:
        """What the next decision is given."""
        return Previous(self.entered_ms, self.control_ms)


class Thresholds(NamedTuple):
    """For whom the scores say that one may enter, and that a member may stay; who may enter may stay, bool[V]."""

    enter: Flags
    stay: Flags


def decide(audience: Audience, population: Population, previous: Previous, now_ms: int) -> Decision:
    """Who belongs to an audience at a moment.

    The hold-out is drawn first, and the choice made in each part on its own: 1,000 with a hold-out of a tenth are 1,000
    members, and 111 that would be. Fewer members than `min_size` are none at all. The first time a cut counts without
    its margin: who is between the thresholds was not looked at before, and belongs on the side of the cut.
    """
    held = held_out(audience, population)
    facts = _facts(audience, population, now_ms)
    excluded = _excluded(audience, population)
    scores = _thresholds(audience, population, previous.is_first)
    eligible = facts & ~excluded
    members = _chosen(audience, population, eligible & ~held, scores, previous.entered_ms, now_ms, 1.0)
    share = audience.holdout.share if audience.holdout is not None else 0.0
    control = _chosen(audience, population, eligible & held, scores, previous.control_ms, now_ms, share / (1 - share))
    qualified = members | control
    too_small = int(members.sum()) < (audience.min_size or 1)
    if too_small:
        members, control = np.zeros_like(members), np.zeros_like(control)
    was = previous.entered_ms > 0
    return Decision(
        entered_ms=_since(members, previous.entered_ms, now_ms),
        control_ms=_since(control, previous.control_ms, now_ms),
        why=_reasons(members, was, facts, excluded, held, too_small),
        qualified=qualified,
        too_small=too_small,
        cut_off=_cut_off(audience, population, members),
    )


def held_out(audience: Audience, population: Population) -> Flags:
    """Who is kept out of an audience at random, bool[V]: the same visitors whenever it is asked.

    A visitor's number and the salt are mixed (the finaliser of SplitMix64: Steele, Lea and Flood 2014) to a number
    that is evenly spread and, from salt to salt, unrelated; those below the share are held out. So a larger share holds
    out the same visitors, and more.
    """
    if audience.holdout is None:
        return np.zeros(len(population), np.bool_)
    salt = hashlib.blake2b((audience.holdout.salt or audience.name).encode(), digest_size=8).digest()
    mixed = _mixed(population.drawn ^ np.uint64(int.from_bytes(salt, "little")))
    return mixed < np.uint64(min(round(audience.holdout.share * 2**64), 2**64 - 1))


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


# --- facts ---


def _facts(audience: Audience, population: Population, now_ms: int) -> Flags:
    found = all_hold(audience.where, population, audience.model)
    if audience.model is not None:
        found &= population.models[audience.model].known
    for model in audience.scores:
        found &= population.models[model].known
    if audience.last_event is not None:
        found &= was_here(audience.last_event, population.last_event_ms, now_ms)
    return found


def _excluded(audience: Audience, population: Population) -> Flags:
    found = np.zeros(len(population), np.bool_)
    for other in audience.exclude:
        found |= population.qualified[other]
    return found


# --- scores ---


def _thresholds(audience: Audience, population: Population, is_first: bool) -> Thresholds:
    margin = 0.0 if is_first else audience.margin or 0.0
    enter, stay = np.ones(len(population), np.bool_), np.ones(len(population), np.bool_)
    if audience.model is not None:
        said = population.models[audience.model]
        if audience.cut is not None:
            low, high = audience.cut.thresholds(margin)
            enter &= said.propensity >= np.float32(high)
            stay &= said.propensity >= np.float32(low)
        if audience.segment is not None:
            inside = _in_segments(audience.segment, said.segment)
            if audience.micro is not None and said.micro is not None:
                inside &= _in_micro(audience, said.micro, said.micro_names)
            enter, stay = enter & inside, stay & inside
    for model, wanted in audience.scores.items():
        said = population.models[model]
        if wanted.at_least is not None:
            low, high = widened(wanted.at_least, margin)
            enter &= said.propensity >= np.float32(high)
            stay &= said.propensity >= np.float32(low)
        if wanted.below is not None:
            low, high = widened(wanted.below, margin)
            enter &= said.propensity < np.float32(low)
            stay &= said.propensity < np.float32(high)
        if wanted.segment is not None:
            inside = _in_segments(wanted.segment, said.segment)
            enter, stay = enter & inside, stay & inside
    return Thresholds(enter, stay)


def _in_segments(names: tuple[str, ...], places: npt.NDArray[np.int8] | None) -> Flags:
    if places is None:
        raise ValueError("a population has segments only after its visitors were moved")
    return np.isin(places, np.array([SEGMENTS.index(name) for name in names], np.int8))


def _in_micro(audience: Audience, places: npt.NDArray[np.int16], names: tuple[tuple[str, str], ...]) -> Flags:
    wanted = [
        place
        for place, (segment, name) in enumerate(names)
        if segment in (audience.segment or ()) and name in (audience.micro or ())
    ]
    return np.isin(places, np.array(wanted, np.int16))


# --- the choice ---


def _chosen(
    audience: Audience,
    population: Population,
    eligible: Flags,
    scores: Thresholds,
    since_ms: Times,
    now_ms: int,
    part: float,
) -> Flags:
    """Who of the eligible belongs, bool[V]. part: how many, of the number that the audience asks for."""
    member = (since_ms > 0) & eligible
    protected = member & (now_ms - since_ms < (audience.min_stay or 0))
    enter, stay = eligible & scores.enter, eligible & scores.stay
    if audience.top is None and audience.budget is None:
        return enter | (member & stay) | protected
    wanted, most = _numbers(audience, int(stay.sum()), part)
    said = population.models[str(audience.model)]
    return best(said.propensity, population.drawn, enter, stay, member, protected, wanted, most, audience.margin or 0.0)


def _numbers(audience: Audience, pool: int, part: float) -> tuple[int, int]:
    """How many to choose, and how many at most when some have to stay."""
    if audience.budget is not None:
        wanted = math.floor(audience.budget.contacts * part + 1e-9)
        return wanted, wanted
    if isinstance(audience.top, int):
        wanted = math.floor(audience.top * part + 1e-9)
    else:
        wanted = math.floor((audience.top or 0.0) * pool)
    return wanted, math.floor(wanted * (1 + (audience.margin or 0.0)))


def best(
    propensity: Floats,
    drawn: npt.NDArray[np.uint64],
    enter: Flags,
    stay: Flags,
    member: Flags,
    protected: Flags,
    wanted: int,
    most: int,
    margin: float,
) -> Flags:
    """The best `wanted` of V visitors, by rank, with a margin of ranks in which nobody is exchanged: bool[V].

    All are of [V]; enter is within stay, protected within member. Ranks are among those who may stay, best score first;
    of equal ones, the lower `drawn`. In this order places are given: to members within their minimum stay; to who may
    enter and ranks within wanted / (1 + margin); to members who rank within wanted * (1 + margin); to others who may
    enter. There are `wanted` places, and up to `most` where the first two need them. (So do stock indices.)
    """
    candidates = np.flatnonzero(stay | protected)
    may_stay = stay[candidates]
    order = np.argsort(_by_rank(propensity[candidates], drawn[candidates], may_stay), kind="stable")
    rank = np.empty(len(candidates), np.int64)
    rank[order] = np.arange(1, len(candidates) + 1)
    may_enter, is_member = enter[candidates], member[candidates] & may_stay
    group = np.full(len(candidates), 4, np.int8)
    group[may_enter] = 3
    group[is_member & (rank <= wanted * (1 + margin))] = 2
    group[may_enter & (rank <= wanted / (1 + margin))] = 1
    group[protected[candidates]] = 0
    places = min(max(wanted, int((group <= 1).sum())), most, int((group <= 3).sum()))
    chosen = order[np.argsort(group[order], kind="stable")[:places]]
    found = np.zeros(len(propensity), np.bool_)
    found[candidates[chosen]] = True
    return found


def _by_rank(propensity: Floats, drawn: npt.NDArray[np.uint64], may_stay: Flags) -> npt.NDArray[np.uint64]:
    """Numbers that ascend with the rank: the bits of a float32 that is not negative order as the number does.

    Those who may not stay are here as they are protected, and rank behind all others.
    """
    lower = np.uint64(_HIGHEST_BITS) - (propensity + np.float32(0)).view(np.uint32)
    lower[~may_stay] += np.uint64(2**31)
    return (lower << np.uint64(32)) | (drawn >> np.uint64(32))


# --- what comes of it ---


def _since(belongs: Flags, since_ms: Times, now_ms: int) -> Times:
    return np.where(belongs, np.where(since_ms > 0, since_ms, now_ms), 0)


def _reasons(
    members: Flags, was: Flags, facts: Flags, excluded: Flags, held: Flags, too_small: bool
) -> npt.NDArray[np.int8]:
    why = np.zeros(len(members), np.int8)
    why[members & ~was] = Why.QUALIFIES
    left = was & ~members
    why[left] = Why.TOO_SMALL if too_small else Why.SCORE
    why[left & held] = Why.HELD_OUT
    why[left & excluded] = Why.EXCLUDED
    why[left & ~facts] = Why.CONDITION
    return why


def _cut_off(audience: Audience, population: Population, members: Flags) -> float:
    if audience.model is None or not members.any():
        return math.nan
    return float(population.models[audience.model].propensity[members].min())
