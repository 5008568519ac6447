"""Training rows: a visitor at a cutoff, the features of that moment and whether the label came true after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from service.core import features
from service.core.errors import PropensityError
from service.core.events import Records
from service.core.features import Plan
from service.core.spec import FeatureSpec, Label
from training import source
from training.partition import NEVER, Partition
from training.source import EventLog

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]
Rows = TypeVar("Rows", "Dataset", "Population")

# Records gathered for one call of the kernel: 24 bytes each, so about 12 MB.
GATHERED_RECORDS: Final = 500_000
GOLDEN_CASES: Final = 24
GOLDEN_RECORDS: Final = 128
MIN_OF_EACH_CLASS: Final = 100
MIN_HORIZONS: Final = 1.5
# Whom the service will score is told by the last week: a whole one, as weekends differ; no longer, as shops change.
POPULATION_MS: Final = 7 * 86_400_000
POPULATION_ROWS: Final = 100_000
FEWEST_SCORED: Final = 1000
_KEY_BITS: Final = 63


class TooLittleData(PropensityError):
    """Not enough history or not enough rows of a class to train and judge a model; the message says what is missing."""


@dataclass(frozen=True)
class GoldenRow:
    """What one row was made from, kept to be checked again wherever the model is loaded."""

    records: Records
    traits: Records
    request: npt.NDArray[np.float32]
    now_ms: int


class Population(NamedTuple):
    """Whom the service scores: a row for each of m scores that it would have been asked for."""

    matrix: Matrix  # [m, F]
    visitor: npt.NDArray[np.uint64]  # [m]

    def at(self, rows: Ints) -> Population:
        """Some of them."""
        return Population(self.matrix.take(rows, axis=0), self.visitor[rows])


@dataclass(frozen=True)
class Dataset:
    """n labelled rows; table rows have no visitor or time in common."""

    matrix: npt.NDArray[np.float32]  # [n, F]
    label: Bools  # [n]
    visitor: npt.NDArray[np.uint64]  # [n] hash of the visitor's id, or of whom it was joined into later
    cutoff_ms: Ints  # [n]
    golden: tuple[GoldenRow, ...] = ()
    population: Population | None = None  # None where too few are known

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Split:
    """Row numbers of the four parts: fit trees, stop early, calibrate, judge. `how` says how they were told apart."""

    train: Ints
    stop: Ints
    calibrate: Ints
    test: Ints
    how: str
    notes: tuple[str, ...] = ()


@dataclass
class _Sample(Generic[Rows]):
    """A bottom-k sample: the `limit` rows with the smallest keys of all that were offered, in bounded memory."""

    limit: int
    take: Callable[[Rows, Ints], Rows]
    threshold: np.uint64 = field(default_factory=lambda: np.uint64(2**64 - 1))
    keys: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    parts: list[Rows] = field(default_factory=list)

    def offer(self, keys: npt.NDArray[np.uint64], part: Rows) -> None:
        self.keys.append(keys)
        self.parts.append(part)
        if sum(map(len, self.keys)) > 1.5 * self.limit:
            self.shrink()

    def shrink(self) -> None:
        keys = np.concatenate(self.keys) if self.keys else np.empty(0, np.uint64)
        if len(keys) > self.limit:
            self.threshold = np.partition(keys, self.limit - 1)[self.limit - 1]
        kept = [part_keys <= self.threshold for part_keys in self.keys]
        self.parts = [self.take(part, np.flatnonzero(chosen)) for part, chosen in zip(self.parts, kept, strict=True)]
        self.keys = [part_keys[chosen] for part_keys, chosen in zip(self.keys, kept, strict=True)]


def build(
    log: EventLog,
    plan: Plan,
    *,
    seed: int = 0,
    max_rows: int = 1_000_000,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Rows at the moments the service would be asked, matured ones only. Raises TooLittleData.

    A moment is after an event of the kinds `rows.after` (sampled, at most `rows.per_visitor` a visitor), a cold start
    (just before a visitor's first event), or, with `rows.every`, a point of a calendar grid. A cutoff has matured when
    the whole horizon after it lies within the data. Deterministic in (events, spec, seed), whatever the partitions.
    """
    job = _sampling(log, plan.spec, seed, max_rows, "")
    samples = _Samples(job)
    for index, partition in enumerate(log):
        if len(partition.records):
            samples.offer(index, samples.of(plan, partition))
        if on_progress is not None:
            on_progress(index + 1, log.partitions)
    return samples.joined()


