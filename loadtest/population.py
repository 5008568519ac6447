"""The shop that benchmarks score: 10,000 visitors of 1 to 60 events, and a model of 300 trees of 31 leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import lightgbm as lgb
import numpy as np
import yaml

from loadtest.bench_features import NOW_MS
from service.core import bundle, events, features, segments
from service.core.features import Plan
from service.history import History
from service.store import Store
from service.visitors import Visitors
from training import export, packing, reference
from training.dataset import GoldenRow
from training.export import Calibration
from training.fit import Fitted

VISITORS: Final = 10_000
TREES: Final = 300
LEAVES: Final = 31
# As the service has it: visitors who were written to just now are not at rest.
RETENTION_MS: Final = (90 + 7) * 86_400_000

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def histories(now_ms: int) -> dict[str, History]:
    """Visitors of 1 to 60 events in the last month, and a device."""
    rng = np.random.default_rng(1)
    made = {}
    for number in range(VISITORS):
        count = int(rng.integers(1, 61))
        ages = np.sort(rng.exponential(5 * 86_400_000, count).astype(np.int64))[::-1]
        kinds, ids = rng.choice([1, 1, 1, 1, 2, 3, 4, 5], count), rng.integers(1, 2**32, count)
        records = events.records(now_ms - ages, kinds, ids, rng.integers(1, 30, count), rng.exponential(40, count))
        device = events.pack(now_ms - 1, events.TRAIT_TEXT, events.hash32("device"), events.hash32("mobile"), np.nan)
        made[f"visitor-{number}"] = History(records.tobytes(), device)
    return made


def matrix_of(plan: Plan, kept: Mapping[str, History], now_ms: int) -> Matrix:
    """float32[n, F] of the visitors now."""
    parts = [events.from_bytes(history.events) for history in kept.values()]
    starts = np.cumsum([0, *map(len, parts)])
    found = features.matrix(plan, np.concatenate(parts), starts, np.full(len(parts), now_ms))
    return found.astype(np.float32)


def write_bundle(directory: Path, plan: Plan, matrix: Matrix) -> None:
    """A sealed bundle of TREES trees of LEAVES leaves that were fitted to noise: as slow as a real one, as useless."""
    rng = np.random.default_rng(2)
    label = rng.random(len(matrix)) < 0.1 + 0.2 * (matrix[:, 0] > np.median(matrix[:, 0]))
    settings = {"objective": "binary", "num_leaves": LEAVES, "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1}
    booster = lgb.train(settings, lgb.Dataset(matrix, label, feature_name=list(plan.spec.names)), TREES)
    fitted = Fitted(booster, Calibration(1.0, 0.0), {})
    directory.mkdir(parents=True)
    export.write(booster, directory, feature_names=plan.spec.names, calibration=fitted.calibration)
    (directory / "features.yaml").write_text(yaml.safe_dump(plan.spec.model_dump(mode="json")))
    scores = fitted.predict(matrix).astype(np.float32)
    (directory / "reference.json").write_text(reference.describe(plan.spec, matrix, scores).model_dump_json())
    nothing = np.empty(0, events.RECORD)
    golden = packing.golden_cases(
        [GoldenRow(nothing, nothing, np.full(len(plan.spec.requests), np.nan, np.float32), NOW_MS)], plan, fitted
    )
    (directory / "golden.json").write_text(f"[{golden[0].model_dump_json()}]")
    bundle.seal(
        directory,
        {
            "model": plan.spec.model,
            "version": "bench",
            "created_at": "2026-01-01T00:00:00+00:00",
            "spec": plan.spec.model_dump(mode="json"),
            "spec_hash": plan.spec.hash,
            "names": plan.spec.names,
            "dtype": "float32",
            "segments": dict(zip(segments.SEGMENTS, segments.cutoffs(scores, {}), strict=False)),
            "calibration": {"slope": 1.0, "intercept": 0.0},
            "data": {},
            "metrics": {},
            "libraries": {},
        },
    )


async def fill(url: str, kept: Mapping[str, History], matrix: Matrix) -> None:
    """Put histories under the service's keys, and vectors under those of the plain service."""
    store = Store.open(url, namespace="p", retention_ms=RETENTION_MS, timeout_ms=10_000)
    names = list(kept)
    for first in range(0, len(names), 500):
        await Visitors(store).append({name: kept[name] for name in names[first : first + 500]}, NOW_MS)
    await store.close()
    import redis.asyncio as redis

    client = redis.from_url(url)
    await client.mset({f"vector:{name}": row.tobytes() for name, row in zip(names, matrix, strict=True)})
    await client.aclose()
