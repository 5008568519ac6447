"""Event files of any origin, read by DuckDB into event records, partitioned by visitor so that memory stays bounded.

The rules that make a record of an event are those of `service.ingest`, said in SQL; a test holds the two together.
"""

from __future__ import annotations

import copy
import fnmatch
import gzip
import hashlib
import re
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt

from service.core import events
from service.core.errors import PropensityError
from service.core.events import Records
from service.core.spec import EventColumn, FeatureSpec, Request, Source
from training import joins, sql
from training.sql import Field

_READERS: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".jsonl": "json",
    ".json": "json",
}
# A partition is loaded whole: a million events take some 300 MB while they are sorted and turned into rows.
_PARTITION_ROWS: Final = 1_000_000
_MAX_PARTITIONS: Final = 256
_LEAST_SLICE: Final = 100_000
# Every thread holds its rows until they are written: 20 million events on 64 threads did not fit into 1 GB.
_MOST_THREADS: Final = 8
_FLUSHED_ROWS: Final = 100_000
_HEAD_BYTES: Final = 1 << 20
_SNIFFED_ROWS: Final = 200_000
# A line that does not fit the columns' types is kept in a table of its own, to be counted and shown.
_REJECTS: Final = "store_rejects = true, rejects_limit = 100000"
_NDJSON: Final = "format = 'newline_delimited', ignore_errors = true"
_NATIVE: Final = ("type", "event", "name", "userId", "anonymousId", "previousId", "messageId", "timestamp")
_SECTIONS: Final = ("properties", "context", "traits")
_TYPES: Final = ("track", "page", "identify", "screen", "group", "alias")
_JOINING: Final = ("identify", "alias")
# Traits that say who somebody is, and the country that a number is of.
PERSONAL: Final = ("email", "phone", "country")
_PAGE_VIEWED: Final = "Page Viewed"
_LONGEST_ID: Final = 256
_FUTURE_MS: Final = 24 * 3_600_000
NEVER: Final = 2**62

Progress = Callable[[float], None]


class UnreadableEvents(PropensityError):
    """Event files that cannot be used as they are; the message names the file, the column and what to write."""


@dataclass(frozen=True)
class Summary:
    """What was read: counts of rows, examples of bad ones, and the span of time."""

    files: tuple[str, ...]
    rows: int
    events: int
    ignored: int
    bad: int
    examples: tuple[str, ...]
    missing_properties: tuple[str, ...]
    visitors: int
    first_ms: int
    last_ms: int
    fingerprint: str
    joined: int = 0  # anonymous visitors who were joined into others; they are none of `visitors`


@dataclass(frozen=True)
class Partition:
    """The events of some visitors in canonical order, each once. Visitor v owns records[starts[v]:starts[v + 1]]."""

    visitor_hash: npt.NDArray[np.uint64]  # [V] ascending
    visitor_ids: Sequence[str] | None  # [V]
    records: Records  # [E]
    starts: npt.NDArray[np.int64]  # [V + 1]
    request: npt.NDArray[np.float32]  # [E, R] the context of each event, as a request at that moment would carry it
    traits: Records  # [T]
    trait_starts: npt.NDArray[np.int64]  # [V + 1]
    joins: Joins | None = None  # None where nobody was joined

    def at(self, moment_ms: int) -> Partition:
        """Whom it holds at a moment, with what each has then; nobody who is joined into another by then."""
        if self.joins is None:
            return self
        stays = self.joins.until_ms > moment_ms
        kept, starts = _left(self.records, self.starts, stays, self.joins.since_ms <= moment_ms)
        kept_traits, trait_starts = _left(self.traits, self.trait_starts, stays, self.joins.trait_since_ms <= moment_ms)
        return Partition(
            self.visitor_hash[stays],
            None if self.visitor_ids is None else list(compress(self.visitor_ids, stays)),
            self.records.take(kept),
            starts,
            self.request.take(kept, axis=0),
            self.traits.take(kept_traits),
            trait_starts,
        )


@dataclass(frozen=True)
class Joins:
    """What logins made of the visitors of a partition; the rules are in `training.joins`.

    A visitor who was joined has what it did until then; the same is among the records of whom it was joined into.
    """

    since_ms: npt.NDArray[np.int64]  # [E] from when on a record is its visitor's; 0 where it always was
    trait_since_ms: npt.NDArray[np.int64]  # [T]
    until_ms: npt.NDArray[np.int64]  # [V] when the visitor was joined; NEVER if it was not
    person: npt.NDArray[np.int64]  # [V] the number of whom it was joined into, or its own


