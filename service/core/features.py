"""The kernel: features of many visitors at once, a pure function of their event records and of `now`.

A spec is compiled once into a `Plan`; `matrix` then evaluates every row of a call together. All windowed
statistics become the columns of two arrays over the events, one that is summed and one of which the minimum is
taken, so that the number of numpy calls does not grow with the number of features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.core import events
from service.core.events import Records
from service.core.spec import Aggregate, Clock, Decay, Distinct, FeatureSpec, Mean, Ratio, Request, Session, Trait

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Rows are taken in blocks of about this many events, so that the arrays of one block stay in the L2 cache.
BLOCK_EVENTS: Final = 4096
_DAY_MS: Final = 86_400_000

# The columns of `_sources`: what of an event is summed or minimised. Decays and distinct flags follow them.
_ONE, _VALUE, _HAS_VALUE, _AGE, _OLDNESS, _LOW, _HIGH, _PLACE = range(8)
_FIXED_SOURCES: Final = 8


@dataclass(frozen=True)
class Outputs:
    """Feature columns that are made alike, and the slots, or other columns, that they are made from."""

    columns: Ints
    slots: Ints
    others: Ints  # the denominators of means and ratios
    scale: Floats  # divides a minimum; the first prior of a ratio
    absent: Floats  # stands where no event counts; the second prior of a ratio


@dataclass(frozen=True)
class Plan:
    """A compiled feature spec. Made by `compile`; immutable and shared by all threads.

    A slot is one statistic of one window: of the events with `counted[kind]` and an age below `window_ms`, the sum
    (the first `sums` slots) or the minimum (the rest) of the source `source`.
    """

    spec: FeatureSpec
    dense_kind: npt.NDArray[np.uint8]  # [65536] catalogue code -> 0 ... K-1, or K where unknown
    sums: int
    used: tuple[int, ...]  # the sources that any slot takes
    source: Ints  # [S] index into `used`
    counted: Bools  # [K + 1, S]; the last row, unknown kinds, is False
    window_ms: Ints  # [S]
    empty: Floats  # [S] what an event outside the window stands for: 0 or infinity
    session_slots: Ints  # slots that take events of the current session alone
    decay_rates: Floats  # [D] -1 / half-life in milliseconds
    distinct_kinds: tuple[Bools, ...]  # per set of kinds whose attributes are counted: [K + 1]
    direct: Outputs  # one slot over a scale
    means: Outputs
    latest: Outputs
    ratios: tuple[Outputs, ...]  # by depth: a ratio of ratios comes after them
    clocks: tuple[tuple[int, str, int], ...]  # column, part, offset in milliseconds
    trait_ids: npt.NDArray[np.uint32]  # [U] ascending, the traits that T features read
    trait_of: Ints  # [T] index into trait_ids
    trait_prefix: npt.NDArray[np.uint64]  # [T] the feature's place << 32
    trait_keys: npt.NDArray[np.uint64]  # [C] ascending: trait_prefix | hash of the category
    trait_codes: npt.NDArray[np.float32]  # [C]
    trait_other: npt.NDArray[np.float32]  # [T]
    trait_is_text: Bools  # [T]
    trait_columns: Ints  # [T]
    request_columns: Ints  # [R]

    @property
    def width(self) -> int:
        """F, the number of features."""
        return len(self.spec.features)

    def encode_request(self, context: Mapping[str, object] | None) -> list[float]:
        """The R request features of one context, coded as the spec says; NaN where absent or of the wrong type."""
        return [encode(feature, (context or {}).get(feature.request)) for feature in self.spec.requests.values()]


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


class _Builder:
    """Collects slots and outputs while features are compiled; equal slots are shared."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self.place = {kind.code: place for place, kind in enumerate(spec.events.values())}
        self.half_lives = list({kind.half_life: None for kind in spec.features.values() if isinstance(kind, Decay)})
        self.distinct = list(
            {self._codes(kind.kinds): None for kind in spec.features.values() if isinstance(kind, Distinct)}
        )
        self.slots: dict[tuple[int, tuple[int, ...], int | str | None], int] = {}
        self.outputs: dict[str, list[tuple[int, int, int, float, float]]] = {}

    def _codes(self, kinds: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({self.place[code] for code in self.spec.codes(kinds)}))

    def _slot(self, source: int, kinds: Sequence[str], window: int | str | None) -> int:
        return self.slots.setdefault((source, self._codes(kinds), window), len(self.slots))

    def _add(self, group: str, column: int, slot: int, other: int = 0, scale: float = 1, absent: float = 0) -> None:
        self.outputs.setdefault(group, []).append((column, slot, other, scale, absent))

    def add_sums(self, column: int, feature: object) -> None:
        """Slots and output of a feature that is a sum over events, or a mean."""
        if isinstance(feature, Session) and feature.session == "count":
            self._add("direct", column, self._slot(_ONE, ("any",), "session"))
        elif isinstance(feature, Aggregate) and feature.operation in ("count", "sum", "decay", "distinct", "mean"):
            slot = self._slot(self._summed_source(feature), feature.kinds, feature.window)
            if isinstance(feature, Mean):
                self._add("means", column, slot, self._slot(_HAS_VALUE, feature.kinds, feature.window))
            else:
                self._add("direct", column, slot)

    def _summed_source(self, feature: Aggregate) -> int:
        if isinstance(feature, Decay):
            return _FIXED_SOURCES + self.half_lives.index(feature.half_life)
        if isinstance(feature, Distinct):
            return _FIXED_SOURCES + len(self.half_lives) + self.distinct.index(self._codes(feature.kinds))
        return _ONE if feature.operation == "count" else _VALUE

    def add_minima(self, column: int, feature: object) -> None:
        """Slot and output of a feature that is the minimum of something over events."""
        if isinstance(feature, Session) and feature.session == "duration":
            self._add("direct", column, self._slot(_OLDNESS, ("any",), "session"), scale=-1000)
        elif isinstance(feature, Aggregate) and feature.operation in _MINIMA:
            source, scale = _MINIMA[feature.operation]
            slot = self._slot(source, feature.kinds, feature.window)
            group = "latest" if feature.operation == "latest" else "direct"
            self._add(group, column, slot, scale=scale, absent=math.nan)

    def add_ratio(self, level: int, column: int, numerator: int, denominator: int, prior: tuple[float, float]) -> None:
        """Output of a ratio of two other columns."""
        self._add(f"ratio{level}", column, numerator, denominator, *prior)

    def group(self, name: str) -> Outputs:
        """The outputs of one group as arrays."""
        listed = np.array(self.outputs.get(name, []), np.float64).reshape(-1, 5).T
        column, slot, other = listed[:3].astype(np.int64)
        return Outputs(column, slot, other, listed[3], listed[4])


