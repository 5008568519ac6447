"""Batch scoring: every visitor of event files, scored as the service would at one moment, into a directory of Parquet.

A snapshot is one model at one moment, each visitor once, in no order; `files.snapshots` puts it in its place. Events
are read into partitions by visitor; a partition is scored on its own, so any number of processes or machines can share
the work, and the same bits come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from files import snapshots
from service.core import bundle, features
from service.core.bundle import Bundle
from service.core.errors import PropensityError
from service.core.features import Evaluated
from service.core.segments import SEGMENTS
from training import source
from training.engine import Engine
from training.partition import Partition
from training.summary import Summary

# Own columns of a snapshot; those of features follow.
COLUMNS: Final = {
    "visitor_id": pyarrow.string(),
    "propensity": pyarrow.float32(),
    "percentile": pyarrow.float32(),
    "segment": pyarrow.string(),
    "model": pyarrow.string(),
    "version": pyarrow.string(),
    "at": pyarrow.timestamp("ms", "UTC"),
    "last_event_ms": pyarrow.int64(),
}
ALL: Final = "all"
# Rows a call of the model: from some hundred on it makes no difference to ONNX Runtime.
BATCH_ROWS: Final = 16_384

# Told the stage that begins, then its share done, 0 to 1.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What `propensity score --events` lets one choose. `columns`: features to write too, or ("all",)."""

    columns: tuple[str, ...] = ()
    context: Mapping[str, object] = field(default_factory=dict)
    max_bad_rows: int = 1000
    memory_limit: str = "1GB"


@dataclass(frozen=True)
class Job:
    """What a process needs to score any partition, all of it by path: the file system is shared."""

    model: Path  # directory of the bundle
    log: Path  # directory of the normalised events
    out: Path
    at_ms: int
    context: Mapping[str, object]
    columns: tuple[str, ...]
    memory_limit: str


@dataclass(frozen=True)
class Snapshot:
    """What was written."""

    path: str | Path
    model: str
    version: str
    at_ms: int
    summary: Summary
    rows: int
    known: int  # of whom an event counts
    segments: Mapping[str, int]


@dataclass(frozen=True)
class Scored:
    """n visitors of a partition, in its order."""

    propensity: npt.NDArray[np.float32]  # [n]
    rank: npt.NDArray[np.int64]  # [n] at which place each was given to the model
    matrix: npt.NDArray[np.float32]  # [n, F]
    last_event_ms: npt.NDArray[np.int64]  # [n] 0 without an event that counts


def score(
    paths: Sequence[str],
    model: Path,
    at_ms: int,
    out: str | Path,
    options: Options,
    engine: Engine,
    on_progress: Progress = lambda stage, share: None,
) -> Snapshot:
    """Score all visitors of event files by the bundle in `model` as of at_ms, and write the snapshot `out`.

    That is a path, or a URL of fsspec. An existing snapshot of that name is replaced when the new one is whole. Raises
    PropensityError.
    """
    loaded = bundle.load(model)
    columns = _columns(loaded, options.columns)
    if not loaded.spec.events:
        raise PropensityError(f"model {loaded.name} reads no events; ask the service for its scores")
    with snapshots.assembling(out) as directory, engine.workdir(directory) as made:
        log = engine.read(
            paths,
            loaded.spec,
            Path(made),
            max_bad_rows=options.max_bad_rows,
            memory_limit=options.memory_limit,
            on_progress=lambda share: on_progress("Reading events", share),
        )
        job = Job(
            model=model.resolve(),
            log=log.directory,
            out=directory,
            at_ms=at_ms,
            context=dict(options.context),
            columns=columns,
            memory_limit=options.memory_limit,
        )
        log.connection.close()
        known, counts = 0, np.zeros(len(SEGMENTS), np.int64)
        on_progress("Scoring visitors", 0)
        for done, (_, found) in enumerate(engine.run(score_partition, job, log.partitions), 1):
            known += found.known
            counts += found.segments
            on_progress("Scoring visitors", done / log.partitions)
    return Snapshot(
        out,
        loaded.name,
        loaded.version,
        at_ms,
        log.summary,
        int(counts.sum()),
        known,
        dict(zip(SEGMENTS, counts.tolist(), strict=True)),
    )


class Counts(NamedTuple):
    """How many visitors of a part are in each segment, int64[6], and of how many an event counts."""

    segments: npt.NDArray[np.int64]
    known: int


