"""How long a refresh of audiences takes, and how much memory: `make bench-audiences`.

Scores of made-up visitors for the model of `make run`, two days of them, refreshed into the embedded feature cache with
the definitions of examples/audiences.yaml.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiences import definitions, population, refresh
from loadtest import machine
from service import embedded, models
from service.members import Members
from service.propensities import Propensities
from service.store import Store

ROOT: Final = Path(__file__).parents[1]
ARTIFACTS: Final = ROOT / ".run" / "artifacts"
MODEL: Final = "purchase_7d"
DAY_MS: Final = 86_400_000
FIRST_MS: Final = 1_790_000_000_000
PARTS: Final = 8


def write(directory: Path, visitors: int, at_ms: int, random: np.random.Generator, features: tuple[str, ...]) -> Path:
    """A snapshot of scores that differ from the last one's by a noise of 0.2 logits."""
    directory.mkdir()
    usual = np.random.default_rng(1).normal(-3, 0.8, visitors)
    scores = (1 / (1 + np.exp(-(usual + random.normal(0, 0.2, visitors))))).astype(np.float32)
    version = models.served_version(ARTIFACTS / MODEL)
    for part in range(PARTS):
        places = range(visitors * part // PARTS, visitors * (part + 1) // PARTS)
        rows = len(places)
        table = pa.table(
            {
                "visitor_id": [f"visitor-{place:07}-abcdef" for place in places],
                "propensity": scores[places.start : places.stop],
                "percentile": np.zeros(rows, np.float32),
                "segment": ["nurture"] * rows,
                "model": [MODEL] * rows,
                "version": [version] * rows,
                "at": pa.array([at_ms] * rows, pa.timestamp("ms", "UTC")),
                "last_event_ms": np.full(rows, at_ms - DAY_MS),
                **{name: random.integers(0, 3, rows).astype(np.float32) for name in features},
            }
        )
        pq.write_table(table, directory / f"part-{part:05}.parquet")
    return directory


async def run(visitors: int, directory: Path) -> None:
    """Refresh two days, and print what each took."""
    read = definitions.load(ROOT / "examples" / "audiences.yaml")
    server = embedded.start(directory / "data")
    store = Store.open(server.url, namespace="bench", retention_ms=90 * DAY_MS, timeout_ms=30_000)
    random = np.random.default_rng(2)
    for day in range(2):
        path = write(directory / f"day-{day}", visitors, FIRST_MS + day * DAY_MS, random, read.features(MODEL))
        snapshots = [population.open_snapshot(path)]
        bundles = population.bundles_of(snapshots, ARTIFACTS)
        begun = time.perf_counter()
        done = await refresh.refresh(
            read, snapshots, bundles, Members(store), Propensities(store), refresh.moment(snapshots)
        )
        took, peak_mb = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        changes = sum(one.operations for one in done.audiences)
        moved = sum(one.moved + one.new for one in done.segments.values())
        print(f"day {day + 1}: {took:.1f} s, {changes:,} entries and exits, {moved:,} moves; peak {peak_mb:,.0f} MB")
    await store.close()
    server.close()


def main() -> None:
    """Measure with as many visitors as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=1_000_000)
    visitors = parser.parse_args().visitors
    print(f"{machine.describe()}\n{visitors:,} visitors")
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(visitors, Path(directory)))


if __name__ == "__main__":
    main()
