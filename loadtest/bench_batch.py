"""Scoring a million visitors with 20 million events: the rate beside ONNX Runtime alone, memory, and Dask workers.

The simulated shop and a model trained on it. Parts: `rates`, `memory`, `dask`; all of them unless named. With `--data
DIR` the shop is made there and kept, so that the next run need not make it again. Exits with 1 where a promise is
broken: features and inference at 80 % of the rows a second of ONNX Runtime alone, 3 GB, twice the time for twice the
visitors within 15 %, and two workers 1.7 times as fast as one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np

from loadtest import machine
from service.core import bundle
from service.core.bundle import Bundle
from service.models import served_version
from training import batch, source
from training.partition import Partition

ROOT: Final = Path(__file__).parents[1]
EVENTS: Final = 21_900_000  # of which 1.0 million visitors come
END: Final = "2026-07-01T00:00:00Z"
AT_MS: Final = 1_782_864_000_000
PROCESSES: Final = 2
ROUNDS: Final = 5
MEMORY_GB: Final = 3.0
RATIO: Final = 0.80
SPEEDUP: Final = 1.7
DASK_ROUNDS: Final = 3
MODEL: Final = "purchase_7d"


@dataclass(frozen=True)
class Used:
    """What a command took: wall seconds, and the peak of what it and the processes that it started held together."""

    seconds: float
    gigabytes: float


def propensity(*arguments: object) -> Used:
    """Run the command and watch its memory."""
    command = [sys.executable, "-m", "cli.main", *map(str, arguments)]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    peak = _Peak(process.pid)
    _, told = process.communicate()
    seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"propensity {' '.join(map(str, arguments))} failed: {told}")
    return Used(seconds, peak.end())


class _Peak:
    """Looks 20 times a second at the resident memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self._pid, self._highest, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._highest = max(self._highest, _resident(self._pid))

    def end(self) -> float:
        """Gigabytes."""
        self._over.set()
        self._thread.join()
        return self._highest / 1e9


def _resident(pid: int) -> int:
    process = Path(f"/proc/{pid}")
    try:
        pages = int((process / "statm").read_text().split()[1])
        children = [child for file in process.glob("task/*/children") for child in file.read_text().split()]
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident(int(child)) for child in children)


