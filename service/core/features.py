"""The kernel: features of many visitors at once, a pure function of their event records and of `now`.

A spec is compiled once into a `Plan`; `matrix` then evaluates every row of a call together. All windowed statistics
become the lines of one array over the events, some of them summed and of the others the largest taken, so that the
number of numpy calls does not grow with the number of features. They are few: they are what one visitor alone costs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.core import events
from service.core.events import Records
from service.core.spec import ANY, Aggregate, Clock, Decay, Feature, FeatureSpec, Ratio, Request, Session, Trait

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Rows are taken in blocks of about this many events: more do not fit into the caches, fewer make more calls of numpy.
# On a million visitors 4,096 took 1.84 us a visitor, 8,192 1.53 us, 16,384 1.45 us and 32,768 1.49 us.
BLOCK_EVENTS: Final = 16_384

# In a block of so many events slots of short windows look at those alone that some of them counts, if these are a
# tenth of all or fewer: with 6 % a visitor takes 1.35 us instead of 1.50, with 14 % and more it would take longer.
# Those slots whose result does not depend on what is added or compared first: a sum of others would round otherwise.
NEAR_EVENTS: Final = 8192
_FEW: Final = 10
_NEAR_SHARE: Final = 4  # a short window is at most this part of the history

# What a slot takes of an event. The sources up to _DISTINCT are summed; of the others the largest is taken.
_ONE, _HAS_VALUE, _VALUE, _DECAY, _DISTINCT, _TENURE, _RECENCY, _HIGHEST, _LOWEST, _DURATION, _PLACE = range(11)
_SOURCES: Final = {
    "count": _ONE,
    "mean": _HAS_VALUE,
    "sum": _VALUE,
    "decay": _DECAY,
    "distinct": _DISTINCT,
    "tenure": _TENURE,
    "recency": _RECENCY,
    "max": _HIGHEST,
    "min": _LOWEST,
    "latest": _PLACE,
}
_OF_VALUES: Final = (_HAS_VALUE, _VALUE, _HIGHEST, _LOWEST, _PLACE)
# The weight of an event is 1 where it counts and 0 where not, but for these sources, which may be negative, 0 and
# -infinity. By these operations weights become what slots take.
_ADDED: Final = (_TENURE, _RECENCY, _HIGHEST, _LOWEST)
_OPERATIONS: Final[Mapping[int, tuple[np.ufunc, str]]] = {
    _VALUE: (np.multiply, "value"),
    _DECAY: (np.multiply, "decay"),
    _TENURE: (np.add, "age"),
    _RECENCY: (np.subtract, "age"),
    _HIGHEST: (np.add, "value"),
    _LOWEST: (np.subtract, "value"),
    _DURATION: (np.multiply, "age"),
    _PLACE: (np.multiply, "place"),
}
_SCALE: Final = {_TENURE: 1000.0, _RECENCY: -1000.0, _LOWEST: -1.0, _DURATION: 1000.0}
_NAN_IF_NONE: Final = (_HAS_VALUE, *_ADDED, _PLACE)
_ROUNDED: Final = (_VALUE, _DECAY)

# Arrays, since numpy converts a Python number anew in each call.
_ONE_MORE: Final = np.array(1)
_ZERO: Final = np.zeros((), np.float32)
_HOUR_MS: Final = np.array(3_600_000)
_DAY_MS: Final = np.array(86_400_000)
_TRAIT_NUMBER: Final = np.array(events.TRAIT_NUMBER, np.uint16)
_PLACES: Final = np.arange(BLOCK_EVENTS)
_NUMBERS: Final = np.arange(1.0, BLOCK_EVENTS + 1)
# Keys to find repeated attributes by: the attribute in the upper half, then the row, and the place in the lowest bits.
_PLACE_BITS: Final = np.array(BLOCK_EVENTS.bit_length())
_PLACE_MASK: Final = np.array((1 << BLOCK_EVENTS.bit_length()) - 1, np.uint64)
_ATTRIBUTE_MASK: Final = np.array(-1 << 32)
_FIRST_ATTRIBUTE: Final = np.uint64(1 << 32)


class _Slot(NamedTuple):
    """One statistic of one window: of the events of some kinds, the sum or the largest of a source."""

    source: int
    kinds: tuple[int, ...]  # places in the catalogue
    window_ms: int
    in_session: bool  # events of the current session alone
    half_life: int = 0


@dataclass(frozen=True)
class Ratios:
    """Ratios that are not built on each other."""

    columns: Ints  # [R]
    operands: Ints  # [2 * R] columns of the numerators, then of the denominators
    priors: Floats  # [2 * R]


@dataclass(frozen=True)
class Tier:
    """Slots that look at the same events."""

    slots: Ints | slice  # [S] their numbers, ascending
    weights: Floats  # [S, 4 * W * K]
    sums: int  # how many slots are summed; they come first
    operations: tuple[tuple[np.ufunc, str, slice], ...]  # how, and with what, weights become what slots take
    distinct: tuple[tuple[slice, Bools], ...]  # distinct slots of the same kinds, and the cells that they count
    decay_rates: Floats  # [D, 1] -1 / half-life in milliseconds
    cells: Bools  # [4 * W * K] which cells any of them counts
    least: Floats  # [S, 1] what they are where no event counts


@dataclass(frozen=True)
class Plan:
    """A compiled feature spec. Made by `compile`; immutable and shared by all threads.

    Whether a slot counts an event depends on the event's cell alone: its kind, the shortest window that holds it,
    whether it lacks a value, and whether it is of the current session.
    """

    spec: FeatureSpec
    windows: npt.NDArray[np.uint64]  # [W] ascending, in milliseconds; the last one is the history
    group: Ints  # [65536] catalogue code -> 0 ... K-1, one for kinds that no slot tells apart, or W * K where unknown
    groups: Ints  # K
    cells: Ints  # W * K; the cell of an event that lacks a value is so many further on
    session_cells: Ints  # 2 * W * K; the same for an event of the session
    whole: Tier  # all S slots
    far: Tier  # the same in two tiers, for many events
    near: Tier
    scale: Floats  # [S - sums, 1] divides the largest
    means: slice  # slots that hold the number of values, then the mean
    totals: slice  # slots of the sums of the same values
    latest: slice  # slots that hold the place of the latest value, then the value
    has_session: bool
    session_gap: Ints  # in milliseconds
    slot_of: Ints  # [F] the slot of a column; S where it has none
    nothing: npt.NDArray[np.float32]  # [F] a row in which no event counts
    ratios: tuple[Ratios, ...]  # by depth: a ratio of ratios comes after them
    clocks: tuple[tuple[int, str, Ints], ...]  # column, part, offset in milliseconds
    trait_ids: npt.NDArray[np.uint32]  # [U] ascending, the traits that T features read
    trait_of: Ints  # [T] index into trait_ids
    trait_keys: npt.NDArray[np.uint64]  # [C] ascending: hash of the category << 32 | trait
    trait_codes: npt.NDArray[np.float32]  # [T, C + 2] of these, of any other category, and NaN for a number
    trait_rows: Ints  # [T] 0, 1, 2 ...
    trait_is_text: Bools  # [T]
    trait_columns: Ints  # [T]
    request_columns: Ints  # [R]

    @property
    def width(self) -> int:
        """F, the number of features."""
        return len(self.spec.features)

    def encode_request(self, context: Mapping[str, object] | None) -> list[float]:
        """The R request features of one context, coded as the spec says; NaN where absent or of the wrong type."""
        if not context:
            return [math.nan] * len(self.request_columns)
        return [encode(feature, context.get(feature.request)) for feature in self.spec.requests.values()]


def encode(feature: Trait | Request, value: object) -> float:
    """The number of a raw trait or request value: its category's code, or itself; NaN for anything else."""
    if not isinstance(value, (str, bool, int, float)) or value != value or value == "":
        return math.nan
    if feature.categories is None:
        known = not isinstance(value, str) and abs(value) < events.FLOAT32_END
        return float(value) if known else math.nan
    return float(feature.codes.get(text_of(value), feature.other))


