"""How many feature rows a core computes in a second: the kernel, batched and alone, against plain Python.

The same 20,000 visitors of 30 events and the same 24 features on one pinned core. `propensity features` is measured as
its users see it, files in and a file out, with its reading apart.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from loadtest import machine
from service.core import events, features
from service.core.events import Records
from service.core.features import Plan
from service.core.spec import parse
from tests.core import oracle
from training import point_in_time, source, specfile

SPEC: Final = Path(__file__).parents[1] / "examples" / "shop.yaml"
VISITORS: Final = 20_000
EVENTS: Final = 30
FEATURES: Final = 24
MOMENTS: Final = 5
BATCHES: Final = (1, 4, 16, 32, 64, VISITORS)
NOW_MS: Final = 1_790_000_000_000
WANTED: Final = 80_000


def shop_plan() -> Plan:
    """The shop's spec, cut to its first 24 features."""
    document = specfile.load(SPEC).model_dump(mode="json")
    document["features"] = dict(list(document["features"].items())[:FEATURES])
    return features.compile(parse(document))


def histories(visitors: int) -> Records:
    """RECORD[visitors * EVENTS]: each visitor's events in order of time, most of them views."""
    rng = np.random.default_rng(0)
    count = visitors * EVENTS
    ages = np.sort(rng.exponential(5 * 86_400_000, (visitors, EVENTS)).astype(np.int64), axis=1)[:, ::-1]
    kinds = rng.choice([1, 1, 1, 1, 1, 2, 3, 4, 5], count)
    identifiers = rng.integers(1, 2**32, count)
    return events.records(
        NOW_MS - ages.ravel(), kinds, identifiers, rng.integers(1, 30, count), rng.exponential(40, count).round(2)
    )


def rate(rows: int, call: Callable[[], object]) -> float:
    """Rows a second, the median of five runs after one that warms up."""
    call()
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return rows / statistics.median(taken)


def kernel_rate(plan: Plan, records: Records, batch: int) -> float:
    """Rows a second in calls of `batch` visitors, over at most 2,000 calls."""
    rows = min(VISITORS, batch * 2000) // batch * batch

    def run() -> None:
        starts, now = np.arange(batch + 1) * EVENTS, np.full(batch, NOW_MS)
        for first in range(0, rows, batch):
            features.matrix(plan, records[first * EVENTS : (first + batch) * EVENTS], starts, now)

    return rate(rows, run)


def oracle_rate(plan: Plan, records: Records) -> float:
    """Rows a second of plain Python, over 100 visitors."""
    blobs = [records[row * EVENTS : (row + 1) * EVENTS].tobytes() for row in range(100)]
    return rate(len(blobs), lambda: [oracle.features(plan.spec, blob, NOW_MS) for blob in blobs])


def command_rates() -> tuple[float, float]:
    """Rows a second of `propensity features`: of computing them from records, and of the whole from files to file."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_files(directory, histories(VISITORS))
        rows = VISITORS * MOMENTS
        files, at = [str(directory / "events.parquet")], directory / "at.parquet"
        begun = time.perf_counter()
        point_in_time.write(files, SPEC, at, directory / "out.parquet")
        whole = time.perf_counter() - begun
        plan = shop_plan()
        workdir = directory / "log"
        workdir.mkdir()
        log = source.read(files, plan.spec, workdir)
        partition = log.partition(0)
        moments = np.repeat(NOW_MS - 3_600_000 * np.arange(MOMENTS), VISITORS)
        visitors = np.tile(partition.visitor_hash, MOMENTS)
        unknown = np.full((rows, len(plan.spec.requests)), np.nan, np.float32)
        return rate(rows, lambda: point_in_time.vectors(plan, partition, visitors, moments, unknown)), rows / whole


def _write_files(directory: Path, records: Records) -> None:
    names = {1: "Product Viewed", 2: "Product Added", 3: "Order Completed", 4: "Products Searched", 5: "Home Viewed"}
    visitor = np.repeat(np.arange(VISITORS), EVENTS)
    happened = {  # noqa: F841 - DuckDB reads it by name
        "anonymousId": visitor,
        "event": np.array([names[kind] for kind in records["kind"].tolist()], object),
        "timestamp": records["ts_ms"],
        "messageId": np.arange(len(records)),
        "price": records["value"].astype(np.float64),
        "category": records["attribute"],
    }
    asked = {"visitor_id": np.tile(np.arange(VISITORS), MOMENTS)}  # noqa: F841
    asked["at"] = np.repeat(NOW_MS - 3_600_000 * np.arange(MOMENTS), VISITORS)
    for name, path in (("happened", "events"), ("asked", "at")):
        duckdb.execute(f"COPY (SELECT * FROM {name}) TO '{directory / path}.parquet' (FORMAT parquet)")


def main() -> int:
    """Print the rates; exit with 1 if the batched kernel is slower than what is promised."""
    print(machine.describe())
    machine.pin(0)
    plan, records = shop_plan(), histories(VISITORS)
    plain = oracle_rate(plan, records)
    print(f"{FEATURES} features, {EVENTS} events a visitor, one core: rows a second and ratio to plain Python")
    print(f"  plain Python (the oracle of the tests)   {plain:>10,.0f}      1 x")
    for batch in BATCHES:
        found = kernel_rate(plan, records, batch)
        print(f"  kernel, {batch:>6,} visitors a call           {found:>10,.0f} {found / plain:>6.0f} x")
    computing, whole = command_rates()
    print(f"  propensity features, computing           {computing:>10,.0f} {computing / plain:>6.0f} x")
    print(f"  propensity features, files to file       {whole:>10,.0f} {whole / plain:>6.0f} x")
    return 0 if computing >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