def make(data: Path) -> None:
    """The shop, half of it, and the model, unless they are there."""
    for name, events in (("whole", EVENTS), ("half", EVENTS // 2)):
        if not (data / name / "events.parquet").exists():
            propensity("simulate", "--out", data / name, "--events", events, "--end", END)
    if not (data / "artifacts" / MODEL / "aliases.json").exists():
        files = ("--events", data / "whole" / "events.parquet", "--spec", ROOT / "examples" / "shop.yaml")
        propensity("train", *files, "--artifacts", data / "artifacts")


def model_of(data: Path) -> Path:
    """The directory of the bundle."""
    return data / "artifacts" / MODEL / served_version(data / "artifacts" / MODEL)


# --- features and inference beside ONNX Runtime alone ---

Times = dict[str, list[tuple[float, float]]]


def rates(data: Path) -> bool:
    """Both sides on the same processes with one thread each, the same batches and the same rows, in turn."""
    with tempfile.TemporaryDirectory() as name:
        log = source.read([str(data / "whole" / "events.parquet")], bundle.load(model_of(data)).spec, Path(name))
        log.connection.close()
        context = get_context("spawn")
        barrier, results = context.Barrier(PROCESSES), context.Queue()
        parts = [range(first, log.partitions, PROCESSES) for first in range(PROCESSES)]
        workers = [
            context.Process(target=_measure, args=(Path(name), model_of(data), part, barrier, results))
            for part in parts
        ]
        for worker in workers:
            worker.start()
        found = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
    rows = sum(rows for rows, _, _ in found)
    events = sum(events for _, events, _ in found)
    rate = {name: rows / _wall([times[name] for _, _, times in found]) for name in found[0][2]}
    print(f"\n{rows:,} visitors with {events:,} events, {len(features_of(data))} features, {trees(data)} trees;")
    print(f"{PROCESSES} processes of one thread, {batch.BATCH_ROWS:,} rows a call: rows a second, median of {ROUNDS}")
    for name, one in rate.items():
        print(f"  {name:48} {one:>10,.0f}   {one / rate[ALONE]:>6.1%}")
    return bool(rate[BOTH] >= RATIO * rate[ALONE])


ALONE: Final = "ONNX Runtime alone, ready-made vectors as they come"
BOTH: Final = "features and inference"


def _measure(log: Path, model: Path, part: range, barrier: Barrier, results: Any) -> None:
    loaded = bundle.load(model)
    partitions = [source.load_partition(log, loaded.spec, index, "1GB") for index in part]
    scored = [batch.predict(loaded, partition, AT_MS, {}) for partition in partitions]
    together = [one.matrix[np.argsort(one.rank)] for one in scored]
    sides: dict[str, Callable[[], object]] = {
        ALONE: lambda: [_infer(loaded, one.matrix) for one in scored],
        BOTH: lambda: [batch.predict(loaded, partition, AT_MS, {}) for partition in partitions],
        "ONNX Runtime alone, vectors alike put together": lambda: [_infer(loaded, one) for one in together],
        "features alone": lambda: [_features(loaded, partition) for partition in partitions],
    }
    times: Times = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            barrier.wait()
            begun = time.monotonic()
            run()
            times[name].append((begun, time.monotonic()))
    rows = sum(len(one.matrix) for one in scored)
    results.put((rows, sum(len(partition.records) for partition in partitions), times))


def _infer(model: Bundle, matrix: Any) -> int:
    for first in range(0, len(matrix), batch.BATCH_ROWS):
        model.predict(matrix[first : first + batch.BATCH_ROWS])
    return len(matrix)


def _features(model: Bundle, partition: Partition) -> object:
    return batch.evaluate(model, partition, AT_MS, {})


def _wall(times: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The median over the rounds of the seconds from the first process's begin to the last one's end."""
    rounds = zip(*times, strict=True)
    return float(statistics.median(max(end for _, end in one) - min(begun for begun, _ in one) for one in rounds))


def features_of(data: Path) -> Sequence[str]:
    """Names of the features."""
    return bundle.load(model_of(data)).spec.names


def trees(data: Path) -> int:
    """How many trees the model has."""
    return (model_of(data) / "model.txt").read_text(encoding="utf-8").count("\nTree=")


# --- the command as its users see it ---


def memory(data: Path) -> bool:
    """`propensity score --events` over half the shop and over all of it."""
    print(f"\n{'propensity score --events':28} {'visitors':>10} {'seconds':>8} {'visitors/s':>11} {'peak GB':>8}")
    found = []
    for name in ("half", "whole"):
        out = data / f"scores-{name}"
        used = propensity(
            *("score", "--events", data / name / "events.parquet", "--artifacts", data / "artifacts"),
            *("--at", END, "--out", out),
        )
        visitors, _ = content(out)
        found.append((visitors, used))
        print(
            f"  {name:26} {visitors:>10,} {used.seconds:>8.1f} {visitors / used.seconds:>11,.0f} {used.gigabytes:>8.2f}"
        )
    (fewer, short), (more, long) = found
    growth = (long.seconds / short.seconds) / (more / fewer)
    print(f"  {more / fewer:.2f} times the visitors took {long.seconds / short.seconds:.2f} times as long")
    return max(short.gigabytes, long.gigabytes) < MEMORY_GB and growth < 1.15


def content(out: Path) -> tuple[int, int]:
    """How many visitors are in a snapshot, and a hash of all that is said of them, whatever their order."""
    rows = duckdb.execute(
        "SELECT count(*), sum(hash(visitor_id, propensity, percentile, segment, last_event_ms)) FROM read_parquet(?)",
        [str(out / "*.parquet")],
    ).fetchall()
    return int(rows[0][0]), int(rows[0][1])


# --- Dask ---


def dask(data: Path) -> bool:
    """One and two worker processes of one thread, over the same files, in turn; the median of some rounds counts."""
    print(f"\n{'--engine dask':28} {'seconds':>8}   reading, scoring")
    contents: set[tuple[int, int]] = set()
    rounds = [[_dask_seconds(data, workers, contents) for workers in (1, 2)] for _ in range(DASK_ROUNDS)]
    local = data / "scores-whole"
    if local.exists():
        contents.add(content(local))
    speedup = statistics.median(one / two for one, two in rounds)
    told = ", ".join(f"{one / two:.2f}" for one, two in rounds)
    print(f"  two workers are {speedup:.2f} times as fast as one, the median of {told}")
    print(f"  scores {'are the same to the bit' if len(contents) == 1 else 'DIFFER'}, those of one machine too")
    return speedup >= SPEEDUP and len(contents) == 1


def _dask_seconds(data: Path, workers: int, contents: set[tuple[int, int]]) -> float:
    from training.distributed import connected

    with connected(None, workers) as engine:
        engine.client.run(batch.schema)  # imports what a worker that has run before has imported
        stages: dict[str, float] = {}
        out = data / f"scores-dask-{workers}"
        begun = time.monotonic()

        def note(stage: str, share: float) -> None:
            stages[stage] = time.monotonic() - begun

        files = [str(data / "whole" / "events.parquet")]
        batch.score(files, model_of(data), AT_MS, out, batch.Options(), engine, note)
        seconds = time.monotonic() - begun
    contents.add(content(out))
    reading = stages["Reading events"]
    print(f"  {workers} worker(s) {seconds:>23.1f}   {reading:.1f}, {seconds - reading:.1f}", flush=True)
    return seconds


PARTS: Final[dict[str, Callable[[Path], bool]]] = {"rates": rates, "memory": memory, "dask": dask}


def main() -> int:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS])
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    print(machine.describe())
    with tempfile.TemporaryDirectory() as name:
        data = given.data or Path(name)
        data.mkdir(parents=True, exist_ok=True)
        make(data)
        kept = [PARTS[part](data) for part in given.parts or PARTS]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
