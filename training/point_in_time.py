"""Feature values at given moments of the past: what the service would have seen of a visitor then."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from service.core import events, features
from service.core.errors import PropensityError
from service.core.features import Plan
from service.core.spec import FeatureSpec, Source
from training import eventfiles, joins, source, specfile, sql
from training.dataset import View
from training.engine import Engine, Here
from training.partition import Partition
from training.relation import Relation, rejects
from training.source import EventLog

_OWN_COLUMNS: Final = {"visitor_id": pyarrow.string(), "at": pyarrow.int64()}
_OUTPUTS: Final = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
_BATCH_ROWS: Final = 100_000


def write(
    events_paths: list[str],
    spec_path: Path,
    at: Path,
    out: Path,
    *,
    max_bad_rows: int = 1000,
    memory_limit: str = "1GB",
    engine: Engine | None = None,
    on_progress: Callable[[str, float], None] = lambda stage, share: None,
) -> int:
    """Write `out` (.parquet or .csv): the rows of `at` in their order, each with the features of that moment.

    at: a file with the columns visitor_id and at (epoch s or ms, ISO 8601, or a datetime), and, where the spec has
    request features, columns of their names. Returns the number of rows. Raises PropensityError.
    """
    if out.suffix not in _OUTPUTS:
        raise PropensityError(f"{out}: cannot write this kind of file; name it .parquet or .csv")
    spec = specfile.load(spec_path)
    taken = [name for name in _OWN_COLUMNS if name in spec.features]
    if taken:
        raise PropensityError(f"features.{taken[0]}: the output has a column of this name; choose another")
    engine = engine or Here()
    out.parent.mkdir(parents=True, exist_ok=True)
    with engine.workdir(out.parent) as made:
        workdir = Path(made)
        log = engine.read(
            events_paths,
            spec,
            workdir / "log",
            max_bad_rows=max_bad_rows,
            memory_limit=memory_limit,
            on_progress=lambda share: on_progress("Reading events", share),
        )
        _load_moments(log, at)
        if joins.spans_file(log.directory).exists():
            _follow_logins(log)
        job = Job(log.directory, spec, workdir / "asked", workdir / "features", memory_limit)
        job.out.mkdir()
        log.connection.execute(f"COPY asked TO {sql.literal(str(job.asked))} (FORMAT parquet, PARTITION_BY (part))")
        total = 0
        for done, (_, rows) in enumerate(engine.run(write_partition, job, log.partitions), 1):
            total += rows
            on_progress("Computing features", done / log.partitions)
        on_progress("Writing", 0)
        _write_in_order(log.connection, job.out, spec.names, out)
        log.connection.close()
    return total


@dataclass(frozen=True)
class Job:
    """What a process needs to compute the features that are asked of any partition."""

    log: Path
    spec: FeatureSpec
    asked: Path
    out: Path
    memory_limit: str


def write_partition(job: Job, index: int) -> int:
    """Write the features that are asked of a partition's visitors; how many rows."""
    files = [str(file) for file in (job.asked / f"part={index}").glob("*.parquet")]
    if not files:
        return 0
    asked = duckdb.execute("FROM read_parquet(?, hive_partitioning = false) ORDER BY number", [files]).fetchnumpy()
    partition = source.load_partition(job.log, job.spec, index, job.memory_limit)
    table = _features_of(features.compile(job.spec), partition, asked)
    pyarrow.parquet.write_table(table, job.out / f"{index}.parquet")
    return int(table.num_rows)


def _load_moments(log: EventLog, at: Path) -> None:
    """Table `asked`: number, visitor_hash, visitor_id, at_ms and request codes of each row, with its partition."""
    files = eventfiles.find_files([str(at)])
    if len(files) > 1:
        raise PropensityError(f"{at}: holds {len(files)} files; give one with the columns visitor_id and at")
    mapping = Source(visitor_id="visitor_id", timestamp="at")
    relation = Relation(log.connection, log.spec, mapping, eventfiles.reader_of(files[0]) or "csv", files)
    for name in ("visitor_id", "at"):
        if name not in relation.types:
            raise PropensityError(f"{at}: has no column {name}; it has {', '.join(relation.types)}")
    visitor = sql.name_of(relation.expression("visitor_id", "visitor_id"))
    moment = sql.milliseconds(relation.expression("at", "at"))
    columns = [f"{relation.request(kind)} AS request{place}" for place, kind in enumerate(log.spec.requests.values())]
    bad_before, _ = rejects(log.connection)
    log.connection.execute("SET preserve_insertion_order = true")
    log.connection.execute(
        f"CREATE TEMP TABLE asked AS SELECT row_number() OVER () AS number, {visitor} AS visitor_id, "
        f"hash(coalesce({visitor}, '')) AS visitor_hash, {moment} AS at_ms, "
        f"(hash(coalesce({visitor}, '')) % {log.partitions})::INTEGER AS part "
        f"{''.join(', ' + column for column in columns)} FROM {relation.scan}"
    )
    bad, lines = rejects(log.connection)
    if bad > bad_before:
        raise PropensityError(f"{at}: {bad - bad_before} lines do not fit the others: {'; '.join(lines)}; correct them")
    unreadable = log.connection.execute(
        "SELECT count(*), min(number) FROM asked WHERE at_ms IS NULL OR visitor_id IS NULL"
    ).fetchall()[0]
    if unreadable[0]:
        raise PropensityError(
            f"{at}: {unreadable[0]} rows have no visitor_id or no readable at, the first is row {unreadable[1]}; "
            "write moments as epoch milliseconds or ISO 8601"
        )