def text_of(value: str | bool | float) -> str:
    """A value as the text that categories and attributes are compared by: `true`, `3` for 3.0, `2.5`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, int) and abs(value) >= 2**63:
        return hex(value)  # Python refuses to write thousands of decimal digits
    return str(value)


def compile(spec: FeatureSpec) -> Plan:  # noqa: A001 - features.compile(spec) reads as re.compile does
    """The plan of a spec; costs about half a millisecond, so make it once."""
    column = {name: place for place, name in enumerate(spec.features)}
    clocks = {column[name]: feature for name, feature in spec.features.items() if isinstance(feature, Clock)}
    return Plan(
        spec=spec,
        ratios=tuple(_compile_ratios(spec, column)),
        clocks=tuple((place, feature.clock, np.array(feature.offset_ms)) for place, feature in clocks.items()),
        request_columns=np.array([column[name] for name in spec.requests], np.int64),
        **_compile_slots(spec),
        **_compile_traits(spec.traits, column),
    )


def _compile_slots(spec: FeatureSpec) -> dict[str, Any]:
    wanted = [_slot(spec, feature) for feature in spec.features.values()]
    means = [slot for slot in dict.fromkeys(wanted) if slot is not None and slot.source == _HAS_VALUE]
    totals = [slot._replace(source=_VALUE) for slot in means]  # the first of their source, in the order of the means
    slots = sorted(dict.fromkeys([*means, *totals, *filter(None, wanted)]), key=_kin)
    number = {slot: number for number, slot in enumerate(slots)}
    sources = [slot.source for slot in slots]
    sums = bisect_right(sources, _DISTINCT)
    slot_of = np.array([len(slots) if slot is None else number[slot] for slot in wanted])
    nothing = np.array([*(math.nan if source in _NAN_IF_NONE else 0.0 for source in sources), math.nan])
    first_total = bisect_left(sources, _VALUE)
    return {
        "scale": np.array([[_SCALE.get(source, 1.0)] for source in sources[sums:]]).reshape(-1, 1),
        "means": slice(bisect_left(sources, _HAS_VALUE), bisect_right(sources, _HAS_VALUE)),
        "totals": slice(first_total, first_total + len(means)),
        "latest": slice(bisect_left(sources, _PLACE), len(slots)),
        "has_session": any(slot.in_session for slot in slots),
        "slot_of": slot_of,
        "nothing": nothing[slot_of].astype(np.float32),
        **_compile_cells(spec, slots),
    }


def _slot(spec: FeatureSpec, feature: Feature) -> _Slot | None:
    """What a feature is read from; None where that is no statistic of events."""
    history, kinds = spec.limits.history, list(spec.events)
    if isinstance(feature, Session):
        source = _ONE if feature.session == "count" else _DURATION
        return _Slot(source, tuple(range(len(kinds))), history, in_session=True)
    if not isinstance(feature, Aggregate):
        return None
    names = kinds if ANY in feature.kinds else feature.kinds
    return _Slot(
        source=_SOURCES[feature.operation],
        kinds=tuple(sorted({kinds.index(name) for name in names})),
        window_ms=min(feature.window, history) if isinstance(feature.window, int) else history,
        in_session=feature.window == "session",
        half_life=feature.half_life if isinstance(feature, Decay) else 0,
    )


def _kin(slot: _Slot) -> tuple[int, tuple[int, ...]]:
    """The same for slots that are made alike and so stand together."""
    return slot.source, slot.kinds if slot.source == _DISTINCT else ()


def _spans(slots: Sequence[_Slot]) -> Iterator[tuple[int, slice]]:
    first = 0
    for (source, _), alike in groupby(slots, key=_kin):
        end = first + len(list(alike))
        yield source, slice(first, end)
        first = end


def _compile_cells(spec: FeatureSpec, slots: Sequence[_Slot]) -> dict[str, Any]:
    counting = [set(slot.kinds) for slot in slots]
    counted_by = [tuple(place in kinds for kinds in counting) for place in range(len(spec.events))]
    groups = list(dict.fromkeys(counted_by))  # kinds that the same slots count are one group
    windows = sorted({spec.limits.history, *(slot.window_ms for slot in slots)})
    cells = len(windows) * len(groups)
    group = np.full(65536, cells)
    for kind, counted in zip(spec.events.values(), counted_by, strict=True):
        group[kind.code] = groups.index(counted)
    counts = np.zeros((len(slots), 2, 2, len(windows), len(groups)), np.bool_)
    for number, slot in enumerate(slots):
        in_session, lacks_value = slice(slot.in_session, 2), slice(1 if slot.source in _OF_VALUES else 2)
        in_window = [window <= slot.window_ms for window in windows]
        counts[number, in_session, lacks_value] = np.outer(in_window, [counted[number] for counted in groups])
    by_cell = counts.reshape(len(slots), 4 * cells)
    return {
        "windows": np.array(windows, np.uint64),
        "group": group,
        "groups": np.array(len(groups)),
        "cells": np.array(cells),
        "session_cells": np.array(2 * cells),
        "session_gap": np.array(spec.limits.session_gap),
        "whole": _tier(slots, by_cell, list(range(len(slots)))),
        "far": _tier(slots, by_cell, [number for number, slot in enumerate(slots) if not _is_near(spec, slot)]),
        "near": _tier(slots, by_cell, [number for number, slot in enumerate(slots) if _is_near(spec, slot)]),
    }


def _is_near(spec: FeatureSpec, slot: _Slot) -> bool:
    is_short = slot.in_session or slot.window_ms * _NEAR_SHARE <= spec.limits.history
    return is_short and slot.source not in _ROUNDED


def _tier(slots: Sequence[_Slot], by_cell: Bools, numbers: Sequence[int]) -> Tier:
    chosen, counted = [slots[number] for number in numbers], by_cell[list(numbers)]
    added = np.array([slot.source in _ADDED for slot in chosen], np.bool_)[:, np.newaxis]
    spans = list(_spans(chosen))
    return Tier(
        slots=slice(None, -1) if len(numbers) == len(slots) else np.array(numbers, np.int64),
        weights=np.where(added, np.where(counted, 0.0, -math.inf), counted),
        sums=bisect_right([slot.source for slot in chosen], _DISTINCT),
        operations=tuple((*_OPERATIONS[source], span) for source, span in spans if source in _OPERATIONS),
        distinct=tuple((span, np.asarray(counted[span].any(axis=0))) for source, span in spans if source == _DISTINCT),
        decay_rates=np.array([[-1 / slot.half_life] for slot in chosen if slot.half_life]).reshape(-1, 1),
        cells=np.asarray(counted.any(axis=0)),
        least=np.where(added, -math.inf, 0.0),
    )


def _compile_ratios(spec: FeatureSpec, column: Mapping[str, int]) -> Iterator[Ratios]:
    levels = _ratio_levels(spec)
    for _, alike in groupby(sorted(levels, key=levels.__getitem__), key=levels.__getitem__):
        ratios = {name: feature for name in alike if isinstance(feature := spec.features[name], Ratio)}
        yield Ratios(
            np.array([column[name] for name in ratios]),
            np.array([column[feature.ratio[side]] for side in (0, 1) for feature in ratios.values()]),
            np.array([feature.prior[side] for side in (0, 1) for feature in ratios.values()]),
        )


def _ratio_levels(spec: FeatureSpec) -> dict[str, int]:
    """Depth of each ratio: 0 where its operands are no ratios."""
    operands = {name: feature.ratio for name, feature in spec.features.items() if isinstance(feature, Ratio)}
    levels: dict[str, int] = {}
    for name in TopologicalSorter(operands).static_order():
        if name in operands:
            levels[name] = 1 + max(levels.get(operand, -1) for operand in operands[name])
    return levels


@np.errstate(over="ignore")  # a category's number beyond float32 is infinite
def _compile_traits(traits: Mapping[str, Trait], column: Mapping[str, int]) -> dict[str, Any]:
    ids, trait_of = np.unique([events.hash32(feature.trait) for feature in traits.values()], return_inverse=True)
    coded = [
        {events.hash32(category) << 32 | events.hash32(feature.trait): code for category, code in feature.codes.items()}
        for feature in traits.values()
    ]
    keys = sorted(set().union(*coded))
    codes = [
        [*(own.get(key, feature.other) for key in keys), feature.other, math.nan]
        for own, feature in zip(coded, traits.values(), strict=True)
    ]
    return {
        "trait_ids": ids.astype(np.uint32),
        "trait_of": trait_of,
        "trait_rows": np.arange(len(traits)),
        "trait_keys": np.array(keys, np.uint64),
        "trait_codes": np.array(codes, np.float32).reshape(len(traits), len(keys) + 2),
        "trait_is_text": np.array([feature.categories is not None for feature in traits.values()], np.bool_),
        "trait_columns": np.array([column[name] for name in traits], np.int64),
    }


class Evaluated(NamedTuple):
    """Features of n rows, and what they were computed from."""

    matrix: npt.NDArray[np.float32]  # [n, F]
    events: Ints  # [n] how many events counted
    last_age_ms: Ints  # [n] age of the latest of them; -1 without any
    broken: int  # records that were left out because their check does not fit


def matrix(
    plan: Plan,
    records: Records,
    starts: Ints,
    now_ms: Ints,
    traits: Records | None = None,
    trait_starts: Ints | None = None,
    request: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Features of n rows as float32[n, F], columns in the order of the spec.

    records: RECORD[E], the events of row 0, then of row 1 ...; any order, duplicates and broken records allowed.
    starts: int64[n + 1], row i has records[starts[i]:starts[i + 1]]. now_ms: int64[n], Unix time in milliseconds.
    traits, trait_starts: the same for trait records. request: float32[n, R] from `Plan.encode_request`.

    Windows are half-open: an event at exactly `now` counts, one at exactly `now - window` does not.
    """
    return evaluate(plan, records, starts, now_ms, traits, trait_starts, request).matrix


