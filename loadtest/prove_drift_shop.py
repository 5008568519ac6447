"""Whether the drift rules leave a shop in peace in which nothing is broken: the last part of `make drift-proof`.

A shop is simulated, a model trained on its days but the last, and these are scored at every event. Two shops: one that
has been open for longer than any feature looks back, and the young one of `make run`, whose visitors grow older.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from service.core import drift, features
from service.core.bundle import Bins, Bundle
from service.population import HALF_WINDOWS_MS
from training import dataset, reference, simulate, source, specfile, train
from training.dataset import View

Ints = npt.NDArray[np.int64]

SPEC: Final = Path(__file__).parents[1] / "examples" / "shop.yaml"
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
FEWEST: Final = 50
"""Scores that a window needs to be looked at."""


class Shop(NamedTuple):
    """A shop, and how many of its days are scored after the model was trained on those before."""

    name: str
    events: int
    days: int
    scored_days: int


SHOPS: Final = (Shop("open for 150 days", 1_000_000, 150, 28), Shop("open for 60 days", 400_000, 60, 14))


class Scores(NamedTuple):
    """What is scored at n moments, in the order of time."""

    at_ms: Ints  # [n]
    visitor: npt.NDArray[np.uint64]  # [n]
    matrix: npt.NDArray[np.float32]  # [n, F]
    score: npt.NDArray[np.float32]  # [n]
    earlier: dict[str, Ints]  # [n] events in half of each window before, the newest left out


class Look(NamedTuple):
    """What the rules say of one window: what drifts or is missing, and k as it is and as it is told from events."""

    alarms: frozenset[str]
    per_visitor: float
    told: float


def run(shop: Shop, directory: Path) -> tuple[Bundle, Bundle, Scores]:
    """The model of a shop, the same with a reference of its training rows, and what is scored afterwards."""
    made = simulate.sized(simulate.Shop(days=shop.days, seed=1), shop.events)
    simulate.simulate(made, directory / "events.parquet")
    trained_until_ms = int(made.end.timestamp() * 1000) - shop.scored_days * DAY_MS
    with duckdb.connect() as connection:
        connection.sql(
            f"COPY (FROM '{directory / 'events.parquet'}' WHERE epoch_ms(timestamp) <= {trained_until_ms}) "
            f"TO '{directory / 'known.parquet'}'"
        )
    known = [str(directory / "known.parquet")]
    trained = train.from_events(known, SPEC, train.Options(artifacts=directory / "artifacts")).bundle
    return trained, _of_rows(trained, known), _scores(directory / "events.parquet", trained, trained_until_ms)


def _of_rows(model: Bundle, events: Sequence[str]) -> Bundle:
    """The model with a reference of the rows of training, which are thinned out and older."""
    with tempfile.TemporaryDirectory() as workdir:
        rows = dataset.build(source.read(events, model.spec, Path(workdir)), model.plan).matrix
    return replace(model, reference=reference.describe(model.spec, rows, model.predict(rows)))


def _scores(events: Path, model: Bundle, after_ms: int) -> Scores:
    plan = features.compile(specfile.load(SPEC))
    parts = []
    with tempfile.TemporaryDirectory() as workdir:
        log = source.read([str(events)], plan.spec, Path(workdir))
        for partition in log:
            view = View(partition)
            asked = dataset.moments(view, plan.spec, log.summary.first_ms, log.summary.last_ms)
            asked = asked.at(asked.cutoff_ms > after_ms)
            matrix = view.vectors(plan, *asked)
            visitor = partition.visitor_hash[asked.owner]
            earlier = {window: _earlier(view, asked, half_ms) for window, half_ms in HALF_WINDOWS_MS.items()}
            parts.append(Scores(asked.cutoff_ms, visitor, matrix, model.predict(matrix), earlier))
    order = np.argsort(np.concatenate([part.at_ms for part in parts]), kind="stable")
    return Scores(
        np.concatenate([part.at_ms for part in parts])[order],
        np.concatenate([part.visitor for part in parts])[order],
        np.concatenate([part.matrix for part in parts])[order],
        np.concatenate([part.score for part in parts])[order],
        {window: np.concatenate([part.earlier[window] for part in parts])[order] for window in HALF_WINDOWS_MS},
    )


def _earlier(view: View, asked: dataset.Moments, half_ms: int) -> Ints:
    ends = np.searchsorted(view.keys, view.key(asked.owner, asked.cutoff_ms), "right")
    begins = np.searchsorted(view.keys, view.key(asked.owner, asked.cutoff_ms - half_ms), "right")
    earlier: Ints = np.maximum(ends - begins - 1, 0)
    return earlier


def looks(model: Bundle, scores: Scores, window: str, *, told: bool = True) -> Iterator[Look]:
    """What the rules say at the end of each hour; with `told` the scores per visitor are told from the events."""
    bins = drift.described(model.spec, model.reference)
    critical = drift.critical_values(model.spec, model.reference)
    length_ms = HOUR_MS if window == "1h" else DAY_MS
    least = drift.WINDOWS[window].per_visitor
    for end_ms in range(int(scores.at_ms[0]) + length_ms, int(scores.at_ms[-1]), HOUR_MS):
        begin, end = np.searchsorted(scores.at_ms, [end_ms - length_ms, end_ms])
        if end - begin < FEWEST:
            continue
        _, times = np.unique(scores.visitor[begin:end], return_counts=True)
        estimate = 1 + 2 * float(scores.earlier[window][begin:end].mean())  # every event is scored
        used = max(least, estimate) if told else least
        values = {drift.SCORE: scores.score[begin:end]}
        values |= {name: scores.matrix[begin:end, column] for column, name in enumerate(model.spec.names)}
        alarms = {
            name
            for name, own in values.items()
            if _rings(drift.counts_of(own, bins[name]), bins[name], critical[name], window, used)
        }
        yield Look(frozenset(alarms), float(np.mean(times**2) / np.mean(times)), estimate)


def _rings(counts: Ints, bins: Bins, critical: float, window: str, per_visitor: float) -> bool:
    size = int(counts.sum())
    chance = drift.chance_level(critical, size, bins.rows, per_visitor)
    missing = drift.missing_threshold(bins.shares[0], size, bins.rows, per_visitor)
    return drift.psi(counts, bins.shares) > chance + drift.WINDOWS[window].floor or counts[0] / size > missing


def lines(shop: Shop) -> Iterator[tuple[str, ...]]:
    """The lines of the table for one shop: window, hours, alarms by training rows, by k = 5 or 15, and as shipped."""
    with tempfile.TemporaryDirectory(prefix="propensity-") as directory:
        trained, thinned, scores = run(shop, Path(directory))
    for window in drift.WINDOWS:
        columns = [
            list(looks(thinned, scores, window, told=False)),
            list(looks(trained, scores, window, told=False)),
            list(looks(trained, scores, window)),
        ]
        ratios = [look.told / look.per_visitor for look in columns[-1]]
        rung = Counter(name for look in columns[-1] for name in look.alarms)
        yield (
            shop.name,
            window,
            f"{len(columns[0]):,}",
            *(f"{sum(bool(look.alarms) for look in looked):,}" for looked in columns),
            ", ".join(f"`{name}` {times:,}" for name, times in rung.most_common(5)) or "none",
            f"{np.median(ratios):.2f} ({np.quantile(ratios, 0.05):.2f} to {np.quantile(ratios, 0.95):.2f})",
        )


HEADS: Final = (
    "shop",
    "window",
    "hours",
    "training rows",
    "last week",
    "as shipped",
    "what rang as shipped",
    "k told / true, median (5 to 95 %)",
)