def score_partition(job: Job, index: int) -> Counts:
    """Write part `index` of a snapshot."""
    model = _model(job.model)
    partition = source.load_partition(job.log, model.spec, index, job.memory_limit, with_ids=True).at(job.at_ms)
    if not len(partition.visitor_hash):
        return Counts(np.zeros(len(SEGMENTS), np.int64), 0)
    scored = predict(model, partition, job.at_ms, job.context)
    places = model.segment_places(scored.propensity)
    table = _table(model, partition.visitor_ids or [], scored, places, job)
    pyarrow.parquet.write_table(table, job.out / f"part-{index:05}.parquet", compression="zstd")
    return Counts(np.bincount(places, minlength=len(SEGMENTS)), int(np.count_nonzero(scored.last_event_ms)))


def predict(model: Bundle, partition: Partition, at_ms: int, context: Mapping[str, object]) -> Scored:
    """The features and propensities of a partition's visitors as of at_ms, all with one request context.

    What happened after at_ms is not looked at: who was not here before is scored as somebody new.
    """
    found = evaluate(model, partition, at_ms, context)
    order = _alike(model, found)
    propensity, rank = np.empty(len(order), np.float32), np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    for first in range(0, len(order), BATCH_ROWS):
        chosen = order[first : first + BATCH_ROWS]
        propensity[chosen] = model.predict(found.matrix[chosen])
    last_event_ms = np.where(found.last_age_ms < 0, 0, at_ms - found.last_age_ms)
    return Scored(propensity, rank, found.matrix, last_event_ms)


def evaluate(model: Bundle, partition: Partition, at_ms: int, context: Mapping[str, object]) -> Evaluated:
    """The features of a partition's visitors as of at_ms."""
    rows = len(partition.visitor_hash)
    return features.evaluate(
        model.plan,
        partition.records,
        partition.starts,
        np.full(rows, at_ms, np.int64),
        partition.traits,
        partition.trait_starts,
        np.tile(np.array(model.plan.encode_request(context), np.float32), (rows, 1)),
    )


def _alike(model: Bundle, found: Evaluated) -> npt.NDArray[np.int64]:
    """int64[n]: an order in which rows that are alike stand together, for the model to go the same ways through its
    trees: that takes a third less time than rows as they come (docs/adr/0011-alike-rows-together.md).
    """
    codes = [
        column for column, feature in enumerate(model.spec.features.values()) if getattr(feature, "categories", None)
    ]
    activity = np.log2(found.events + 1).astype(np.int64)
    missing = np.isnan(found.matrix).sum(axis=1)
    return np.lexsort((found.last_age_ms, activity, *found.matrix.T[codes], missing))


def _table(model: Bundle, ids: Sequence[str], scored: Scored, places: npt.NDArray[np.int64], job: Job) -> Any:
    rows = len(ids)
    own = (
        _texts(ids),
        _numbers(scored.propensity, pyarrow.float32()),
        _numbers(model.percentiles(scored.propensity).astype(np.float32), pyarrow.float32()),
        pyarrow.DictionaryArray.from_arrays(_numbers(places, pyarrow.int64()), _texts(SEGMENTS)).cast(pyarrow.string()),
        _texts([model.name] * rows),
        _texts([model.version] * rows),
        _numbers(np.full(rows, job.at_ms), COLUMNS["at"]),
        _numbers(scored.last_event_ms, pyarrow.int64()),
    )
    place = {name: column for column, name in enumerate(model.spec.names)}
    chosen = [_numbers(np.ascontiguousarray(scored.matrix[:, place[name]]), pyarrow.float32()) for name in job.columns]
    return pyarrow.table([*own, *chosen], schema(job.columns))


def _numbers(values: npt.NDArray[Any], kind: Any) -> Any:
    """A column over the memory of an array. pyarrow.array imports pandas, which takes as long as 50,000 scores."""
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])


def _texts(values: Sequence[str]) -> Any:
    encoded = [text.encode() for text in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pyarrow.StringArray.from_buffers(len(values), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(encoded)))


def schema(columns: Sequence[str] = ()) -> Any:
    """The schema of a snapshot with these features."""
    return pyarrow.schema([*COLUMNS.items(), *((name, pyarrow.float32()) for name in columns)])


def _columns(model: Bundle, asked: Sequence[str]) -> tuple[str, ...]:
    chosen = model.spec.names if tuple(asked) == (ALL,) else tuple(dict.fromkeys(asked))
    unknown = [name for name in chosen if name not in model.spec.names]
    if unknown:
        raise PropensityError(
            f"--features {unknown[0]}: model {model.name} has no such feature; there are {', '.join(model.spec.names)}"
        )
    taken = [name for name in chosen if name in COLUMNS]
    if taken:
        raise PropensityError(f"--features {taken[0]}: a snapshot has a column of this name already; leave it out")
    return chosen


@lru_cache(maxsize=2)
def _model(directory: Path) -> Bundle:
    return bundle.load(directory)