@np.errstate(all="ignore")  # 0 / 0 is NaN and a sum beyond float32 infinite, as documented
def evaluate(
    plan: Plan,
    records: Records,
    starts: Ints,
    now_ms: Ints,
    traits: Records | None = None,
    trait_starts: Ints | None = None,
    request: npt.NDArray[np.float32] | None = None,
) -> Evaluated:
    """What `matrix` gives, and from how many events of what age; the same arguments."""
    rows = len(now_ms)
    out = np.empty((rows, plan.width), np.float32)
    counts, last_age_ms, broken = np.empty(rows, np.int64), np.empty(rows, np.int64), 0
    last_age_ms.fill(-1)
    for first, end in _blocks(starts, rows):
        block = select(plan, records[starts[first] : starts[end]], starts[first : end + 1], now_ms[first:end])
        _fill(plan, out[first:end], block)
        counts[first:end] = block.counts
        last_age_ms[first:end][block.occupied] = block.age_ms[block.last]
        broken += block.broken
    for column, part, offset_ms in plan.clocks:
        out[:, column] = _clock(part, now_ms + offset_ms)
    if traits is not None and trait_starts is not None and len(traits):
        sound = events.valid(traits)
        broken += len(sound) - int(np.count_nonzero(sound))
        if len(plan.trait_columns):
            out[:, plan.trait_columns] = _trait_values(plan, traits, sound, trait_starts, now_ms)
    if request is not None and len(plan.request_columns):
        out[:, plan.request_columns] = request
    out += _ZERO  # -0.0 becomes 0.0: which came first must not show
    _divide(plan, out, ())
    return Evaluated(out, counts, last_age_ms, broken)