_MINIMA: Final = {
    "recency": (_AGE, 1000.0),
    "tenure": (_OLDNESS, -1000.0),
    "min": (_LOW, 1.0),
    "max": (_HIGH, -1.0),
    "latest": (_PLACE, 1.0),
}


def compile(spec: FeatureSpec) -> Plan:  # noqa: A001 - features.compile(spec) reads as re.compile does
    """The plan of a spec; costs some hundred microseconds, so make it once."""
    builder = _Builder(spec)
    column = {name: place for place, name in enumerate(spec.features)}
    for add in (builder.add_sums, builder.add_minima):
        for name, feature in spec.features.items():
            add(column[name], feature)
        if add == builder.add_sums:
            sums = len(builder.slots)
    levels = _ratio_levels(spec)
    for name, level in levels.items():
        feature = spec.features[name]
        if isinstance(feature, Ratio):
            builder.add_ratio(level, column[name], column[feature.ratio[0]], column[feature.ratio[1]], feature.prior)
    kinds = len(builder.place)
    dense = np.full(65536, kinds, np.uint8)
    for code, place in builder.place.items():
        dense[code] = place
    counted = np.zeros((kinds + 1, len(builder.slots)), np.bool_)
    for (_, codes, _), slot in builder.slots.items():
        counted[list(codes), slot] = True
    used = tuple(sorted({source for source, _, _ in builder.slots}))
    history = spec.limits.history
    windows = [window for _, _, window in builder.slots]
    return Plan(
        spec=spec,
        dense_kind=dense,
        sums=sums,
        used=used,
        source=np.array([used.index(source) for source, _, _ in builder.slots], np.int64),
        counted=counted,
        window_ms=np.array(
            [min(window, history) if isinstance(window, int) else history for window in windows], np.int64
        ),
        empty=np.where(np.arange(len(windows)) < sums, 0.0, np.inf),
        session_slots=np.array([slot for slot, window in enumerate(windows) if window == "session"], np.int64),
        decay_rates=np.array([-1 / half_life for half_life in builder.half_lives]),
        distinct_kinds=tuple(np.isin(np.arange(kinds + 1), codes) for codes in builder.distinct),
        direct=builder.group("direct"),
        means=builder.group("means"),
        latest=builder.group("latest"),
        ratios=tuple(builder.group(f"ratio{level}") for level in range(max(levels.values(), default=-1) + 1)),
        clocks=tuple(
            (column[name], feature.clock, feature.offset_ms)
            for name, feature in spec.features.items()
            if isinstance(feature, Clock)
        ),
        request_columns=np.array([column[name] for name in spec.requests], np.int64),
        **_compile_traits(spec.traits, column),
    )