def _left(
    records: Records, starts: npt.NDArray[np.int64], stays: npt.NDArray[np.bool_], visible: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the visible records of the visitors who stay, each once, and where those of each of them start."""
    owner = np.repeat(np.arange(len(stays)), np.diff(starts))
    kept = np.flatnonzero(visible & stays[owner])
    kept = kept[events.first_of_each(records.take(kept), owner[kept])]
    sizes = np.bincount(owner[kept], minlength=len(stays))[stays]
    return kept, np.concatenate(([0], np.cumsum(sizes)))


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
        return _partition(self.connection, self.directory, self.spec, index, with_ids)


def load_partition(
    directory: Path, spec: FeatureSpec, index: int, memory_limit: str, *, with_ids: bool = False
) -> Partition:
    """Partition `index` of the log in `directory`, in a process that shares nothing but files with its reader."""
    with _alone(directory, memory_limit) as connection:
        return _partition(connection, directory, spec, index, with_ids)


@contextmanager
def _alone(directory: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of one thread, which spills where no other process does."""
    workdir = directory / f"process-{uuid.uuid4().hex}"
    connection = connect(workdir, memory_limit, threads=1)
    try:
        yield connection
    finally:
        connection.close()
        shutil.rmtree(workdir, ignore_errors=True)


def _partition(
    connection: duckdb.DuckDBPyConnection, directory: Path, spec: FeatureSpec, index: int, with_ids: bool
) -> Partition:
    files = [_pattern(file) for file in directory.glob(f"*/part={index}/*.parquet")]
    if not files:
        return _empty(spec, with_ids)
    columns = ["visitor_hash", "ts_ms", "kind", "id", "attribute", "value", *_kept(spec)]
    where = "bad IS NULL"
    if joins.spans_file(directory).exists():
        has_moved = any(directory.glob(f"{joins.MOVED}*/part={index}"))
        columns += joins.COLUMNS if has_moved else []
        where += f" AND {joins.left_out(directory, has_moved)}"
    rows = f"FROM read_parquet(?, hive_partitioning = false, union_by_name = true) WHERE {where}"
    with _told():
        query = f"SELECT {', '.join(columns)} {rows} ORDER BY visitor_hash, ts_ms"
        loaded = connection.execute(query, [files]).fetchnumpy()
        ids = _visitor_ids(connection, rows, files) if with_ids else None
    return _assemble(spec, loaded, ids)


def _visitor_ids(connection: duckdb.DuckDBPyConnection, rows: str, files: Sequence[str]) -> list[str]:
    """In the order of their hashes. On their own, as rows that carry their ids take half as long again to sort."""
    query = f"SELECT min(visitor) AS visitor {rows} GROUP BY visitor_hash ORDER BY visitor_hash"
    found: list[str] = connection.execute(query, [files]).fetchnumpy()["visitor"].tolist()
    return found


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
    partitions = max(_partition_count(connection, files), partitions)
    relations = [Relation(connection, spec, *group) for group in groups(files, spec)]
    for number, relation in enumerate(relations):
        relation.copy(workdir / f"group{number}", partitions, _latest(now_ms), on_progress)
    missing = set.intersection(*(relation.missing for relation in relations))
    counts = [count(connection, spec, [_pattern(file) for file in workdir.glob("*/*/*.parquet")])]
    summary = _summarise(spec, files, counts, missing, rejects(connection))
    _judge(summary, spec, max_bad_rows, relations)
    summary = _joined(connection, workdir, relations, summary)
    if summary.joined:
        with _told():
            written = [_pattern(file) for file in workdir.glob("group*/*/*.parquet")]
            joins.move(connection, workdir, written, partitions, workdir / joins.MOVED)
    return EventLog(spec, workdir, partitions, summary, connection)


def _joined(
    connection: duckdb.DuckDBPyConnection, directory: Path, relations: Sequence[Relation], summary: Summary
) -> Summary:
    """The summary once it is known who was joined into whom."""
    if all(relation.login is None for relation in relations):
        return summary
    with _told():
        found = joins.find(connection, directory, [_pattern(file) for file in directory.glob("*/*/*.parquet")])
    if not found.content:
        return summary
    fingerprint = _fingerprint(summary.fingerprint, found.content)
    return replace(summary, visitors=summary.visitors - found.joined, joined=found.joined, fingerprint=fingerprint)


def _fingerprint(*parts: object) -> str:
    return hashlib.md5("-".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise UnreadableEvents(first_line(error)) from None


def _latest(now_ms: int | None) -> int:
    return (time.time_ns() // 1_000_000 if now_ms is None else now_ms) + _FUTURE_MS


def _judge(summary: Summary, spec: FeatureSpec, max_bad_rows: int, relations: Sequence[Relation]) -> None:
    if summary.bad > max_bad_rows:
        raise UnreadableEvents(
            f"{summary.bad} of {summary.rows} rows are bad, more than --max-bad-rows {max_bad_rows}; for example "
            f"{'; '.join(summary.examples)}. Correct source.timestamp, source.timestamp_format or source.where in "
            "the spec, or raise --max-bad-rows"
        )
    if not summary.events:
        names = sorted({name for relation in relations for name in relation.names()})[:10]
        bad = f"; {summary.bad} rows are bad, for example {'; '.join(summary.examples)}" if summary.bad else ""
        raise UnreadableEvents(
            f"none of {summary.rows} rows is an event of the catalogue ({_names(spec)}); the files have "
            f"{', '.join(names) or 'no names of events'}{bad}; map the files' event names with source.event in the spec"
        )


@dataclass(frozen=True)
class Slicing:
    """A reading of event files in slices, each by a process that shares nothing but files with the others."""

    spec: FeatureSpec
    files: tuple[Path, ...]
    directory: Path
    partitions: int
    latest_ms: int
    memory_limit: str
    relations: tuple[Relation, ...]
    slices: tuple[tuple[int, str], ...]  # the number of a relation, and what to scan instead of all of it

    def summarise(self, found: Sequence[Slice], counts: Sequence[Counts], max_bad_rows: int) -> Summary:
        """The summary that `read` gives. Raises what it raises."""
        missing = set.intersection(
            *(
                {name for one in found if one.relation == number for name in one.missing}
                for number in range(len(self.relations))
            )
        )
        rejected = sum(one.rejected for one in found), [line for one in found for line in one.lines][:3]
        summary = _summarise(self.spec, self.files, counts, missing, rejected)
        _judge(summary, self.spec, max_bad_rows, self.relations)
        return summary

    def joined(self, connection: duckdb.DuckDBPyConnection, summary: Summary) -> Summary:
        """The summary once it is known who was joined into whom: if anybody was, `move_slice` has to follow."""
        return _joined(connection, self.directory, self.relations, summary)


@dataclass(frozen=True)
class Slice:
    """What was found while a slice was read."""

    relation: int
    missing: frozenset[str]
    rejected: int
    lines: tuple[str, ...]


def sliced(
    connection: duckdb.DuckDBPyConnection,
    paths: Sequence[str],
    spec: FeatureSpec,
    workdir: Path,
    most: int,
    memory_limit: str,
) -> Slicing:
    """Event files in at most about so many slices: of Parquet rows, of other files whole files."""
    files = [file.absolute() for file in find_files(paths)]
    relations = [Relation(connection, spec, *group) for group in groups(files, spec)]
    slices = [(number, scan) for number, relation in enumerate(relations) for scan in relation.scans(most)]
    partitions = max(_partition_count(connection, files), min(most, _MAX_PARTITIONS))
    return Slicing(
        spec,
        tuple(files),
        workdir.absolute(),
        partitions,
        _latest(None),
        memory_limit,
        tuple(relations),
        tuple(slices),
    )


def read_slice(job: Slicing, index: int) -> Slice:
    """Write the normalised events of a slice into the directory of all of them."""
    number, scan = job.slices[index]
    with _alone(job.directory, job.memory_limit) as connection:
        relation = job.relations[number].attached(connection, scan)
        relation.copy(job.directory / f"slice{index}", job.partitions, job.latest_ms, None)
        rejected, lines = rejects(connection)
    return Slice(number, frozenset(relation.missing), rejected, tuple(lines))


def count_partition(job: Slicing, index: int) -> Counts:
    """What a partition holds, once all slices are read."""
    files = [_pattern(file) for file in job.directory.glob(f"*/part={index}/*.parquet")]
    with _alone(job.directory, job.memory_limit) as connection:
        return count(connection, job.spec, files)


def move_slice(job: Slicing, index: int) -> None:
    """Give what joined visitors did to whom it belongs, in some partitions: every so many-th as there are slices."""
    parts = range(index, job.partitions, len(job.slices))
    files = [_pattern(file) for part in parts for file in job.directory.glob(f"slice*/part={part}/*.parquet")]
    if files:
        with _alone(job.directory, job.memory_limit) as connection, _told():
            target = job.directory / f"{joins.MOVED}{index}"
            joins.move(connection, job.directory, files, job.partitions, target)


def connect(workdir: Path, memory_limit: str = "1GB", threads: int = _MOST_THREADS) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in UTC, of at most so many threads, that spills to `workdir` beyond memory_limit."""
    try:
        connection = duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": str(workdir / "spill")})
    except duckdb.Error as error:
        raise PropensityError(f"--memory-limit {memory_limit}: {first_line(error)}; write for example 1GB") from None
    threads = min(int(connection.execute("SELECT current_setting('threads')").fetchall()[0][0]), threads)
    connection.execute(
        "SET TimeZone = 'UTC'; SET preserve_insertion_order = false; SET enable_progress_bar = false; "
        f"SET threads = {threads}; SET partitioned_write_flush_threshold = {_FLUSHED_ROWS}"
    )
    return connection


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files of paths, globs and directories, sorted, each once. Raises UnreadableEvents if there is none."""
    found: set[Path] = set()
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found |= {file for file in path.rglob("*") if file.is_file() and _is_events(file.relative_to(path))}
        elif path.is_file():
            if reader_of(path) is None:
                raise UnreadableEvents(f"{path}: unknown kind of file; give one of {', '.join(_READERS)} (also .gz)")
            found.add(path)
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else text
            matched = [str(file) for file in root.glob(pattern) if file.is_dir() or reader_of(file) is not None]
            if not matched:
                raise UnreadableEvents(f"{text}: no such file, directory or glob with event files")
            found.update(find_files(matched))
    if not found:
        raise UnreadableEvents(f"{' '.join(paths)}: holds no event files ({', '.join(_READERS)}, also .gz)")
    return sorted(found)


def _is_events(path: Path) -> bool:
    """Whether a file of a directory is to be read: hidden ones are what editors and notebooks leave behind."""
    return reader_of(path) is not None and not any(part.startswith(".") for part in path.parts)


def reader_of(path: Path) -> str | None:
    """`csv`, `parquet` or `json` by the file's name; None for any other file."""
    name = path.name.removesuffix(".gz")
    return _READERS.get(Path(name).suffix)


class Relation:
    """One group of files with one mapping, as SQL."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        spec: FeatureSpec,
        source: Source,
        reader: str,
        files: Sequence[Path],
    ) -> None:
        self.connection, self.spec, self.source, self.files, self.reader = connection, spec, source, files, reader
        self.missing: set[str] = set()
        self._extracted: dict[tuple[str, str], Field] = {}
        self._flaw = "NULL::VARCHAR"
        self.scan = self._scan(reader)
        self.types: dict[str, str] = self._describe(self.scan)
        # Expressions are tried on an empty table of the same columns: files are sniffed once, not once a field.
        self.shape = f"shape_{uuid.uuid4().hex}"
        self._make_shape()

    def _make_shape(self) -> None:
        columns = ", ".join(f"{sql.identifier(name)} {kind}" for name, kind in self.types.items())
        self.connection.execute(f"CREATE TEMP TABLE {self.shape} ({columns})")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "connection"}

    def attached(self, connection: duckdb.DuckDBPyConnection, scan: str) -> Relation:
        """The same for another process, which scans a part."""
        made = copy.copy(self)
        made.connection, made.scan, made.missing = connection, scan, set()
        made._make_shape()
        return made

    def scans(self, most: int) -> list[str]:
        """SQL for parts of the files that make up the whole, about so many; each has all columns in their types."""
        if self.source.query is not None or most < 2:
            return [self.scan]
        if self.reader == "parquet":
            return self._parquet_scans(most)
        sizes = {file: file.stat().st_size for file in self.files}
        bins: list[list[Path]] = [[] for _ in range(min(most, len(self.files)))]
        for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
            min(bins, key=lambda held: sum(sizes[one] for one in held)).append(file)
        whole = as_list(self.files)
        return [self.scan.replace(whole, as_list(held)) for held in bins]

    def _parquet_scans(self, most: int) -> list[str]:
        rows = {file: _parquet_rows(self.connection, file) for file in self.files}
        each = max(sum(rows.values()) // most + 1, _LEAST_SLICE)
        scans = []
        for file, total in rows.items():
            parts = -(-total // each) if "file_row_number" not in self.types else 1
            bounds = [total * part // parts for part in range(parts + 1)]
            for first, end in pairwise(bounds):
                where = f"WHERE file_row_number >= {first} AND file_row_number < {end}" if parts > 1 else ""
                read = f"read_parquet({as_list([file])}{', file_row_number = true' if parts > 1 else ''})"
                columns = "* EXCLUDE (file_row_number)" if parts > 1 else "*"
                scans.append(f"(FROM {self.shape} UNION ALL BY NAME SELECT {columns} FROM {read} {where})")
        return scans

    def _scan(self, reader: str) -> str:
        listed = as_list(self.files)
        if reader == "parquet":
            scan = f"read_parquet({listed}, union_by_name = true)"
        elif reader == "csv":
            scan = self._scan_csv(listed)
        else:
            scan = self._scan_json(listed)
        if self.source.query is not None:
            parts = {"{file}": f"(FROM {scan})", "{dir}": str(self.files[0].parent).replace("'", "''")}
            scan = "(" + re.sub(r"\{(?:file|dir)\}", lambda found: parts[found[0]], self.source.query) + ")"
        return scan

    def _scan_csv(self, listed: str) -> str:
        try:
            return self._scan_csv_as(listed)
        except (UnreadableEvents, duckdb.Error):
            # Line ends of both kinds in one file, as after joining two exports, are no CSV by the letter.
            return self._scan_csv_as(f"{listed}, strict_mode = false")

    def _scan_csv_as(self, listed: str) -> str:
        columns = self._describe(f"read_csv({listed}, sample_size = {_SNIFFED_ROWS}, ignore_errors = true)")
        types = self._as_text(columns, self._written_otherwise(listed, columns))
        return f"read_csv({listed}, types = {{{types}}}, {_REJECTS})"

    def _as_text(self, columns: Mapping[str, str], also: Iterable[str] = ()) -> str:
        """Types of columns, those that hold ids, names or times as text: no leading zero is lost."""
        event = self.source.event
        ids = (self.source.visitor_id, self.source.anonymous_id, self.source.message_id)
        # Where the sample has digits alone, numbers behind it would lose their plus and their zeros.
        personal = [name for key in PERSONAL for name in (self.source.traits.get(key), f"traits.{key}", key)]
        named = (*ids, *personal, self.source.timestamp, event.column if event else None)
        kept = {name.lower() for name in (*_NATIVE, *named, *also) if name is not None}
        return ", ".join(
            f"{sql.literal(name)}: {sql.literal('VARCHAR' if name.lower() in kept else kind)}"
            for name, kind in columns.items()
        )

    def _written_otherwise(self, listed: str, columns: Mapping[str, str]) -> list[str]:
        """Columns whose text DuckDB's type would change: yes and no as booleans, codes such as 1/2 as dates."""
        texts = {name.lower() for name in self._text_columns()}
        found = [
            name
            for name, kind in columns.items()
            if name.lower() in texts and kind not in ("BOOLEAN", "BIGINT", "DOUBLE")
        ]
        flags = [name for name, kind in columns.items() if kind == "BOOLEAN"]
        if flags:
            tests = ", ".join(f"bool_or(lower({sql.identifier(name)}) NOT IN ('true', 'false'))" for name in flags)
            sample = f"SELECT * FROM read_csv({listed}, all_varchar = true, ignore_errors = true) LIMIT {_SNIFFED_ROWS}"
            row = self.connection.execute(f"SELECT {tests} FROM ({sample})").fetchall()[0]
            found += [name for name, otherwise in zip(flags, row, strict=True) if otherwise]
        return found

    def _text_columns(self) -> Iterator[str]:
        """Columns that are compared as text: attributes, and what has categories."""
        for section, name, is_text in self._fields():
            mapped: Mapping[str, str] = getattr(self.source, section)
            if is_text:
                yield from (mapped[name],) if name in mapped else (f"{section}.{name}", name)

    def _fields(self) -> Iterator[tuple[str, str, bool]]:
        """Section and name of everything that the spec reads of an event, and whether it is compared as text."""
        for kind in self.spec.events.values():
            for name, is_text in ((kind.value, False), (kind.attribute, True)):
                if name is not None:
                    yield "properties", name, is_text
        for feature in self.spec.requests.values():
            yield "context", feature.request, feature.categories is not None
        for key, is_text in trait_keys(self.spec).items():
            yield "traits", key, is_text
            yield "context", key, is_text

    def _scan_json(self, listed: str) -> str:
        found = self._json_keys(listed)
        is_mapped = any(self.source.model_dump(exclude={"files", "timestamp_format"}).values())
        if not is_mapped and {"userId", "anonymousId"} & found and {"timestamp", "event"} <= found:
            return self._scan_native_json(listed)
        types = self._describe(f"read_json({listed}, {_NDJSON}, sample_size = {_SNIFFED_ROWS}, union_by_name = true)")
        if list(types) == ["json"]:  # some line is no object, so DuckDB gave up
            types = dict.fromkeys(sorted(found), "JSON")
        return f"read_json({listed}, {_NDJSON}, columns = {{{self._as_text(types)}}})"

    def _json_keys(self, listed: str) -> set[str]:
        lines = f"SELECT json FROM read_json_objects({listed}, {_NDJSON}) LIMIT {_SNIFFED_ROWS}"
        try:
            rows = self.connection.execute(f"SELECT DISTINCT unnest(json_keys(json)) FROM ({lines})").fetchall()
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.files[0]}: {first_line(error)}") from None
        if not rows:
            raise UnreadableEvents(f"{self.files[0]}: holds no JSON object a line; write NDJSON, one event a line")
        return {key for (key,) in rows}

    def _scan_native_json(self, listed: str) -> str:
        """Ids, properties, context and traits as JSON: text and numbers are told apart as they are in a live event."""
        plain = ("type", "event", "name", "timestamp")
        ids = ("userId", "anonymousId", "previousId", "messageId")
        types = dict.fromkeys(plain, "VARCHAR") | dict.fromkeys((*ids, *_SECTIONS), "JSON")
        columns = ", ".join(f"{name}: '{kind}'" for name, kind in types.items())
        parts = []
        for place, key in enumerate(dict.fromkeys((section, name) for section, name, _ in self._fields())):
            field = sql.json_field(*key)
            self._extracted[key] = Field(f"text{place}", "JSON", f"sort{place}")
            parts += [f"{field.sql} AS text{place}", f"{field.sort} AS sort{place}"]
        whole = " AND ".join(f"coalesce(starts_with({section}, '{{'), true)" for section in _SECTIONS)
        self._flaw = (
            f"CASE WHEN coalesce({', '.join(plain)}) IS NULL THEN 'a line that is no event' WHEN NOT whole "
            "THEN 'properties, traits or context that are no object' END"
        )
        scan = f"read_json({listed}, {_NDJSON}, columns = {{{columns}}})"
        return f"(SELECT {', '.join((*plain, *ids, *parts))}, {whole} AS whole FROM {scan})"

    def _describe(self, relation: str) -> dict[str, str]:
        try:
            rows = self.connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.files[0]}: {first_line(error)}") from None
        return {row[0]: row[1] for row in rows}

    def expression(self, written: str, place: str) -> Field:
        """A column name or SQL expression of the mapping. Raises if the files cannot give it."""
        text = sql.identifier(written) if written in self.types else f"({written})"
        try:
            kind = self.connection.execute(f"DESCRIBE SELECT {text} AS x FROM {self.shape}").fetchall()[0][1]
        except duckdb.Error as error:
            raise UnreadableEvents(
                f"{self.files[0]}: {place}: {written} is no column and no expression over the columns "
                f"({first_line(error)}); the file has {', '.join(self.types)}"
            ) from None
        return sql.field(text, kind)

    def field(self, section: str, name: str) -> Field | None:
        """A property, context field or trait: as mapped, else where native files keep it."""
        mapped: Mapping[str, str] = getattr(self.source, section)
        if name in mapped:
            return self.expression(mapped[name], f"source.{section}.{name}")
        if (section, name) in self._extracted:
            return self._extracted[section, name]
        kind = self.types.get(section, "")
        if kind.startswith("STRUCT"):
            fields = self._describe(f"(SELECT unnest({sql.identifier(section)}) FROM {self.shape})")
            access = f"{sql.identifier(section)}[{sql.literal(name)}]"
            return sql.field(access, fields[name]) if name in fields else None
        if kind.startswith("MAP"):
            return sql.json_field(f"to_json({sql.identifier(section)})", name)
        if kind in ("JSON", "VARCHAR"):
            return sql.json_field(f"TRY_CAST({sql.identifier(section)} AS JSON)", name)
        return next((self._native(column) for column in (f"{section}.{name}", name) if column in self.types), None)

    @property
    def where(self) -> str:
        """The WHERE clause of the mapping, or nothing. Raises if the files cannot give it."""
        if self.source.where is None:
            return ""
        return f"WHERE {self.expression(self.source.where, 'source.where').sql}"

    def copy(self, target: Path, partitions: int, latest_ms: int, on_progress: Progress | None) -> None:
        """Write the normalised rows as Parquet, partitioned by visitor; what is later than latest_ms is bad."""
        texts = [place for place, is_text in enumerate(trait_keys(self.spec).values()) if is_text]
        hashes = [f"{sql.hash32(f'text{place}')} AS hash{place}" for place in texts]
        plain = [name for name in _kept(self.spec) if not name.startswith("hash")]
        plain += ["anonymous"] if self.login is not None else []
        query = f"""
            COPY (
                WITH mapped AS (SELECT {self._mapped()} FROM {self.scan} {self.where}),
                judged AS (SELECT *, {_bad(latest_ms)} AS bad FROM mapped)
                SELECT hash(coalesce(visitor, '')) AS visitor_hash, visitor, ts_ms,
                    coalesce(kind, 0)::USMALLINT AS kind, {sql.hash32("message")} AS id,
                    {sql.hash32("attribute")} AS attribute, TRY_CAST(number AS FLOAT) AS value,
                    {"".join(f"{column}, " for column in (*plain, *hashes))} bad,
                    (hash(coalesce(visitor, '')) % {partitions})::INTEGER AS part
                FROM judged
            ) TO {sql.literal(str(target))} (FORMAT parquet, PARTITION_BY (part), COMPRESSION snappy)"""
        try:
            _run(self.connection, query, on_progress)
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.files[0]}: {first_line(error)}") from None

    def _mapped(self) -> str:
        timestamp = self._timestamp()
        columns = [
            f"{self._visitor()} AS visitor",
            f"{sql.milliseconds(timestamp, self.source.timestamp_format)} AS ts_ms",
            f"{timestamp.sql} AS written",
            f"{self._kind()} AS kind",
            f"{self._problem()} AS problem",
            f"{self._message_id()} AS message",
            f"{self._by_kind('attribute')} AS attribute",
            f"{self._by_kind('value')} AS number",
        ]
        if self.login is not None:
            columns.append(f"{self.login} AS anonymous")
        for place, feature in enumerate(self.spec.requests.values()):
            columns.append(f"{self.request(feature)} AS request{place}")
        for place, (key, is_text) in enumerate(trait_keys(self.spec).items()):
            text, number = self.trait(key)
            columns.append(f"{number} AS trait{place}")
            columns += [f"{text} AS text{place}"] if is_text else []
        return ", ".join(columns)

    def _visitor(self) -> str:
        known = [one for one in (self._known(), self._anonymous()) if one is not None]
        if not known:
            raise UnreadableEvents(
                f"{self.files[0]}: has neither userId nor anonymousId; name the visitor's column with "
                f"source.visitor_id in the spec; the file has {', '.join(self.types)}"
            )
        return f"coalesce({', '.join(known)})"

    def _known(self) -> str | None:
        if self.source.visitor_id is not None:
            return sql.name_of(self.expression(self.source.visitor_id, "source.visitor_id"))
        return sql.name_of(self._native("userId")) if "userId" in self.types else None

    def _anonymous(self) -> str | None:
        if self.source.anonymous_id is not None:
            return sql.name_of(self.expression(self.source.anonymous_id, "source.anonymous_id"))
        is_native = self.source.visitor_id is None and "anonymousId" in self.types
        return sql.name_of(self._native("anonymousId")) if is_native else None

    @cached_property
    def login(self) -> str | None:
        """SQL for the anonymous visitor whom a row joins into its visitor; None where no row of these files does."""
        known, anonymous, has_types = self._known(), self._anonymous(), self.has_types
        if known is None or anonymous is None or not (has_types or self.source.anonymous_id is not None):
            return None
        anonymous = _if_short(anonymous)
        if has_types and self.source.anonymous_id is None and "previousId" in self.types:
            previous = _if_short(sql.name_of(self._native("previousId")))
            anonymous = f"coalesce(CASE {self._type()} WHEN 'alias' THEN {previous} END, {anonymous})"
        says = f"{self._type()} IN {_JOINING} AND" if has_types else ""
        return f"CASE WHEN {says} {known} IS NOT NULL THEN nullif({anonymous}, {known}) END"

    def envelope(self) -> dict[str, str]:
        """SQL for what a live event has beside its properties, traits and context, as far as the files have it."""
        parts = {
            "type": self._type(),
            "event": self._name(),
            "timestamp": sql.milliseconds(self._timestamp(), self.source.timestamp_format),
            "userId": self._known(),
            "anonymousId": self._anonymous(),
        }
        if self.has_types:
            parts |= {name: sql.text(self._native(name)) for name in ("name", "previousId") if name in self.types}
        return {name: text for name, text in parts.items() if text is not None}

    @property
    def has_types(self) -> bool:
        """Whether rows say which type of event they are."""
        return self.source.event is None and "type" in self.types

    def _native(self, name: str) -> Field:
        return sql.field(sql.identifier(name), self.types[name])

    def _timestamp(self) -> Field:
        if self.source.timestamp is None and "timestamp" not in self.types:
            raise UnreadableEvents(
                f"{self.files[0]}: has no column timestamp; name it with source.timestamp in the spec; "
                f"the file has {', '.join(self.types)}"
            )
        return self.expression(self.source.timestamp or "timestamp", "source.timestamp")

    def _kind(self) -> str:
        """SQL for the code of the event's kind; NULL where it is not in the catalogue."""
        codes = {kind.event: str(kind.code) for kind in self.spec.events.values()}
        page = codes.get(_PAGE_VIEWED, "NULL")
        if "name" in self.types:
            page = sql.choose(self._native("name").sql, codes, page)
        track = sql.choose(self._name(), codes)
        return f"(CASE {self._type()} WHEN 'track' THEN {track} WHEN 'page' THEN {page} END)::INTEGER"

    def _type(self) -> str:
        return f"coalesce({self._native('type').sql}, 'track')" if self.has_types else "'track'"

    def _name(self) -> str:
        """SQL for the name of a track event, in the catalogue's words."""
        event = self.source.event
        if event is not None:
            return self._foreign_name(event)
        if "event" not in self.types:
            raise UnreadableEvents(
                f"{self.files[0]}: has no column event; write source.event in the spec, as "
                "{constant: EVENT NAME} or a column; the file has " + ", ".join(self.types)
            )
        return self._native("event").sql

    def _foreign_name(self, event: EventColumn) -> str:
        if event.column is None:
            return sql.literal(event.constant or "")
        column = sql.text(self.expression(event.column, "source.event"))
        return sql.choose(column, {foreign: sql.literal(name) for foreign, name in event.names.items()}, column)

    def _problem(self) -> str:
        """SQL for what a live event would be refused for beside visitor and time; NULL for a sound one."""
        if self.source.event is not None:
            return "NULL::VARCHAR"
        sort = self._type()
        nameless = f"CASE WHEN coalesce({self._name()}, '') = '' THEN 'an event without a name' END"
        found = sql.choose(sort, {**dict.fromkeys(_TYPES, "NULL"), "track": nameless}, f"'type ' || {sort}")
        return f"coalesce({self._flaw}, {found})"

    def names(self) -> list[str]:
        """The most frequent names of events in the files."""
        found = self.connection.execute(
            f"SELECT {self._name()} AS name FROM {self.scan} {self.where} GROUP BY 1 ORDER BY count(*) DESC LIMIT 10"
        ).fetchall()
        return [name for (name,) in found if name]

    def _message_id(self) -> str:
        if self.source.message_id is not None:
            return sql.text(self.expression(self.source.message_id, "source.message_id"))
        return sql.text(self._native("messageId")) if "messageId" in self.types else "NULL::VARCHAR"

    def _by_kind(self, part: str) -> str:
        """SQL for the attribute's text or the value's number, which each kind of event keeps in its own property."""
        kinds: dict[str, list[str]] = {}
        for kind in self.spec.events.values():
            name = getattr(kind, part)
            if name is not None:
                kinds.setdefault(name, []).append(str(kind.code))
        fields = {name: self.field("properties", name) for name in kinds}
        self.missing |= {name for name, field in fields.items() if field is None}
        make = sql.text if part == "attribute" else sql.number
        cases = [
            f"WHEN {self._kind()} IN ({', '.join(kinds[name])}) THEN {make(field)}"
            for name, field in fields.items()
            if field is not None
        ]
        empty = "NULL::VARCHAR" if part == "attribute" else "NULL::DOUBLE"
        return f"CASE {' '.join(cases)} END" if cases else empty

    def request(self, feature: Request) -> str:
        """SQL for the code of a request feature, from the context that the event carries."""
        field = self.field("context", feature.request)
        if field is None:
            self.missing.add(f"context.{feature.request}")
            return "NULL::FLOAT"
        if feature.categories is None:
            return f"TRY_CAST({sql.request_number(field)} AS FLOAT)"
        text = sql.text(field)
        other = "NULL" if np.isnan(feature.other) else str(feature.other)
        codes = sql.choose(text, {name: str(code) for name, code in feature.codes.items()}, other)
        return f"(CASE WHEN {text} IS NOT NULL THEN {codes} END)::FLOAT"

    def trait(self, key: str) -> tuple[str, str]:
        """SQL for a trait's text and for its number."""
        fields = [field for section in ("traits", "context") if (field := self.field(section, key)) is not None]
        if not fields:
            self.missing.add(f"traits.{key}")
            return "NULL::VARCHAR", "NULL::FLOAT"
        text, number = (
            " ".join(f"WHEN {field.sql} IS NOT NULL THEN {make(field)}" for field in fields)
            for make in (sql.text, sql.number_or_flag)
        )
        return f"CASE {text} END", f"TRY_CAST(CASE {number} END AS FLOAT)"


