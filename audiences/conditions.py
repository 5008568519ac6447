"""Conditions on what is known of visitors: facts, which hold or do not, with nothing to tremble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from audiences.definitions import REST, Condition, LastEvent, Where, feature_of
from audiences.population import Flags, Floats, Population, Times
from service.core.segments import SEGMENTS


def holds(condition: Condition, values: Floats, codes: Mapping[str, float]) -> Flags:
    """For which of values float32[V] a condition holds. codes: the numbers of categories by name.

    A missing value (NaN) is below, above and equal to nothing; so `is_not` holds for it.
    """
    found = np.ones(len(values), np.bool_)
    if condition.at_least is not None:
        found &= values >= np.float32(condition.at_least)
    if condition.more_than is not None:
        found &= values > np.float32(condition.more_than)
    if condition.at_most is not None:
        found &= values <= np.float32(condition.at_most)
    if condition.below is not None:
        found &= values < np.float32(condition.below)
    if condition.is_ is not None:
        found &= _is_one_of(values, condition.is_, codes)
    if condition.is_not is not None:
        found &= ~_is_one_of(values, condition.is_not, codes)
    if condition.missing is not None:
        found &= np.isnan(values) == condition.missing
    return found


def _is_one_of(values: Floats, wanted: Sequence[str | float], codes: Mapping[str, float]) -> Flags:
    numbers = [codes[str(value)] if codes else float(value) for value in wanted]
    return np.isin(values, np.array(numbers, np.float32))


def all_hold(where: Where, population: Population, model: str | None) -> Flags:
    """For whom all conditions hold, bool[V]; a feature without a model's name is of `model`."""
    found = np.ones(len(population), np.bool_)
    for key, condition in where.items():
        of, feature = feature_of(key, model)
        said = population.models[str(of)]
        found &= said.known & holds(condition, said.features[feature], said.codes[feature])
    return found


def was_here(rule: LastEvent, last_event_ms: Times, now_ms: int) -> Flags:
    """Whose last event is as long ago as the rule says, bool[V]. Who has none (0) was here longer ago than anything."""
    age_ms = np.where(last_event_ms > 0, now_ms - last_event_ms, np.iinfo(np.int64).max)
    found = np.ones(len(last_event_ms), np.bool_)
    if rule.within is not None:
        found &= age_ms <= rule.within
    if rule.older_than is not None:
        found &= age_ms > rule.older_than
    return found


def micro_segments(
    rules: Mapping[str, Mapping[str, Where]], population: Population, model: str
) -> tuple[npt.NDArray[np.int16], tuple[tuple[str, str], ...]]:
    """The micro-segment of each visitor int16[V], and the (segment, name) that the numbers stand for.

    In a segment that is divided each visitor is in exactly one: that of the first rule, in the order of the file,
    whose conditions all hold, else REST. In others, and without a segment, it is -1.
    """
    said = population.models[model]
    if said.segment is None:
        raise ValueError("a population has micro-segments only after segments; move the visitors first")
    place = np.full(len(population), -1, np.int16)
    names: list[tuple[str, str]] = []
    for segment, micro in rules.items():
        waiting = said.segment == SEGMENTS.index(segment)
        for name, where in micro.items():
            fits = waiting & all_hold(where, population, model)
            place[fits] = len(names)
            names.append((segment, name))
            waiting &= ~fits
        place[waiting] = len(names)
        names.append((segment, REST))
    return place, tuple(names)