def _ratio_levels(spec: FeatureSpec) -> dict[str, int]:
    """Depth of each ratio: 0 where its operands are no ratios."""
    operands = {name: feature.ratio for name, feature in spec.features.items() if isinstance(feature, Ratio)}
    levels: dict[str, int] = {}
    for name in TopologicalSorter(operands).static_order():
        if name in operands:
            levels[name] = 1 + max(levels.get(operand, -1) for operand in operands[name])
    return levels


def _compile_traits(traits: Mapping[str, Trait], column: Mapping[str, int]) -> dict[str, Any]:
    coded = {
        place << 32 | events.hash32(category): code
        for place, feature in enumerate(traits.values())
        for category, code in feature.codes.items()
    }
    keys = sorted(coded)
    ids, trait_of = np.unique([events.hash32(feature.trait) for feature in traits.values()], return_inverse=True)
    return {
        "trait_ids": ids.astype(np.uint32),
        "trait_of": trait_of,
        "trait_prefix": np.arange(len(traits), dtype=np.uint64) << np.uint64(32),
        "trait_keys": np.array(keys, np.uint64),
        "trait_codes": np.array([coded[key] for key in keys], np.float32),
        "trait_other": np.array([feature.other for feature in traits.values()], np.float32),
        "trait_is_text": np.array([feature.categories is not None for feature in traits.values()], np.bool_),
        "trait_columns": np.array([column[name] for name in traits], np.int64),
    }


@dataclass(frozen=True)
class Evaluated:
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
    made = Evaluated(
        np.full((rows, plan.width), np.nan, np.float32), np.zeros(rows, np.int64), np.full(rows, -1, np.int64), 0
    )
    broken = 0
    with np.errstate(all="ignore"):  # 0 / 0 is NaN and a sum beyond float32 infinite, as documented
        for first, end in _blocks(starts, rows):
            block = select(plan, records[starts[first] : starts[end]], starts[first : end + 1], now_ms[first:end])
            _fill(plan, made.matrix[first:end], block)
            made.events[first:end] = block.counts
            occupied = block.counts.nonzero()[0]
            made.last_age_ms[first + occupied] = block.age_ms[(block.starts + block.counts - 1)[occupied]]
            broken += block.broken
        for column, part, offset_ms in plan.clocks:
            made.matrix[:, column] = _clock(part, now_ms + offset_ms)
        if traits is not None and trait_starts is not None and len(plan.trait_columns):
            made.matrix[:, plan.trait_columns] = _trait_values(plan, traits, trait_starts, now_ms)
        if request is not None and len(plan.request_columns):
            made.matrix[:, plan.request_columns] = request
        np.add(made.matrix, np.float32(0), out=made.matrix)  # -0.0 becomes 0.0: which came first must not show
    fill_ratios(plan, made.matrix)
    return replace(made, broken=broken) if broken else made