def build_apart(
    log: EventLog,
    plan: Plan,
    run: Run,
    *,
    seed: int = 0,
    max_rows: int = 1_000_000,
    memory_limit: str = "1GB",
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """What `build` gives, its partitions worked on wherever `run`, that of an engine, does."""
    job = _sampling(log, plan.spec, seed, max_rows, memory_limit)
    samples = _Samples(job)
    for done, (index, sampled) in enumerate(run(sample_partition, job, log.partitions), 1):
        if sampled is not None:
            samples.offer(index, sampled)
        if on_progress is not None:
            on_progress(done, log.partitions)
    return samples.joined()


@dataclass(frozen=True)
class Sampling:
    """What a process needs to sample the rows of any partition."""

    log: Path
    spec: FeatureSpec
    first_ms: int
    last_ms: int
    matured_ms: int
    seed: int
    max_rows: int
    memory_limit: str


class Sampled(NamedTuple):
    """Rows of a partition and some of whom the service scores, each with the keys that a sample of all goes by."""

    keys: npt.NDArray[np.uint64]
    rows: Dataset
    population_keys: npt.NDArray[np.uint64]
    population: Population


Run = Callable[
    [Callable[[Sampling, int], Sampled | None], Sampling, int],
    Iterator[tuple[int, Sampled | None]],
]


def sample_partition(job: Sampling, index: int) -> Sampled | None:
    """What a partition gives to a sample of all, and nothing that could not be in it; None from an empty one."""
    partition = source.load_partition(job.log, job.spec, index, job.memory_limit)
    if not len(partition.records):
        return None
    samples = _Samples(job)
    samples.offer(index, samples.of(features.compile(job.spec), partition))
    return samples.only()


def _sampling(log: EventLog, spec: FeatureSpec, seed: int, max_rows: int, memory_limit: str) -> Sampling:
    first_ms, last_ms = log.summary.first_ms, log.summary.last_ms
    matured_ms = _matured(log, horizon_of(_event_label(spec)))
    return Sampling(log.directory, spec, first_ms, last_ms, matured_ms, seed, max_rows, memory_limit)


class _Samples:
    """Samples of the rows and of the population; what they hold does not depend on the order of partitions."""

    def __init__(self, job: Sampling) -> None:
        self._job = job
        self._rows = _Sample(job.max_rows, take)
        self._population = _Sample(POPULATION_ROWS, Population.at)
        self._golden: dict[int, tuple[GoldenRow, ...]] = {}  # by partition, in the order in which they were offered

    def of(self, plan: Plan, partition: Partition) -> Sampled:
        """What a partition has to offer."""
        job, view = self._job, View(partition)
        kept = _thinned(view, job.spec, moments(view, job.spec, job.first_ms, job.matured_ms), job.seed)
        keys = _mix(partition.visitor_hash[kept.owner], kept.cutoff_ms, job.seed + 1)
        chosen = keys <= self._rows.threshold
        rows = _labelled(plan, view, kept.at(chosen), _event_label(job.spec))
        asked = moments(view, job.spec, job.first_ms, job.last_ms)
        return Sampled(keys[chosen], rows, *_recent(plan, view, asked, job, self._population.threshold))

    def offer(self, index: int, sampled: Sampled) -> None:
        """Take what a partition has to offer."""
        self._golden[index] = sampled.rows.golden
        self._rows.offer(sampled.keys, replace(sampled.rows, golden=()))
        self._population.offer(sampled.population_keys, sampled.population)

    def only(self) -> Sampled:
        """What is left of the one partition that was offered."""
        self._shrink()
        rows, (golden,) = self._rows, self._golden.values()
        return Sampled(
            rows.keys[0], replace(rows.parts[0], golden=golden), self._population.keys[0], self._population.parts[0]
        )

    def joined(self) -> Dataset:
        """The rows of all partitions by time. Raises TooLittleData."""
        self._shrink()
        if not any(map(len, self._rows.parts)):
            raise TooLittleData(
                "no training rows: no event of rows.after has a full horizon after it; give more history"
            )
        order = sorted(range(len(self._golden)), key=list(self._golden).__getitem__)
        parts = [self._population.parts[place] for place in order]
        population = Population(*map(np.concatenate, zip(*parts, strict=True)))
        golden = tuple(row for index in sorted(self._golden) for row in self._golden[index])[:GOLDEN_CASES]
        made = replace(_joined([self._rows.parts[place] for place in order]), golden=golden)
        if len(population.visitor) >= FEWEST_SCORED:
            made = replace(made, population=population)
        return take(made, np.lexsort((made.visitor, made.cutoff_ms)))

    def _shrink(self) -> None:
        self._rows.shrink()
        self._population.shrink()


def _recent(
    plan: Plan, view: View, asked: Moments, job: Sampling, threshold: np.uint64
) -> tuple[npt.NDArray[np.uint64], Population]:
    """The moments of the last days. All of them are as likely, since drift is counted score by score."""
    visitor = view.partition.visitor_hash[asked.owner]
    keys = _mix(visitor, asked.cutoff_ms, job.seed + 2)
    recent = (asked.cutoff_ms > job.last_ms - POPULATION_MS) & (keys <= threshold)
    chosen = asked.at(recent)
    matrix = view.vectors(plan, chosen.owner, chosen.cutoff_ms, chosen.request)
    return keys[recent], Population(matrix, visitor[recent])


def take(dataset: Dataset, rows: Ints) -> Dataset:
    """The dataset of some rows; the golden rows and the population stay."""
    return replace(
        dataset,
        matrix=dataset.matrix.take(rows, axis=0),
        label=dataset.label[rows],
        visitor=dataset.visitor[rows],
        cutoff_ms=dataset.cutoff_ms[rows],
    )


def _joined(parts: list[Dataset]) -> Dataset:
    return Dataset(
        np.concatenate([part.matrix for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.visitor for part in parts]),
        np.concatenate([part.cutoff_ms for part in parts]),
        tuple(row for part in parts for row in part.golden)[:GOLDEN_CASES],
    )


def _event_label(spec: FeatureSpec) -> Label:
    if spec.label is None or spec.label.kind is None:
        raise TooLittleData("the spec has no label to learn from events; write label: {event: KIND, horizon: 7d}")
    return spec.label


def horizon_of(label: Label) -> int:
    """Milliseconds of an event label's horizon, which the spec's validation guarantees."""
    if label.horizon is None:
        raise AssertionError("an event label without a horizon got past validation; this is a bug")
    return label.horizon


def _matured(log: EventLog, horizon_ms: int) -> int:
    span_ms = log.summary.last_ms - log.summary.first_ms
    if span_ms < MIN_HORIZONS * horizon_ms:
        day = 86_400_000
        raise TooLittleData(
            f"the events span {span_ms / day:.2f} days, less than {MIN_HORIZONS} horizons of {horizon_ms / day:g}; "
            f"give at least {MIN_HORIZONS * horizon_ms / day:.2f} days of history or a shorter label.horizon"
        )
    return log.summary.last_ms - horizon_ms


class View:
    """A partition with the sorted keys that find a visitor's events before a moment."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        stamps = np.concatenate((partition.records["ts_ms"], partition.traits["ts_ms"]))
        self.origin_ms, latest_ms = (int(stamps.min()), int(stamps.max())) if len(stamps) else (0, 0)
        self.time_bits = (latest_ms - self.origin_ms + 2).bit_length()
        if len(partition.visitor_hash).bit_length() + self.time_bits > _KEY_BITS:
            years = (latest_ms - self.origin_ms) / 31_557_600_000
            raise PropensityError(
                f"{len(partition.visitor_hash)} visitors over {years:.0f} years are too many for one partition; "
                "leave out wrong timestamps with source.where, or give fewer files"
            )
        self.owner = np.repeat(np.arange(len(partition.visitor_hash)), np.diff(partition.starts))
        self.keys = self.key(self.owner, partition.records["ts_ms"])
        trait_owner = np.repeat(np.arange(len(partition.visitor_hash)), np.diff(partition.trait_starts))
        self.trait_keys = self.key(trait_owner, partition.traits["ts_ms"])
        # How many records a visitor got from those who were joined into it: at most so many are not to be seen yet.
        joins = partition.joins
        visitors = len(partition.visitor_hash)
        self.given = None if joins is None else np.bincount(self.owner[joins.since_ms > 0], minlength=visitors)

    def key(self, owner: Ints, ts_ms: Ints | np.int64) -> Ints:
        """int64: one sortable key of (visitor's number, time)."""
        offset = np.clip(ts_ms - self.origin_ms + 1, 0, (1 << self.time_bits) - 1)
        return np.asarray(owner << self.time_bits | offset)

    def vectors(
        self, plan: Plan, owner: Ints, now_ms: Ints, request: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """float32[n, F]: what the service would have seen of visitor number owner[i] at now_ms[i]."""
        limits, joins = plan.spec.limits, self.partition.joins
        ends = np.searchsorted(self.keys, self.key(owner, now_ms), "right")
        oldest = np.searchsorted(self.keys, self.key(owner, now_ms - limits.history), "right")
        most = limits.records if self.given is None else limits.records + self.given[owner]
        begins = np.maximum(np.maximum(ends - most, oldest), self.partition.starts[owner])
        trait_ends = np.searchsorted(self.trait_keys, self.key(owner, now_ms), "right")
        trait_begins = self.partition.trait_starts[owner]
        out = np.empty((len(owner), plan.width), np.float32)
        for part in _chunks(np.maximum(ends - begins, 0) + trait_ends - trait_begins):
            places, starts = _gather(begins[part], ends[part])
            trait_places, trait_starts = _gather(trait_begins[part], trait_ends[part])
            if joins is not None:
                places, starts = _known(joins.since_ms, places, starts, now_ms[part])
                trait_places, trait_starts = _known(joins.trait_since_ms, trait_places, trait_starts, now_ms[part])
            records, traits = self.partition.records.take(places), self.partition.traits.take(trait_places)
            out[part] = features.matrix(plan, records, starts, now_ms[part], traits, trait_starts, request[part])
        return out

    def history(self, owner: int, now_ms: int) -> tuple[Records, Records]:
        """The visitor's event and trait records up to a moment."""
        first, trait_first = self.partition.starts[owner], self.partition.trait_starts[owner]
        key = self.key(np.array([owner]), np.array([now_ms]))
        end = int(np.searchsorted(self.keys, key, "right")[0])
        trait_end = int(np.searchsorted(self.trait_keys, key, "right")[0])
        records, traits = self.partition.records[first:end], self.partition.traits[trait_first:trait_end]
        if (joins := self.partition.joins) is not None:
            records = records.compress(joins.since_ms[first:end] <= now_ms)
            traits = traits.compress(joins.trait_since_ms[trait_first:trait_end] <= now_ms)
        return records, traits


def _chunks(sizes: Ints) -> Iterator[slice]:
    total = np.concatenate(([0], np.cumsum(sizes)))
    first = 0
    while first < len(sizes):
        last = int(np.searchsorted(total, total[first] + GATHERED_RECORDS, "right")) - 1
        last = min(max(last, first + 1), first + GATHERED_RECORDS)
        yield slice(first, last)
        first = last


def _gather(begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """The places of the records of some rows, and where those of each row start among them."""
    counts = np.maximum(ends - begins, 0)
    starts = np.concatenate(([0], np.cumsum(counts)))
    return np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts), starts


def _known(since_ms: Ints, places: Ints, starts: Ints, now_ms: Ints) -> tuple[Ints, Ints]:
    """The same without the records that are not the visitor's yet."""
    kept = since_ms[places] <= np.repeat(now_ms, np.diff(starts))
    return places[kept], np.concatenate(([0], np.cumsum(kept)))[starts]


class Moments(NamedTuple):
    """Moments of the visitors of a partition, by visitor and time."""

    owner: Ints  # [n] visitor numbers
    cutoff_ms: Ints  # [n]
    request: Matrix  # [n, R]

    def at(self, chosen: Bools | Ints) -> Moments:
        """Some of them."""
        return Moments(self.owner[chosen], self.cutoff_ms[chosen], self.request[chosen])


def moments(view: View, spec: FeatureSpec, first_ms: int, until_ms: int) -> Moments:
    """All moments of a partition at which the service would be asked, up to one."""
    if spec.rows.every is not None:
        points = until_ms - spec.rows.every * np.arange((until_ms - first_ms) // spec.rows.every + 1)[::-1]
        owner, cutoff = _grid(view, spec, points)
        asked = Moments(owner, cutoff, np.full((len(owner), view.partition.request.shape[1]), np.nan, np.float32))
    else:
        asked = _after_events(view, spec, until_ms)
    return asked.at(np.lexsort((asked.cutoff_ms, asked.owner)))


def _thinned(view: View, spec: FeatureSpec, asked: Moments, seed: int) -> Moments:
    """About `rows.per_visitor` moments a visitor, and a few more of the busy.

    The chance of a moment depends on its past alone. A sample of fixed size would favour moments of visitors with few
    events still to come, who buy less: on a simulated shop its labels lay 12 % below the truth.
    """
    sizes = np.bincount(asked.owner, minlength=len(view.partition.visitor_hash))
    earlier = np.arange(len(asked.owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chance = _mix(view.partition.visitor_hash[asked.owner], asked.cutoff_ms, seed) / 2**64
    return asked.at(chance * (earlier + 1) < spec.rows.per_visitor)


def _after_events(view: View, spec: FeatureSpec, until_ms: int) -> Moments:
    records, request = view.partition.records, view.partition.request
    asked = np.isin(records["kind"], spec.codes(spec.rows.after)) & (records["ts_ms"] <= until_ms)
    if view.partition.joins is not None:
        asked &= view.partition.joins.since_ms == 0  # at the others, the anonymous visitor was asked for
    places = np.flatnonzero(asked)
    last = np.ones(len(places), np.bool_)  # of several events in one millisecond
    last[:-1] = view.keys[places][1:] != view.keys[places][:-1]
    places = places[last]
    owner, cutoff, context = view.owner[places], records["ts_ms"][places], request[places]
    if spec.rows.cold_start:
        newcomers, first = _newcomers(view)
        before = records["ts_ms"][first] - 1
        within = (before <= until_ms) & (before >= 0)
        owner = np.concatenate((owner, newcomers[within]))
        cutoff = np.concatenate((cutoff, before[within]))
        context = np.concatenate((context, request[first[within]]))
    return Moments(owner, cutoff.astype(np.int64), context)


def _newcomers(view: View) -> tuple[Ints, Ints]:
    """Visitors of whom nothing was known before their first event, and the place of that."""
    joins, starts = view.partition.joins, view.partition.starts
    if joins is None:
        newcomers = np.flatnonzero(np.diff(starts))
        return newcomers, starts[newcomers]
    own, given = np.flatnonzero(joins.since_ms == 0), joins.since_ms > 0
    newcomers, place = np.unique(view.owner[own], return_index=True)
    known_ms = np.full(len(view.partition.visitor_hash), NEVER)
    np.minimum.at(known_ms, view.owner[given], joins.since_ms[given])
    is_new = view.partition.records["ts_ms"][own[place]] < known_ms[newcomers]
    return newcomers[is_new], own[place][is_new]


def _grid(view: View, spec: FeatureSpec, points: Ints) -> tuple[Ints, Ints]:
    """Every visitor at every grid point from its first event on, while an event lies within the history."""
    active = [_active(view, point - spec.limits.history, point) for point in points]
    sizes = [len(owner) for owner in active]
    return np.concatenate(active), np.repeat(points, sizes)


def _active(view: View, after_ms: np.int64, point_ms: np.int64) -> Ints:
    """Visitors who have an event in (after_ms, point_ms] at point_ms."""
    partition, joins = view.partition, view.partition.joins
    if joins is None:
        everyone = np.arange(len(partition.visitor_hash))
        known = np.searchsorted(view.keys, view.key(everyone, point_ms), "right")
        before = np.searchsorted(view.keys, view.key(everyone, after_ms), "right")
        return np.flatnonzero(known > np.maximum(before, partition.starts[:-1]))
    ts_ms = partition.records["ts_ms"]
    within = (ts_ms > after_ms) & (ts_ms <= point_ms) & (joins.since_ms <= point_ms)
    found = np.unique(view.owner[within])
    return found[joins.until_ms[found] > point_ms]


def _labelled(plan: Plan, view: View, moments: Moments, label: Label) -> Dataset:
    owner, cutoff, request = moments
    happened = view.keys[np.isin(view.partition.records["kind"], plan.spec.codes((str(label.kind),)))]
    person = owner if view.partition.joins is None else view.partition.joins.person[owner]
    after = np.searchsorted(happened, view.key(person, cutoff), "right")
    within = np.searchsorted(happened, view.key(person, cutoff + horizon_of(label)), "right")
    matrix = view.vectors(plan, owner, cutoff, request)
    golden = tuple(_golden_rows(view, owner, cutoff, request))
    positive = within > after if label.event is not None else within == after
    return Dataset(matrix, positive, view.partition.visitor_hash[person], cutoff, golden)


def _golden_rows(view: View, owner: Ints, cutoff: Ints, request: npt.NDArray[np.float32]) -> Iterator[GoldenRow]:
    for place in np.linspace(0, len(owner) - 1, min(len(owner), GOLDEN_CASES)).astype(int):
        records, traits = view.history(int(owner[place]), int(cutoff[place]))
        yield GoldenRow(records[-GOLDEN_RECORDS:], traits[-GOLDEN_RECORDS:], request[place], int(cutoff[place]))


def _mix(visitor: npt.NDArray[np.uint64], cutoff: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """uint64[n]: a hash of (visitor, cutoff, seed) that orders rows as if at random (the finaliser of SplitMix64)."""
    mixed = visitor ^ (cutoff.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed * 0x2545F491)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def split(dataset: Dataset, horizon_ms: int | None, seed: int = 0) -> Split:
    """Train 60 %, validate 20 %, test 20 %, the later the further right, with a gap of one horizon before each part.

    The gap keeps every label window of one part out of the next. Where the history is too short for two gaps, or
    where rows have no time (horizon_ms None), parts are of different visitors instead. Validation rows are halved by
    visitor: early stopping uses one half, calibration the other.
    """
    _require_classes(dataset.label, horizon_ms)
    side = _mix(dataset.visitor, np.zeros(len(dataset), np.int64), seed + 7) / 2**64
    if horizon_ms is not None:
        times = _by_time(dataset, horizon_ms)
        if times is not None:
            train, valid, test = times
            half = side[valid] < 0.5
            parts = Split(train, valid[half], valid[~half], test, "by time, with gaps of one horizon")
            if _has_both_classes(dataset, parts):
                return parts
    short = "The history is too short to split by time with gaps of one horizon; rows were split by visitor."
    bounds = np.searchsorted([0.70, 0.75, 0.80], side, "right")
    train, stop, calibrate, test = (np.flatnonzero(bounds == part) for part in range(4))
    parts = Split(train, stop, calibrate, test, "by visitor", (short,))
    if not _has_both_classes(dataset, parts):
        raise TooLittleData(
            f"the positive rows are of {len(np.unique(dataset.visitor[dataset.label]))} visitors, too few to fit, "
            "stop, calibrate and judge on different ones; give more visitors"
        )
    return parts if horizon_ms is not None else replace(parts, how="at random", notes=())


def _has_both_classes(dataset: Dataset, parts: Split) -> bool:
    labels = [dataset.label[part] for part in (parts.train, parts.stop, parts.calibrate, parts.test)]
    return all(label.any() and not label.all() for label in labels)


def _by_time(dataset: Dataset, horizon_ms: int) -> tuple[Ints, Ints, Ints] | None:
    cutoff = dataset.cutoff_ms
    test_from = int(np.quantile(cutoff, 0.8))
    before_test = cutoff[cutoff + horizon_ms < test_from]
    if not len(before_test):
        return None
    valid_from = int(np.quantile(before_test, 0.75))
    train = np.flatnonzero(cutoff + horizon_ms < valid_from)
    valid = np.flatnonzero((cutoff >= valid_from) & (cutoff + horizon_ms < test_from))
    test = np.flatnonzero(cutoff >= test_from)
    enough = [min(label.sum(), (~label).sum()) for label in (dataset.label[part] for part in (train, valid, test))]
    return (train, valid, test) if min(enough) >= 20 else None


def _require_classes(label: Bools, horizon_ms: int | None) -> None:
    positives, negatives = int(label.sum()), int((~label).sum())
    if min(positives, negatives) < MIN_OF_EACH_CLASS:
        advice = "give more history or more visitors, a longer label.horizon, or check label.event"
        if horizon_ms is None:
            advice = "give more rows, or check label.column and label.positive"
        raise TooLittleData(
            f"{positives} positive and {negatives} negative rows; at least {MIN_OF_EACH_CLASS} of each are needed: "
            f"{advice}"
        )