def _blocks(starts: Ints, rows: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of rows with about BLOCK_EVENTS events each."""
    first = 0
    while first < rows:
        end = rows
        if rows - first > BLOCK_EVENTS or starts[rows] - starts[first] > BLOCK_EVENTS:
            end = int(np.searchsorted(starts, starts[first] + BLOCK_EVENTS, "right")) - 1
            end = min(max(end, first + 1), rows, first + BLOCK_EVENTS)
        yield first, end
        first = end


class _Block(NamedTuple):
    """The events of a block of rows that count: known, in history, sorted, unique, at most `limits.records` a row."""

    records: Records  # [E]
    row: Ints  # [E]
    age_ms: Ints  # [E]
    cell: Ints  # [E] by window and kind alone
    counts: Ints  # [n]
    occupied: Ints | slice  # the rows that have events
    heads: Ints  # [occupied] place of the first event
    last: Ints  # [occupied] place of the last event
    broken: int


def select(plan: Plan, records: Records, starts: Ints, now_ms: Ints) -> _Block:
    """The events that count at `now_ms`, in canonical order (ts, kind, id), each once; the latest up to the limit."""
    records, broken = np.ascontiguousarray(records), 0
    counts, ends = starts[1:] - starts[:-1], starts[1:] - starts[:1]
    row = _PLACES[: len(counts)].repeat(counts)
    age = now_ms.repeat(counts) - records["ts_ms"]
    # As unsigned numbers negative ages, of events to come, are beyond any history.
    cell = plan.windows.searchsorted(age.view(np.uint64), "right")
    cell *= plan.groups
    cell += plan.group.take(records["kind"])
    sound = events.valid(records)
    keep = cell < plan.cells
    keep &= sound
    if np.count_nonzero(keep) < len(keep):
        broken = len(sound) - int(np.count_nonzero(sound))
        records, row, age, cell = records.compress(keep), row[keep], age[keep], cell[keep]
        counts = np.bincount(row, minlength=len(counts))
        ends = counts.cumsum()
    if not _in_order(records, row, age):
        order = events.canonical_order(records, row)
        order = order[events.first_of_each(records.take(order), row[order])]
        records, row, age, cell = records.take(order), row[order], age[order], cell[order]
        counts = np.bincount(row, minlength=len(counts))
        ends = counts.cumsum()
    limit = plan.spec.limits.records
    if len(records) > limit and counts.max() > limit:
        keep = np.arange(len(records)) >= (ends - limit)[row]
        records, row, age, cell = records.compress(keep), row[keep], age[keep], cell[keep]
        counts = np.minimum(counts, limit)
        ends = counts.cumsum()
    occupied: Ints | slice = slice(None)
    if np.count_nonzero(counts) < len(counts):
        occupied = counts.nonzero()[0]
        ends = ends[occupied]
    return _Block(records, row, age, cell, counts, occupied, ends - counts[occupied], ends - _ONE_MORE, broken)


def _in_order(records: Records, row: Ints, age: Ints) -> bool:
    """Whether records are in canonical order within each row, and unique."""
    behind = age[1:] >= age[:-1]
    behind &= row[1:] == row[:-1]
    if not np.count_nonzero(behind):
        return True
    places = behind.nonzero()[0]
    before, after = records.take(places), records.take(places + 1)
    key = [part["kind"].astype(np.uint64) << np.uint64(32) | part["id"] for part in (before, after)]
    return bool(((before["ts_ms"] == after["ts_ms"]) & (key[0] < key[1])).all())


def _fill(plan: Plan, out: npt.NDArray[np.float32], block: _Block) -> None:
    """Write the columns of float32[n, F] that are made from events; the others become NaN."""
    if len(block.heads) < len(out):
        out[:] = plan.nothing
    if len(block.heads):
        out[block.occupied] = _statistics(plan, block).take(plan.slot_of, axis=0).T


class _Taken(NamedTuple):
    """Events that slots look at: all of a block, or some of them."""

    records: Records  # [E]
    row: Ints  # [E]
    age_ms: Ints  # [E]
    cell: Ints  # [E] in full
    value: Floats  # [E] 0 for an absent one
    number: Floats  # [E] the place in the block, from 1 on
    heads: Ints  # places of the first event of each row that has any


def _statistics(plan: Plan, block: _Block) -> Floats:
    """float64[S + 1, occupied]: the slots of each row that has events, and a line of NaN."""
    value, cell = _values(plan, block)
    taken = _Taken(block.records, block.row, block.age_ms, cell, value[1:], _NUMBERS[: len(cell)], block.heads)
    made = np.empty((len(plan.whole.weights) + 1, len(block.heads)))
    made[-1] = math.nan
    near = _near(plan, cell)
    if near is None:
        _reduce(plan.whole, taken, made[:-1])
    else:
        _reduce_apart(plan, taken, near, made)
    largest = made[plan.whole.sums : -1]
    largest[np.isinf(largest)] = math.nan
    largest /= plan.scale
    made[plan.means] = made[plan.totals] / made[plan.means]
    made[plan.latest] = value[made[plan.latest].astype(np.int64)]
    return made


def _reduce(tier: Tier, taken: _Taken, out: Floats) -> None:
    """Write the slots of a tier, float64[S, rows], as they are before they are scaled."""
    weights = tier.weights.take(taken.cell, axis=1)
    _take(tier, taken, weights)
    for slots, counted in tier.distinct:
        _drop_repeats(taken, weights[slots], counted[taken.cell])
    np.add.reduceat(weights[: tier.sums], taken.heads, 1, None, out[: tier.sums])
    np.maximum.reduceat(weights[tier.sums :], taken.heads, 1, None, out[tier.sums :])


def _near(plan: Plan, cell: Ints) -> Ints | None:
    """Places of the events that short windows count, where it is worth while to look at them alone."""
    if len(cell) < NEAR_EVENTS or not len(plan.near.weights):
        return None
    places = plan.near.cells.take(cell).nonzero()[0]
    return places if len(places) * _FEW <= len(cell) else None


def _reduce_apart(plan: Plan, taken: _Taken, places: Ints, made: Floats) -> None:
    """Write all slots, those of short windows from the few events that they count, at these places."""
    far = np.empty((len(plan.far.weights), len(taken.heads)))
    _reduce(plan.far, taken, far)
    made[plan.far.slots] = far
    near = plan.near.least.repeat(len(taken.heads), axis=1)
    if len(places):
        starts = places.searchsorted(taken.heads)
        occupied = np.empty(len(starts), np.bool_)
        np.not_equal(starts[1:], starts[:-1], occupied[:-1])
        occupied[-1] = starts[-1] < len(places)
        some = _Taken(
            taken.records.take(places),
            taken.row[places],
            taken.age_ms[places],
            taken.cell[places],
            taken.value[places],
            taken.number[places],
            starts[occupied],
        )
        found = np.empty((len(near), len(some.heads)))
        _reduce(plan.near, some, found)
        near[:, occupied] = found
    made[plan.near.slots] = near


def _values(plan: Plan, block: _Block) -> tuple[Floats, Ints]:
    """float64[E + 1]: NaN, and the values of the events, 0 for an absent one; int64[E]: their cells in full."""
    cell = block.cell
    value = np.empty(len(cell) + 1)
    value[0], value[1:] = math.nan, block.records["value"]
    lacking = np.isfinite(value[1:])
    if np.count_nonzero(lacking) < len(lacking):
        np.logical_not(lacking, lacking)
        np.copyto(value[1:], 0.0, where=lacking)
        cell = np.asarray(cell + lacking * plan.cells)
    if plan.has_session and np.count_nonzero(block.age_ms[block.last] < plan.session_gap):
        cell = cell + _in_session(plan, block) * plan.session_cells
    return value, cell


def _in_session(plan: Plan, block: _Block) -> Bools:
    """bool[E]: whether no gap of `session_gap` or more lies between the event and `now`."""
    age, ends = block.age_ms, block.last + _ONE_MORE
    before = np.empty(len(age) + 1, np.int64)  # how long nothing happened before an event, or before now
    before[0] = plan.session_gap
    np.subtract(age[:-1], age[1:], before[1:-1])
    before[ends] = age[block.last]
    begins = (before >= plan.session_gap).nonzero()[0]
    begin = begins[begins.searchsorted(ends, "right") - _ONE_MORE]
    in_session: Bools = _PLACES[: len(age)] >= begin.repeat(block.counts[block.occupied])
    return in_session


def _take(tier: Tier, taken: _Taken, weights: Floats) -> None:
    """Turn the weights of events, float64[S, E], into what the slots take of them, in place."""
    age = taken.age_ms.astype(np.float64)
    operands = {"value": taken.value, "age": age, "place": taken.number}
    if len(tier.decay_rates):
        operands["decay"] = np.exp2(tier.decay_rates * age)
    for combine, operand, slots in tier.operations:
        own = weights[slots]
        combine(own, operands[operand], own)


def _drop_repeats(taken: _Taken, weights: Floats, counted: Bools) -> None:
    """Leave only a row's last event of an attribute: whenever a window holds the attribute it holds that event."""
    places = counted.nonzero()[0]
    if not len(places):
        return
    key = events.words(taken.records)[:, 1][places] & _ATTRIBUTE_MASK
    key |= taken.row[places] << _PLACE_BITS
    key |= places
    key = key.view(np.uint64)
    key.sort()
    again = key[:-1][(key[1:] ^ key[:-1]) <= _PLACE_MASK]
    weights[:, again & _PLACE_MASK] = 0.0
    if key[0] < _FIRST_ATTRIBUTE:  # an event without an attribute
        weights[:, key[: key.searchsorted(_FIRST_ATTRIBUTE)] & _PLACE_MASK] = 0.0


def _clock(part: str, local_ms: Ints) -> Ints:
    if part == "hour":
        return np.asarray(local_ms // _HOUR_MS % 24)
    days = local_ms // _DAY_MS
    if part == "weekday":
        return np.asarray((days + 3) % 7)
    dates = days.astype("datetime64[D]")
    months = dates.astype("datetime64[M]")
    if part == "day":
        return np.asarray((dates - months).astype(np.int64) + 1)
    return np.asarray(months.astype(np.int64) % 12 + 1)


def _trait_values(plan: Plan, traits: Records, sound: Bools, starts: Ints, now_ms: Ints) -> npt.NDArray[np.float32]:
    """float32[n, T]: the latest known value of each trait at `now_ms`, coded; NaN without one that is sound."""
    counts, rows = starts[1:] - starts[:-1], len(now_ms)
    row = np.arange(rows).repeat(counts)
    age = now_ms.repeat(counts) - traits["ts_ms"]
    ids = traits["id"]
    place = plan.trait_ids.searchsorted(ids)
    keep = plan.trait_ids.take(place, mode="clip") == ids
    keep &= traits["kind"] >= _TRAIT_NUMBER
    keep &= age >= 0
    keep &= sound
    if np.count_nonzero(keep) < len(keep):
        traits, row, age, place = traits.compress(keep), row[keep], age[keep], place[keep]
        if not len(traits):
            return np.full((rows, len(plan.trait_of)), np.nan, np.float32)
    latest = np.empty((rows, len(plan.trait_ids)), np.int64)
    latest.fill(-1)
    latest[row, place] = np.arange(len(traits))
    # With several records of one trait the last one has to stay.
    if np.count_nonzero(latest + _ONE_MORE) < len(traits) and not _in_order(traits, row, age):
        order = events.canonical_order(traits, row)
        order = order[events.first_of_each(traits.take(order), row[order])]
        traits, row, place = traits.take(order), row[order], place[order]
        latest[row, place] = np.arange(len(traits))
    latest = latest.take(plan.trait_of, axis=1)
    return _trait_features(plan, traits.take(latest), latest < 0)


def _trait_features(plan: Plan, chosen: Records, absent: Bools) -> npt.NDArray[np.float32]:
    """float32[n, T] of the records [n, T] that the features are read from."""
    made: npt.NDArray[np.float32] = chosen["value"]
    made[~np.isfinite(made)] = math.nan
    if len(plan.trait_keys):
        key = events.words(chosen)[..., 1].view(np.uint64)
        place = plan.trait_keys.searchsorted(key)
        place[plan.trait_keys.take(place, mode="clip") != key] = -2
        place[chosen["kind"] == _TRAIT_NUMBER] = -1
        made = np.where(plan.trait_is_text, plan.trait_codes[plan.trait_rows, place], made)
    made[absent] = math.nan
    return made


@np.errstate(all="ignore")
def fill_ratios(plan: Plan, out: npt.NDArray[np.float32], fixed: Sequence[int] = ()) -> None:
    """Compute the ratio columns of float32[n, F] from the others, in place; the columns `fixed` stay as they are."""
    _divide(plan, out, fixed)


def _divide(plan: Plan, out: npt.NDArray[np.float32], fixed: Sequence[int]) -> None:
    kept = out[:, fixed] if len(fixed) else None
    for ratio in plan.ratios:
        numbers = out.take(ratio.operands, axis=1) + ratio.priors  # in float64, as the priors are
        above, below = numbers[:, : len(ratio.columns)], numbers[:, len(ratio.columns) :]
        out[:, ratio.columns] = above / below
        if kept is not None:
            out[:, fixed] = kept