def _bad(latest_ms: int) -> str:
    """SQL for why a row of `Relation.copy` is bad; NULL for a sound one."""
    return f"""CASE WHEN visitor IS NULL THEN coalesce(problem, 'a row without a visitor')
        WHEN length(visitor) > {_LONGEST_ID} THEN 'an id of more than {_LONGEST_ID} characters'
        WHEN ts_ms IS NULL OR ts_ms < 0 THEN 'timestamp ' || coalesce(trim(written::VARCHAR, '"'), 'missing')
        WHEN ts_ms > {latest_ms} THEN 'timestamp ' || trim(written::VARCHAR, '"') || ' in the future'
        ELSE problem END"""


def _if_short(text: str) -> str:
    """SQL for an id that is not too long to be one."""
    return f"CASE WHEN length({text}) <= {_LONGEST_ID} THEN {text} END"


def _kept(spec: FeatureSpec) -> list[str]:
    """Columns of a row beside its event: request features, and of each trait its number and the hash of its text."""
    requests = [f"request{place}" for place in range(len(spec.requests))]
    keys = list(enumerate(trait_keys(spec).values()))
    texts = [f"hash{place}" for place, is_text in keys if is_text]
    return [*requests, *(f"trait{place}" for place, _ in keys), *texts]


def as_list(files: Sequence[Path]) -> str:
    """A SQL list of files."""
    return "[" + ", ".join(sql.literal(_pattern(file)) for file in files) + "]"