def _blocks(starts: Ints, rows: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of rows with about BLOCK_EVENTS events each."""
    first = 0
    while first < rows:
        end = rows
        if starts[rows] - starts[first] > BLOCK_EVENTS or rows - first > BLOCK_EVENTS:
            end = int(np.searchsorted(starts, starts[first] + BLOCK_EVENTS, "right")) - 1
            end = min(max(end, first + 1), rows, first + BLOCK_EVENTS)
        yield first, end
        first = end


@dataclass(frozen=True)
class _Block:
    """The events of a block of rows that count: known, in history, sorted, unique, at most `limits.records` a row."""

    records: Records
    row: Ints  # [E]
    starts: Ints  # [n]
    counts: Ints  # [n]
    age_ms: Ints  # [E]
    kind: npt.NDArray[np.uint8]  # [E] dense
    broken: int


def select(plan: Plan, records: Records, starts: Ints, now_ms: Ints) -> _Block:
    """The events that count at `now_ms`, in canonical order (ts, kind, id), each once; the latest up to the limit."""
    counts, ends = starts[1:] - starts[:-1], starts[1:] - starts[0]
    row = np.repeat(np.arange(len(counts)), counts)
    age = now_ms[row] - records["ts_ms"]
    kind = plan.dense_kind[records["kind"]]
    keep = events.valid(records)
    broken = len(keep) - int(np.count_nonzero(keep))
    # As unsigned numbers negative ages, of events to come, are beyond any history.
    keep &= age.view(np.uint64) < plan.spec.limits.history
    keep &= kind < len(plan.counted) - 1
    if np.count_nonzero(keep) < len(keep):
        records, row, age, kind = records[keep], row[keep], age[keep], kind[keep]
        counts = np.bincount(row, minlength=len(counts))
        ends = counts.cumsum()
    if not _in_order(records, row):
        order = events.canonical_order(records, row)
        records, row = records[order], row[order]
        order = order[events.first_of_each(records, row)]
        keep = events.first_of_each(records, row)
        records, row = records[keep], row[keep]
        age, kind = age[order], kind[order]
        counts = np.bincount(row, minlength=len(counts))
        ends = counts.cumsum()
    limit = plan.spec.limits.records
    if len(records) > limit and counts.max() > limit:
        keep = np.arange(len(records)) >= (ends - limit)[row]
        records, row, age, kind = records[keep], row[keep], age[keep], kind[keep]
        counts = np.minimum(counts, limit)
        ends = counts.cumsum()
    return _Block(records, row, ends - counts, counts, age, kind, broken)


def _in_order(records: Records, row: Ints) -> bool:
    """Whether records are in canonical order within each row, and unique."""
    ts = records["ts_ms"]
    behind = ts[1:] <= ts[:-1]
    behind &= row[1:] == row[:-1]
    if not np.count_nonzero(behind):
        return True
    places = np.flatnonzero(behind)
    before, after = records[places], records[places + 1]
    key = [part["kind"].astype(np.uint64) << np.uint64(32) | part["id"] for part in (before, after)]
    return bool(((before["ts_ms"] == after["ts_ms"]) & (key[0] < key[1])).all())


def _fill(plan: Plan, out: npt.NDArray[np.float32], block: _Block) -> None:
    if not len(plan.source):
        return
    slots = np.empty((len(out), len(plan.source)))
    slots[:] = plan.empty
    if len(block.records):
        weights = np.where(_mask(plan, block), _sources(plan, block)[:, plan.source], plan.empty)
        occupied = block.counts > 0
        heads = block.starts[occupied]
        slots[occupied, : plan.sums] = np.add.reduceat(weights[:, : plan.sums], heads, axis=0)
        slots[occupied, plan.sums :] = np.minimum.reduceat(weights[:, plan.sums :], heads, axis=0)
    _write(plan, out, slots, block)


def _mask(plan: Plan, block: _Block) -> Bools:
    """bool[E, S]: which events count in which slot."""
    mask = plan.counted[block.kind]
    mask &= block.age_ms[:, None] < plan.window_ms
    if len(plan.session_slots):
        mask[:, plan.session_slots] &= _in_session(plan, block)[:, None]
    return mask


def _sources(plan: Plan, block: _Block) -> Floats:
    """float64[E, sources]: what of each event is summed or minimised, in the order of `plan.used`."""
    value, age = block.records["value"], block.age_ms
    known = np.isfinite(value)
    sources = np.empty((len(value), len(plan.used)))
    for column, source in enumerate(plan.used):
        if source == _ONE:
            sources[:, column] = 1.0
        elif source == _VALUE:
            sources[:, column] = np.where(known, value, np.float32(0))
        elif source == _HAS_VALUE:
            sources[:, column] = known
        elif source == _AGE:
            sources[:, column] = age
        elif source == _OLDNESS:
            np.negative(age, out=sources[:, column])
        elif source == _LOW:
            sources[:, column] = np.where(known, value, np.float32(np.inf))
        elif source == _HIGH:
            sources[:, column] = np.where(known, -value, np.float32(np.inf))
        elif source == _PLACE:
            sources[:, column] = np.where(known, -np.arange(len(value)), np.inf)
        elif source < _FIXED_SOURCES + len(plan.decay_rates):
            np.exp2(age * plan.decay_rates[source - _FIXED_SOURCES], out=sources[:, column])
        else:
            kinds = plan.distinct_kinds[source - _FIXED_SOURCES - len(plan.decay_rates)]
            sources[:, column] = _last_of_attribute(block, kinds)
    return sources


def _write(plan: Plan, out: npt.NDArray[np.float32], slots: Floats, block: _Block) -> None:
    """Feature columns from slots [n, S]."""
    direct = slots[:, plan.direct.slots]
    np.divide(direct, plan.direct.scale, out=direct)
    if plan.sums < len(plan.source):
        np.copyto(direct, plan.direct.absent, where=np.isinf(direct))
    out[:, plan.direct.columns] = direct
    if len(plan.means.columns):
        out[:, plan.means.columns] = slots[:, plan.means.slots] / slots[:, plan.means.others]
    if len(plan.latest.columns) and len(block.records):
        least = slots[:, plan.latest.slots]
        nothing = np.isinf(least)
        values = block.records["value"][np.where(nothing, 0, -least).astype(np.int64)]
        out[:, plan.latest.columns] = np.where(nothing, np.nan, values)


def _last_of_attribute(block: _Block, kinds: Bools) -> Bools:
    """bool[E]: the row's last event with this attribute. Whenever a window holds the attribute it holds that event."""
    chosen = (kinds[block.kind] & (block.records["attribute"] != 0)).nonzero()[0]
    flags = np.zeros(len(block.kind), np.bool_)
    if len(chosen):
        key = block.row[chosen] << 32 | block.records["attribute"][chosen]
        order = np.argsort(key)
        ordered = key[order]
        first = np.ones(len(ordered), np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
        flags[chosen[np.maximum.reduceat(order, first.nonzero()[0])]] = True
    return flags


def _in_session(plan: Plan, block: _Block) -> Bools:
    """bool[E]: whether no gap of `session_gap` or more lies between the event and `now`."""
    gap = plan.spec.limits.session_gap
    until_next = block.age_ms.copy()
    until_next[:-1] -= block.age_ms[1:] * (block.row[1:] == block.row[:-1])
    last_break = np.full(len(block.counts), -1)
    breaks = (until_next >= gap).nonzero()[0]
    last_break[block.row[breaks]] = breaks  # ascending, so the last one of a row stays
    return np.asarray(np.arange(len(block.row)) > last_break[block.row])


def _clock(part: str, local_ms: Ints) -> Floats:
    days = local_ms // _DAY_MS
    if part == "hour":
        return (local_ms % _DAY_MS // 3_600_000).astype(np.float64)
    if part == "weekday":
        return ((days + 3) % 7).astype(np.float64)
    if part == "day":
        dates = days.astype("datetime64[D]")
        return np.asarray((dates - dates.astype("datetime64[M]")).astype(np.int64) + 1, np.float64)
    months = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    return (months % 12 + 1).astype(np.float64)


def _trait_values(plan: Plan, traits: Records, starts: Ints, now_ms: Ints) -> npt.NDArray[np.float32]:
    """float32[n, T]: the latest known value of each trait at `now_ms`, coded; NaN without one."""
    rows = len(now_ms)
    row = np.repeat(np.arange(rows), starts[1:] - starts[:-1])
    place = np.searchsorted(plan.trait_ids, traits["id"])
    np.minimum(place, len(plan.trait_ids) - 1, out=place)
    keep = events.valid(traits)
    keep &= traits["kind"] >= events.TRAIT_NUMBER
    keep &= traits["ts_ms"] <= now_ms[row]
    keep &= plan.trait_ids[place] == traits["id"]
    if np.count_nonzero(keep) < len(keep):
        traits, row, place = traits[keep], row[keep], place[keep]
    if not _in_order(traits, row):
        order = events.canonical_order(traits, row)
        order = order[events.first_of_each(traits[order], row[order])]
        traits, row, place = traits[order], row[order], place[order]
    if not len(traits):
        return np.full((rows, len(plan.trait_columns)), np.nan, np.float32)
    latest = np.full((rows, len(plan.trait_ids)), -1)
    latest[row, place] = np.arange(len(traits))  # of several the last one stays
    latest = latest[:, plan.trait_of]
    chosen = traits[latest]
    known = latest >= 0
    value = np.where(known & np.isfinite(chosen["value"]), chosen["value"], np.float32(np.nan))
    if not len(plan.trait_keys):
        return value
    key = plan.trait_prefix | chosen["attribute"]
    at = np.minimum(np.searchsorted(plan.trait_keys, key), len(plan.trait_keys) - 1)
    codes = np.where(plan.trait_keys[at] == key, plan.trait_codes[at], plan.trait_other)
    codes = np.where(known & (chosen["kind"] == events.TRAIT_TEXT), codes, np.float32(np.nan))
    return np.where(plan.trait_is_text, codes, value)


def fill_ratios(plan: Plan, out: npt.NDArray[np.float32], fixed: Sequence[int] = ()) -> None:
    """Compute the ratio columns of float32[n, F] from the others, in place; the columns `fixed` stay as they are."""
    kept = out[:, fixed] if len(fixed) else None
    with np.errstate(all="ignore"):
        for ratio in plan.ratios:
            above = out[:, ratio.slots].astype(np.float64) + ratio.scale
            out[:, ratio.columns] = above / (out[:, ratio.others].astype(np.float64) + ratio.absent)
            if kept is not None:
                out[:, fixed] = kept
