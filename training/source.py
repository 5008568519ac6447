"""The log of events: files of any origin, read into records and kept on disk in partitions by visitor, so that memory
stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb

from service.core.spec import FeatureSpec
from training import joins
from training.columns import kept
from training.connection import Progress, alone, connect
from training.eventfiles import find_files, glob_of, groups, head_of, parquet_rows, reader_of, told
from training.partition import Partition, assemble, empty
from training.relation import Relation, latest, rejects
from training.summary import Summary, count, judge, summarise, with_joined

# A partition is loaded whole: a million events take some 300 MB while they are sorted and turned into rows.
_PARTITION_ROWS: Final = 1_000_000
MOST_PARTITIONS: Final = 256


@dataclass(frozen=True)
class EventLog:
    """Normalised events on disk, in partitions by visitor. Made by `read`; lives as long as its directory."""

    spec: FeatureSpec
    directory: Path
    partitions: int
    summary: Summary
    connection: duckdb.DuckDBPyConnection

    def __iter__(self) -> Iterator[Partition]:
        for index in range(self.partitions):
            yield self.partition(index)

    def partition(self, index: int, *, with_ids: bool = False) -> Partition:
        """Partition `index` in memory; with_ids also loads the visitors' ids."""
        return load(self.connection, self.directory, self.spec, index, with_ids)


def read(
    paths: Sequence[str],
    spec: FeatureSpec,
    workdir: Path,
    *,
    max_bad_rows: int = 1000,
    memory_limit: str = "1GB",
    on_progress: Progress | None = None,
    now_ms: int | None = None,
    partitions: int = 1,
) -> EventLog:
    """Read event files (CSV, Parquet, NDJSON; also .gz; globs and directories) into `workdir`.

    What `service.ingest` refuses, received at now_ms (the clock's unless given), is bad here too: counted, shown, and
    an error beyond max_bad_rows. `partitions`: at least so many. Raises UnreadableEvents.
    """
    files = find_files(paths)
    connection = connect(workdir, memory_limit)
    partitions = max(partition_count(connection, files), partitions)
    relations = [Relation(connection, spec, *group) for group in groups(files, spec)]
    for number, relation in enumerate(relations):
        relation.copy(workdir / f"group{number}", partitions, latest(now_ms), on_progress)
    missing = set.intersection(*(relation.missing for relation in relations))
    counts = [count(connection, spec, [glob_of(file) for file in workdir.glob("*/*/*.parquet")])]
    summary = summarise(spec, files, counts, missing, rejects(connection))
    judge(summary, spec, max_bad_rows, relations)
    summary = with_joined(connection, workdir, relations, summary)
    if summary.joined:
        with told():
            written = [glob_of(file) for file in workdir.glob("group*/*/*.parquet")]
            joins.move(connection, workdir, written, partitions, workdir / joins.MOVED)
    return EventLog(spec, workdir, partitions, summary, connection)


def load_partition(
    directory: Path, spec: FeatureSpec, index: int, memory_limit: str, *, with_ids: bool = False
) -> Partition:
    """Partition `index` of the log in `directory`, in a process that shares nothing but files with its reader."""
    with alone(directory, memory_limit) as connection:
        return load(connection, directory, spec, index, with_ids)


def load(
    connection: duckdb.DuckDBPyConnection, directory: Path, spec: FeatureSpec, index: int, with_ids: bool
) -> Partition:
    """A partition of the log in a directory; with_ids also loads the visitors' ids."""
    files = [glob_of(file) for file in directory.glob(f"*/part={index}/*.parquet")]
    if not files:
        return empty(spec, with_ids)
    columns = ["visitor_hash", "ts_ms", "kind", "id", "attribute", "value", *kept(spec)]
    where = "bad IS NULL"
    if joins.spans_file(directory).exists():
        has_moved = any(directory.glob(f"{joins.MOVED}*/part={index}"))
        columns += joins.COLUMNS if has_moved else []
        where += f" AND {joins.left_out(directory, has_moved)}"
    rows = f"FROM read_parquet(?, hive_partitioning = false, union_by_name = true) WHERE {where}"
    with told():
        query = f"SELECT {', '.join(columns)} {rows} ORDER BY visitor_hash, ts_ms"
        loaded = connection.execute(query, [files]).fetchnumpy()
        ids = _visitor_ids(connection, rows, files) if with_ids else None
    return assemble(spec, loaded, ids)


def _visitor_ids(connection: duckdb.DuckDBPyConnection, rows: str, files: Sequence[str]) -> list[str]:
    """In the order of their hashes. On their own, as rows that carry their ids take half as long again to sort."""
    query = f"SELECT min(visitor) AS visitor {rows} GROUP BY visitor_hash ORDER BY visitor_hash"
    found: list[str] = connection.execute(query, [files]).fetchnumpy()["visitor"].tolist()
    return found


def partition_count(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> int:
    """In how many partitions the events of files fit into memory one by one, at most MOST_PARTITIONS."""
    rows = 0.0
    for file in files:
        if reader_of(file) == "parquet":
            rows += parquet_rows(connection, file)
        else:
            head, share = head_of(file)
            rows += head.count(b"\n") / share
    return min(int(rows / _PARTITION_ROWS) + 1, MOST_PARTITIONS)