def _pattern(path: Path) -> str:
    """A path as a DuckDB glob that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def first_line(error: object) -> str:
    """The first line of a library's message, which is all that a person needs of it."""
    advice = "; raise --memory-limit" if isinstance(error, duckdb.OutOfMemoryException) else ""
    return str(error).strip().splitlines()[0] + advice


def _names(spec: FeatureSpec) -> str:
    return ", ".join(kind.event for kind in spec.events.values())


def trait_keys(spec: FeatureSpec) -> dict[str, bool]:
    """Name of each trait a spec reads -> whether it is kept as text: some feature lists its categories."""
    keys: dict[str, bool] = {}
    for feature in spec.traits.values():
        keys[feature.trait] = keys.get(feature.trait, False) or feature.categories is not None
    return keys


def groups(files: Sequence[Path], spec: FeatureSpec) -> Iterator[tuple[Source, str, list[Path]]]:
    """Files that share a mapping and a layout. Without `source` in the spec, files are in the native format."""
    groups: dict[tuple[int, str, bytes], list[Path]] = {}
    sources = spec.source or (Source(),)
    for file in files:
        for number, source in enumerate(sources):
            if fnmatch.fnmatch(file.name, source.files):
                reader = reader_of(file) or ""
                # DuckDB reads CSV files whose columns differ together or keeps their bad lines, but not both.
                header = _head(file)[0].splitlines()[:1] if reader == "csv" else []
                groups.setdefault((number, reader, b"".join(header).strip()), []).append(file)
                break
        else:
            patterns = ", ".join(source.files for source in sources)
            raise UnreadableEvents(f"{file}: fits none of the patterns of source.files ({patterns}); add one")
    for (number, reader, _), group in groups.items():
        yield sources[number], reader, group