def _follow_logins(log: EventLog) -> None:
    """Ask for whom a visitor was joined into by the moment; before that it is where its owner is."""
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE asked AS
            SELECT asked.* EXCLUDE (visitor_hash, part),
                CASE WHEN since_ms = 0 THEN owner_hash ELSE visitor_hash END AS visitor_hash,
                coalesce((owner_hash % {log.partitions})::INTEGER, part) AS part
            FROM asked ASOF LEFT JOIN {joins.spans(log.directory)} AS spans
            ON asked.visitor_hash = spans.anonymous_hash AND asked.at_ms >= spans.from_ms"""
    )


def _features_of(plan: Plan, partition: Partition, asked: Mapping[str, Any]) -> Any:
    request = np.empty((len(asked["number"]), len(plan.spec.requests)), np.float32)
    for place in range(request.shape[1]):
        request[:, place] = np.ma.filled(asked[f"request{place}"], np.nan)
    matrix = vectors(plan, partition, np.asarray(asked["visitor_hash"]), np.asarray(asked["at_ms"]), request)
    own = (asked["number"], np.asarray(asked["visitor_id"], object), asked["at_ms"])
    columns = [np.ascontiguousarray(values) for values in (*own, *matrix.T)]
    types = [pyarrow.int64(), *_OWN_COLUMNS.values(), *[pyarrow.float32()] * plan.width]
    arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    # Numbered, since DuckDB takes names that differ in case alone for one.
    return pyarrow.table(arrays, [f"column{place}" for place in range(len(arrays))])


def vectors(
    plan: Plan,
    partition: Partition,
    visitor_hash: npt.NDArray[np.uint64],
    at_ms: npt.NDArray[np.int64],
    request: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """float32[n, F] of visitors, known to the partition or not, at moments int64[n]; request: float32[n, R]."""
    place = np.searchsorted(partition.visitor_hash, visitor_hash)
    inside = place < len(partition.visitor_hash)
    known = np.zeros(len(place), np.bool_)
    known[inside] = partition.visitor_hash[place[inside]] == visitor_hash[inside]
    out = np.empty((len(place), plan.width), np.float32)
    if known.any():
        out[known] = View(partition).vectors(plan, place[known], at_ms[known], request[known])
    strangers = int((~known).sum())
    if strangers:
        nothing = np.empty(0, events.RECORD), np.zeros(strangers + 1, np.int64)
        out[~known] = features.matrix(plan, *nothing, at_ms[~known], *nothing, request[~known])
    return out


def _write_in_order(connection: duckdb.DuckDBPyConnection, parts: Path, names: Sequence[str], out: Path) -> None:
    fresh = out.with_name(f".{out.name}.new")
    fields = [*_OWN_COLUMNS.items(), *((name, pyarrow.float32()) for name in names)]
    schema = pyarrow.schema(fields)
    files = [str(file) for file in parts.iterdir()]
    try:
        with _OUTPUTS[out.suffix](str(fresh), schema) as writer:
            if files:
                rows = connection.sql("SELECT * EXCLUDE column0 FROM read_parquet(?) ORDER BY column0", params=[files])
                for batch in rows.to_arrow_reader(_BATCH_ROWS):
                    writer.write_batch(pyarrow.record_batch(batch.columns, schema=schema))
        fresh.replace(out)
    except OSError as error:
        raise PropensityError(f"cannot write {out}: {os.strerror(error.errno) if error.errno else error}") from None
    finally:
        fresh.unlink(missing_ok=True)