def _head(file: Path) -> tuple[bytes, float]:
    """The first bytes of a text file, unpacked, and the share of the file that they are."""
    try:
        with file.open("rb") as packed:
            head = (gzip.GzipFile(fileobj=packed) if file.suffix == ".gz" else packed).read(_HEAD_BYTES)
            share = min(1.0, packed.tell() / max(file.stat().st_size, 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableEvents(f"{file}: is no whole gzip file ({error})") from None
    except OSError as error:
        raise UnreadableEvents(f"{file}: cannot be read ({error.strerror})") from None
    return head, 1.0 if len(head) < _HEAD_BYTES else share


def _partition_count(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> int:
    rows = 0.0
    for file in files:
        if reader_of(file) == "parquet":
            rows += _parquet_rows(connection, file)
        else:
            head, share = _head(file)
            rows += head.count(b"\n") / share
    return min(int(rows / _PARTITION_ROWS) + 1, _MAX_PARTITIONS)


def _parquet_rows(connection: duckdb.DuckDBPyConnection, file: Path) -> int:
    query = "SELECT sum(num_rows) FROM parquet_file_metadata(?)"
    try:
        return int(connection.execute(query, [_pattern(file)]).fetchall()[0][0])
    except duckdb.Error as error:
        raise UnreadableEvents(f"{file}: {first_line(error)}") from None


def _run(connection: duckdb.DuckDBPyConnection, query: str, on_progress: Progress | None) -> None:
    done = threading.Event()

    def report() -> None:
        while on_progress is not None and not done.wait(0.2):
            on_progress(max(0.0, connection.query_progress()) / 100)

    watcher = threading.Thread(target=report)
    watcher.start()
    try:
        connection.execute(query)
    finally:
        done.set()
        watcher.join()


@dataclass(frozen=True)
class Counts:
    """What normalised rows hold; those of several visitors' partitions add up."""

    rows: int = 0
    events: int = 0
    ignored: int = 0
    bad: int = 0
    visitors: int = 0
    first_ms: int | None = None
    last_ms: int | None = None
    content: int = 0  # the sum of the rows' hashes
    examples: tuple[str, ...] = ()
    numbers: Mapping[int, int] = field(default_factory=dict)  # events whose value is a number, by kind


def count(connection: duckdb.DuckDBPyConnection, spec: FeatureSpec, written: Sequence[str]) -> Counts:
    """What is in normalised files, whose visitors are in no others."""
    if not written:
        return Counts()
    good = "bad IS NULL AND kind > 0"
    content = ", ".join(("visitor_hash", "ts_ms", "kind", "id", "attribute", "value", *_kept(spec), "bad"))
    table = "read_parquet(?, hive_partitioning = false, union_by_name = true)"
    counted = connection.execute(
        f"""SELECT count(*), count(*) FILTER ({good}), count(*) FILTER (bad IS NULL AND kind = 0), count(bad),
            count(DISTINCT visitor_hash) FILTER (bad IS NULL), min(ts_ms) FILTER ({good}), max(ts_ms) FILTER ({good}),
            coalesce(sum(hash({content})), 0) FROM {table}""",
        [written],
    ).fetchall()[0]
    examples = connection.execute(
        f"SELECT DISTINCT bad FROM {table} WHERE bad IS NOT NULL ORDER BY bad LIMIT 5", [written]
    ).fetchall()
    numbers = connection.execute(f"SELECT kind, count(value) FROM {table} WHERE {good} GROUP BY kind", [written])
    told = tuple(example for (example,) in examples)
    rows, events, ignored, bad, visitors, first_ms, last_ms, content = counted
    return Counts(rows, events, ignored, bad, visitors, first_ms, last_ms, content, told, dict(numbers.fetchall()))


def _summarise(
    spec: FeatureSpec,
    files: Sequence[Path],
    counts: Sequence[Counts],
    missing: set[str],
    rejected: tuple[int, list[str]],
) -> Summary:
    rows, content = sum(one.rows for one in counts), sum(one.content for one in counts)
    examples = sorted({example for one in counts for example in one.examples})[:5]
    return Summary(
        files=tuple(file.name for file in files),
        rows=rows + rejected[0],
        events=sum(one.events for one in counts),
        ignored=sum(one.ignored for one in counts),
        bad=sum(one.bad for one in counts) + rejected[0],
        examples=(*examples, *rejected[1]),
        missing_properties=tuple(sorted(missing | _numberless(spec, counts))),
        visitors=sum(one.visitors for one in counts),
        first_ms=min((one.first_ms for one in counts if one.first_ms is not None), default=0),
        last_ms=max((one.last_ms for one in counts if one.last_ms is not None), default=0),
        fingerprint=_fingerprint(rows, content) if rows else "",
    )


def _numberless(spec: FeatureSpec, counts: Sequence[Counts]) -> set[str]:
    """Values of the catalogue that are not a number in any event of their kind, and how that often happens."""
    filled: dict[int, int] = {}
    for one in counts:
        for code, numbers in one.numbers.items():
            filled[code] = filled.get(code, 0) + numbers
    names = {kind.code: kind.value for kind in spec.events.values()}
    return {
        f"number in {names[code]} (for decimal commas map it as replace(COLUMN, ',', '.'))"
        for code, numbers in filled.items()
        if names.get(code) is not None and not numbers
    }


def rejects(connection: duckdb.DuckDBPyConnection) -> tuple[int, list[str]]:
    """How many lines of CSV files did not fit their columns so far, and some of them."""
    known = connection.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'").fetchone()
    if known is None or not known[0]:
        return 0, []
    count = connection.execute("SELECT count(DISTINCT (scan_id, file_id, line)) FROM reject_errors").fetchall()[0][0]
    shown = connection.execute(
        "SELECT file_path, line, min(error_message) FROM reject_errors JOIN reject_scans USING (scan_id, file_id) "
        "GROUP BY ALL ORDER BY ALL LIMIT 3"
    ).fetchall()
    return count, [f"{Path(file).name} line {line}: {first_line(message)}" for file, line, message in shown]


def _plain(column: Any, absent: Any) -> npt.NDArray[Any]:
    """A column as a plain array; NULLs, which DuckDB masks, become `absent`."""
    if isinstance(column, np.ma.MaskedArray):
        return np.asarray(column.filled(absent))
    return np.asarray(column)


def _assemble(spec: FeatureSpec, loaded: Mapping[str, Any], ids: Sequence[str] | None) -> Partition:
    visitor = _plain(loaded["visitor_hash"], 0).astype(np.uint64)
    row = np.cumsum(np.concatenate(([False], visitor[1:] != visitor[:-1]))[: len(visitor)])  # rows come sorted
    hashes = visitor[np.searchsorted(row, np.arange(row[-1] + 1 if len(row) else 0))]
    attribute = _plain(loaded["attribute"], 0).astype(np.uint32)
    value = _plain(loaded["value"], np.nan).astype(np.float32)
    identifier = _plain(loaded["id"], 0).astype(np.uint32)
    unnamed = identifier == 0
    identifier[unnamed] = events.content_ids(attribute[unnamed], value[unnamed])
    kind = _plain(loaded["kind"], 0)
    every = events.records(loaded["ts_ms"], kind, identifier, attribute, value)
    request = np.empty((len(every), len(spec.requests)), np.float32)
    for place in range(len(spec.requests)):
        request[:, place] = _plain(loaded[f"request{place}"], np.nan)
    since = _plain(loaded["since_ms"], 0).astype(np.int64) if "since_ms" in loaded else None
    order = _order_ties(every, row, request, since)
    order = order[kind[order] > 0]
    records, owner = every.take(order), row[order]
    first = _first_of_each(records, owner, None if since is None else since[order])
    trait_records, trait_owner, trait_since = _trait_changes(spec, loaded, every["ts_ms"], row, since)
    visitors = np.arange(len(hashes) + 1)
    return Partition(
        visitor_hash=hashes,
        visitor_ids=ids,
        records=records.compress(first),
        starts=np.searchsorted(owner[first], visitors).astype(np.int64),
        request=request.take(order.compress(first), axis=0),
        traits=trait_records,
        trait_starts=np.searchsorted(trait_owner, visitors).astype(np.int64),
        joins=None if since is None else _joins(loaded, hashes, row, since[order][first], trait_since),
    )


def _joins(
    loaded: Mapping[str, Any],
    hashes: npt.NDArray[np.uint64],
    row: npt.NDArray[np.int64],
    since: npt.NDArray[np.int64],
    trait_since: npt.NDArray[np.int64],
) -> Joins:
    start = np.searchsorted(row, np.arange(len(hashes)))
    until = _plain(loaded["until_ms"], NEVER)[start].astype(np.int64)
    person = np.where(until < NEVER, _plain(loaded["person_hash"], 0)[start].astype(np.uint64), hashes)
    return Joins(since, trait_since, until, np.searchsorted(hashes, person))


def _first_of_each(
    records: Records, row: npt.NDArray[np.int64], since: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.bool_]:
    """`events.first_of_each`, and what is the visitor's before the one that it is the same as."""
    first = events.first_of_each(records, row)
    if since is not None:
        first[1:] |= since[1:] < since[:-1]
    return first


def _order_ties(
    records: Records,
    row: npt.NDArray[np.int64],
    request: npt.NDArray[np.float32] | None = None,
    since: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """int64[E]: canonical order of records that are already sorted by (row, ts); only ties have to be sorted.

    Twins are ordered by when they became the visitor's, and the same event delivered with two contexts by its request
    features.
    """
    order = np.arange(len(records))
    tied = (records["ts_ms"][1:] == records["ts_ms"][:-1]) & (row[1:] == row[:-1])
    if tied.any():
        places = np.flatnonzero(np.concatenate(([False], tied)) | np.concatenate((tied, [False])))
        if request is not None and request.shape[1]:
            places = places[np.lexsort(request[places].T)]
        if since is not None:
            places = places[np.argsort(since[places], kind="stable")]
        order[np.sort(places)] = places[events.canonical_order(records.take(places), row[places])]
    return order


def _trait_changes(
    spec: FeatureSpec,
    loaded: Mapping[str, Any],
    ts_ms: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    since: npt.NDArray[np.int64] | None,
) -> tuple[Records, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Trait records where a visitor's trait changes, and the last ones; whose they are, and since when. By visitor.

    Without the last record an event that arrives late would pass for news.
    """
    parts, owners, sinces = [np.empty(0, events.RECORD)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for place, (key, is_text) in enumerate(trait_keys(spec).items()):
        value = _plain(loaded[f"trait{place}"], np.nan).astype(np.float32)
        text = _plain(loaded[f"hash{place}"], 0).astype(np.uint32) if is_text else np.zeros(len(value), np.uint32)
        known = np.flatnonzero(text != 0 if is_text else np.isfinite(value))
        if since is None:
            known = known[~_inside_run(text[known], value[known], row[known], ts_ms[known])]
        kind = events.TRAIT_TEXT if is_text else events.TRAIT_NUMBER
        made = events.records(ts_ms[known], kind, events.hash32(key), text[known], value[known])
        begun = np.zeros(len(known), np.int64) if since is None else since[known]
        order = _order_ties(made, row[known], None, begun)
        made, owner, begun = made.take(order), row[known][order], begun[order]
        first = _first_of_each(made, owner, begun)
        made, owner, begun = made.compress(first), owner[first], begun[first]
        kept = ~_same_as_before(made["attribute"], made["value"], owner)
        kept[1:] |= begun[:-1] > np.maximum(begun, made["ts_ms"])[1:]  # the one before was not the visitor's yet
        kept |= np.concatenate((owner[1:] != owner[:-1], [True]))[: len(made)]
        parts.append(made.compress(kept))
        owners.append(owner[kept])
        sinces.append(begun[kept])
    joined, owner, begun = np.concatenate(parts), np.concatenate(owners), np.concatenate(sinces)
    order = events.canonical_order(joined, owner)
    return joined.take(order), owner[order], begun[order]


def _same_as_before(
    text: npt.NDArray[np.uint32], value: npt.NDArray[np.float32], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """bool[n]: whether a trait of the same visitor says the same as the one before it."""
    same = np.zeros(len(text), np.bool_)
    bits = value.view(np.uint32)  # NaN is the same as NaN
    same[1:] = (text[1:] == text[:-1]) & (bits[1:] == bits[:-1]) & (owner[1:] == owner[:-1])
    return same


def _inside_run(
    text: npt.NDArray[np.uint32],
    value: npt.NDArray[np.float32],
    owner: npt.NDArray[np.int64],
    ts_ms: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """bool[n]: which of a trait's rows, sorted by (owner, ts), are surely neither a change nor the last.

    Of rows in one millisecond one alone will count, so neither they nor the one after them are sure.
    """
    inside = np.zeros(len(text), np.bool_)
    if len(text) > 2:
        same = _same_as_before(text, value, owner)
        again = np.zeros(len(text), np.bool_)
        again[1:] = (ts_ms[1:] == ts_ms[:-1]) & (owner[1:] == owner[:-1])
        unsure = again.copy()
        unsure[:-1] |= again[1:]
        inside[1:-1] = same[1:-1] & same[2:] & ~unsure[1:-1] & ~unsure[:-2]
    return inside


def _empty(spec: FeatureSpec, with_ids: bool) -> Partition:
    nothing, start = np.empty(0, events.RECORD), np.zeros(1, np.int64)
    request = np.empty((0, len(spec.requests)), np.float32)
    return Partition(np.empty(0, np.uint64), [] if with_ids else None, nothing, start, request, nothing, start)
