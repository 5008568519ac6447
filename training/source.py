"""Event files of any origin, read by DuckDB into event records, partitioned by visitor so that memory stays bounded.

The rules that make a record of an event are those of `service.ingest`, said in SQL; a test holds the two together.
"""

from __future__ import annotations

import fnmatch
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt

from service.core import events
from service.core.errors import PropensityError
from service.core.events import Records
from service.core.spec import FeatureSpec, Request, Source

_READERS: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".jsonl": "json",
    ".json": "json",
}
# Bytes of input a partition should hold: about a million events each.
_PARTITION_BYTES: Final = {
    "csv": 100 << 20,
    "csv.gz": 20 << 20,
    "parquet": 25 << 20,
    "json": 250 << 20,
    "json.gz": 25 << 20,
}
_MAX_PARTITIONS: Final = 256
_SNIFFED_ROWS: Final = 200_000
# A line that does not fit the columns' types is kept in a table of its own, to be counted and shown.
_REJECTS: Final = "store_rejects = true, rejects_limit = 100000"
_NATIVE_JSON: Final = ("type", "event", "name", "userId", "anonymousId", "messageId", "timestamp")
_NATIVE_OBJECTS: Final = ("properties", "context", "traits")

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
        columns = ["visitor_hash", "ts_ms", "kind", "id", "attribute", "value"]
        columns += [f"r{place}" for place in range(len(self.spec.requests))]
        columns += [f"t{place}" for place in range(len(trait_keys(self.spec)))]
        columns += ["visitor"] if with_ids else []
        files = f"{self.directory}/*/part={index}/*.parquet"
        if not list(self.directory.glob(f"*/part={index}/*.parquet")):
            return _empty(self.spec, with_ids)
        loaded = self.connection.execute(
            f"SELECT {', '.join(columns)} FROM read_parquet(?, hive_partitioning = false, union_by_name = true) "
            "WHERE bad IS NULL ORDER BY visitor_hash, ts_ms",
            [files],
        ).fetchnumpy()
        return _assemble(self.spec, loaded, with_ids)


def read(
    paths: Sequence[str],
    spec: FeatureSpec,
    workdir: Path,
    *,
    max_bad_rows: int = 1000,
    memory_limit: str = "1GB",
    on_progress: Progress | None = None,
) -> EventLog:
    """Read event files (CSV, Parquet, NDJSON; also .gz; globs and directories) into `workdir`.

    Rows without a visitor or a readable timestamp are bad: counted, shown, and refused beyond max_bad_rows.
    Raises UnreadableEvents.
    """
    files = find_files(paths)
    connection = connect(workdir, memory_limit)
    partitions = _partition_count(files)
    missing: set[str] = set()
    for number, (source, reader, group) in enumerate(groups(files, spec)):
        relation = Relation(connection, spec, source, reader, group)
        missing |= relation.missing
        target = workdir / f"group{number}"
        _run(connection, relation.copy(target, partitions), group, on_progress)
    summary = _summarise(connection, workdir, files, missing)
    if summary.bad > max_bad_rows:
        raise UnreadableEvents(
            f"{summary.bad} of {summary.rows} rows are bad, more than --max-bad-rows {max_bad_rows}; for example "
            f"{'; '.join(summary.examples)}. Correct source.timestamp, source.timestamp_format or source.where in "
            "the spec, or raise --max-bad-rows"
        )
    if not summary.events:
        raise UnreadableEvents(
            f"none of {summary.rows} rows is an event of the catalogue ({_names(spec)}); "
            "map the files' event names with source.event in the spec"
        )
    return EventLog(spec, workdir, partitions, summary, connection)


def connect(workdir: Path, memory_limit: str = "1GB") -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in UTC that spills to `workdir` beyond memory_limit."""
    connection = duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": str(workdir / "spill")})
    connection.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = false; SET enable_progress_bar = false")
    return connection


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files of paths, globs and directories, sorted, each once. Raises UnreadableEvents if there is none."""
    found: set[Path] = set()
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found |= {file for file in path.rglob("*") if reader_of(file) is not None}
        elif path.is_file():
            if reader_of(path) is None:
                raise UnreadableEvents(f"{path}: unknown kind of file; give one of {', '.join(_READERS)} (also .gz)")
            found.add(path)
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else text
            matched = {file for file in root.glob(pattern) if reader_of(file) is not None}
            if not matched:
                raise UnreadableEvents(f"{text}: no such file, directory or glob with event files")
            found |= matched
    if not found:
        raise UnreadableEvents(f"{' '.join(paths)}: holds no event files ({', '.join(_READERS)}, also .gz)")
    return sorted(found)


def reader_of(path: Path) -> str | None:
    """`csv`, `parquet` or `json` by the file's name; None for any other file."""
    name = path.name.removesuffix(".gz")
    return _READERS.get(Path(name).suffix)


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def hash_sql(text: str) -> str:
    """SQL for `events.hash32` of a text expression; NULL stays NULL."""
    return f"greatest(md5_number_upper({text}) & 4294967295, 1)::UINTEGER"


def text_sql(expression: str, kind: str) -> str:
    """SQL for the text of a value as JSON would carry it: whole numbers without a fraction, true and false."""
    if kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL"):
        number = f"({expression})::DOUBLE"
        return (
            f"CASE WHEN {number} = trunc({number}) AND abs({number}) < 1e15 "
            f"THEN {number}::BIGINT::VARCHAR ELSE {number}::VARCHAR END"
        )
    return f"({expression})::VARCHAR"


def timestamp_sql(expression: str, kind: str, layout: str | None = None) -> str:
    """SQL for Unix milliseconds of a timestamp: a datetime, ISO 8601 text (UTC unless it says), or epoch s or ms."""
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"epoch_ms(({expression})::TIMESTAMPTZ)"
    text = f"trim(({expression})::VARCHAR)"
    number = f"TRY_CAST({text} AS DOUBLE)"
    epoch = f"TRY_CAST(round(CASE WHEN abs({number}) < 1e11 THEN {number} * 1000 ELSE {number} END) AS BIGINT)"
    if layout is not None:
        return f"epoch_ms(try_strptime({text}, {quoted(layout)})::TIMESTAMPTZ)"
    if kind == "VARCHAR":
        cleaned = f"regexp_replace({text}, ' UTC$', 'Z')"
        return f"coalesce(epoch_ms(TRY_CAST({cleaned} AS TIMESTAMPTZ)), {epoch})"
    return epoch


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
        self.connection, self.spec, self.source, self.files = connection, spec, source, files
        self.missing: set[str] = set()
        self.scan = self._scan(reader)
        self.types: dict[str, str] = self._describe(self.scan)
        # Expressions are tried on an empty table of the same columns: files are sniffed once, not once a field.
        self.shape = f"shape_{uuid.uuid4().hex}"
        columns = ", ".join(f"{_identifier(name)} {kind}" for name, kind in self.types.items())
        connection.execute(f"CREATE TEMP TABLE {self.shape} ({columns})")

    def _scan(self, reader: str) -> str:
        listed = "[" + ", ".join(quoted(str(file)) for file in self.files) + "]"
        if reader == "parquet":
            scan = f"read_parquet({listed}, union_by_name = true)"
        elif reader == "csv":
            scan = self._scan_csv(listed)
        else:
            scan = self._scan_json(listed)
        if self.source.query is not None:
            scan = f"({self.source.query.replace('{file}', scan).replace('{dir}', str(self.files[0].parent))})"
        return scan

    def _scan_csv(self, listed: str) -> str:
        columns = self._describe(f"read_csv({listed}, sample_size = {_SNIFFED_ROWS})")
        named = {*self._identity_columns(), *_NATIVE_JSON, self.source.timestamp or "timestamp"}
        named |= set(self._yes_or_no(listed, [name for name, kind in columns.items() if kind == "BOOLEAN"]))
        types = ", ".join(
            f"{quoted(name)}: {quoted('VARCHAR' if name in named else kind)}" for name, kind in columns.items()
        )
        return f"read_csv({listed}, types = {{{types}}}, {_REJECTS})"

    def _yes_or_no(self, listed: str, columns: Sequence[str]) -> list[str]:
        """Columns that DuckDB takes for booleans although they say yes or no, which a spec means as text."""
        if not columns:
            return []
        tests = ", ".join(f"bool_and(lower({_identifier(name)}) IN ('true', 'false'))" for name in columns)
        plain = self.connection.execute(f"SELECT {tests} FROM read_csv({listed}, all_varchar = true)").fetchall()[0]
        return [name for name, is_boolean in zip(columns, plain, strict=True) if not is_boolean]

    def _identity_columns(self) -> list[str]:
        event = self.source.event
        named = (self.source.visitor_id, self.source.message_id, event.column if event else None)
        return [name for name in named if name is not None]

    def _scan_json(self, listed: str) -> str:
        found = self._describe(f"read_json({listed}, format = 'newline_delimited', maximum_depth = 1)")
        if not set(_NATIVE_JSON) & set(found) or self.source.timestamp is not None:
            return f"read_json({listed}, format = 'newline_delimited', union_by_name = true)"
        columns = dict.fromkeys(_NATIVE_JSON, "VARCHAR") | dict.fromkeys(_NATIVE_OBJECTS, "JSON")
        listed_columns = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
        return f"read_json({listed}, format = 'newline_delimited', columns = {{{listed_columns}}})"

    def _describe(self, relation: str) -> dict[str, str]:
        try:
            rows = self.connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        except duckdb.Error as error:
            raise UnreadableEvents(f"{self.files[0]}: {first_line(error)}") from None
        return {row[0]: row[1] for row in rows}

    def expression(self, written: str, place: str) -> tuple[str, str]:
        """SQL and type of a column name or SQL expression of the mapping. Raises if the files cannot give it."""
        sql = _identifier(written) if written in self.types else f"({written})"
        try:
            kind = self.connection.execute(f"DESCRIBE SELECT {sql} AS x FROM {self.shape}").fetchall()[0][1]
        except duckdb.Error as error:
            raise UnreadableEvents(
                f"{self.files[0]}: {place}: {written} is no column and no expression over the columns "
                f"({first_line(error)}); the file has {', '.join(self.types)}"
            ) from None
        return sql, kind

    def field(self, section: str, name: str) -> tuple[str, str] | None:
        """SQL and type of a property, context field or trait: as mapped, else where native files keep it."""
        mapped: Mapping[str, str] = getattr(self.source, section)
        if name in mapped:
            return self.expression(mapped[name], f"source.{section}.{name}")
        kind = self.types.get(section, "")
        if kind.startswith("STRUCT"):
            fields = self._describe(f"(SELECT unnest({_identifier(section)}) FROM {self.shape})")
            return (f"{_identifier(section)}[{quoted(name)}]", fields[name]) if name in fields else None
        if kind in ("JSON", "VARCHAR"):
            path = quoted('$."' + name.replace('"', '\\"') + '"')
            return f"json_extract_string({_identifier(section)}, {path})", "VARCHAR"
        for column in (f"{section}.{name}", name):
            if column in self.types:
                return _identifier(column), self.types[column]
        return None

    def copy(self, target: Path, partitions: int) -> str:
        """SQL that writes the normalised rows, partitioned by visitor."""
        where = f"WHERE {self.source.where}" if self.source.where else ""
        if self.source.where:
            self.expression(self.source.where, "source.where")
        return f"""
            COPY (
                WITH mapped AS (SELECT {self._mapped()} FROM {self.scan} {where}),
                judged AS (SELECT *, {self._bad()} AS bad FROM mapped)
                SELECT hash(coalesce(visitor, '')) AS visitor_hash, visitor, ts_ms,
                    coalesce(kind, 0)::USMALLINT AS kind,
                    {hash_sql("message_id")} AS id, {hash_sql("attribute_text")} AS attribute,
                    TRY_CAST(number AS FLOAT) AS value, bad, unknown_name,
                    {"".join(f"r{place}, " for place in range(len(self.spec.requests)))}
                    {"".join(f"t{place}, " for place in range(len(trait_keys(self.spec))))}
                    (hash(coalesce(visitor, '')) % {partitions})::INTEGER AS part
                FROM judged
            ) TO {quoted(str(target))} (FORMAT parquet, PARTITION_BY (part), COMPRESSION snappy)"""

    def _mapped(self) -> str:
        kind = self._kind()
        columns = [
            f"{self._visitor()} AS visitor",
            f"{self._timestamp()} AS ts_ms",
            f"{self._raw_timestamp()} AS raw_timestamp",
            f"{kind} AS kind",
            f"CASE WHEN {kind} IS NULL THEN {self._name()} END AS unknown_name",
            f"{self._message_id()} AS message_id",
            f"{self._by_kind('attribute')} AS attribute_text",
            f"{self._by_kind('value')} AS number",
        ]
        for place, feature in enumerate(self.spec.requests.values()):
            columns.append(f"{self.request(feature)} AS r{place}")
        for place, (key, is_text) in enumerate(trait_keys(self.spec).items()):
            columns.append(f"{self.trait(key, is_text)} AS t{place}")
        return ", ".join(columns)

    def _bad(self) -> str:
        return (
            "CASE WHEN visitor IS NULL OR visitor = '' THEN 'a row without a visitor' "
            "WHEN ts_ms IS NULL THEN 'timestamp ' || coalesce(raw_timestamp, 'missing') END"
        )

    def _visitor(self) -> str:
        if self.source.visitor_id is not None:
            return text_sql(*self.expression(self.source.visitor_id, "source.visitor_id"))
        known = [_identifier(name) for name in ("userId", "anonymousId") if name in self.types]
        if not known:
            raise UnreadableEvents(
                f"{self.files[0]}: has neither userId nor anonymousId; name the visitor's column with "
                f"source.visitor_id in the spec; the file has {', '.join(self.types)}"
            )
        return "coalesce(" + ", ".join(f"nullif({name}::VARCHAR, '')" for name in known) + ")"

    def _timestamp_field(self) -> tuple[str, str]:
        written = self.source.timestamp or "timestamp"
        if self.source.timestamp is None and "timestamp" not in self.types:
            raise UnreadableEvents(
                f"{self.files[0]}: has no column timestamp; name it with source.timestamp in the spec; "
                f"the file has {', '.join(self.types)}"
            )
        return self.expression(written, "source.timestamp")

    def _timestamp(self) -> str:
        return timestamp_sql(*self._timestamp_field(), self.source.timestamp_format)

    def _raw_timestamp(self) -> str:
        return f"{self._timestamp_field()[0]}::VARCHAR"

    def _name(self) -> str:
        """SQL for the event's name in the catalogue's words."""
        event = self.source.event
        if event is not None and event.constant is not None:
            return quoted(event.constant)
        if event is not None and event.column is not None:
            column = text_sql(*self.expression(event.column, "source.event"))
            if not event.names:
                return column
            cases = " ".join(f"WHEN {quoted(foreign)} THEN {quoted(name)}" for foreign, name in event.names.items())
            return f"CASE {column} {cases} ELSE {column} END"
        if "event" not in self.types:
            raise UnreadableEvents(
                f"{self.files[0]}: has no column event; write source.event in the spec, as "
                "{constant: EVENT NAME} or a column; the file has " + ", ".join(self.types)
            )
        page = "coalesce(name::VARCHAR, 'Page Viewed')" if "name" in self.types else "'Page Viewed'"
        if "type" not in self.types:
            return '"event"::VARCHAR'
        return f"CASE \"type\"::VARCHAR WHEN 'page' THEN {page} WHEN 'identify' THEN NULL ELSE \"event\"::VARCHAR END"

    def _kind(self) -> str:
        cases = " ".join(f"WHEN {quoted(kind.event)} THEN {kind.code}" for kind in self.spec.events.values())
        return f"CASE {self._name()} {cases} END" if cases else "NULL::INTEGER"

    def _message_id(self) -> str:
        if self.source.message_id is not None:
            return text_sql(*self.expression(self.source.message_id, "source.message_id"))
        return "nullif(\"messageId\"::VARCHAR, '')" if "messageId" in self.types else "NULL::VARCHAR"

    def _by_kind(self, part: str) -> str:
        """SQL for the attribute's text or the value's number, which each kind of event keeps in its own property."""
        cases = []
        for kind in self.spec.events.values():
            name = getattr(kind, part)
            field = self.field("properties", name) if name is not None else None
            if field is not None:
                sql = text_sql(*field) if part == "attribute" else f"TRY_CAST({field[0]} AS DOUBLE)"
                cases.append(f"WHEN {kind.code} THEN {sql}")
            elif name is not None:
                self.missing.add(name)
        empty = "NULL::VARCHAR" if part == "attribute" else "NULL::DOUBLE"
        return f"CASE {self._kind()} {' '.join(cases)} END" if cases else empty

    def request(self, feature: Request) -> str:
        """SQL for the code of a request feature, from the context that the event carries."""
        field = self.field("context", feature.request)
        if field is None:
            self.missing.add(f"context.{feature.request}")
            return "NULL::FLOAT"
        if feature.categories is None:
            return f"TRY_CAST(TRY_CAST({field[0]} AS DOUBLE) AS FLOAT)"
        return coded_sql(feature, text_sql(*field))

    def trait(self, key: str, is_text: bool) -> str:
        """SQL for a trait's value: the hash of its text, or its number."""
        field = self.field("traits", key) or self.field("context", key)
        if field is None:
            self.missing.add(f"traits.{key}")
            return "NULL::UINTEGER" if is_text else "NULL::FLOAT"
        return hash_sql(text_sql(*field)) if is_text else f"TRY_CAST(TRY_CAST({field[0]} AS DOUBLE) AS FLOAT)"


def coded_sql(feature: Request, text: str) -> str:
    """SQL for `features.encode` of a text expression under a feature with categories."""
    cases = " ".join(f"WHEN {quoted(name)} THEN {code}" for name, code in feature.codes.items())
    other = "NULL" if np.isnan(feature.other) else feature.other
    return f"CASE WHEN {text} IS NULL THEN NULL ELSE (CASE {text} {cases} ELSE {other} END) END::FLOAT"


def first_line(error: Exception) -> str:
    """The first line of a library's message, which is all that a person needs of it."""
    return str(error).strip().splitlines()[0]


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(spec: FeatureSpec) -> str:
    return ", ".join(kind.event for kind in spec.events.values())


def trait_keys(spec: FeatureSpec) -> dict[str, bool]:
    """Name of each trait a spec reads -> whether it is kept as text: some feature lists its categories."""
    keys: dict[str, bool] = {}
    for feature in spec.traits.values():
        keys[feature.trait] = keys.get(feature.trait, False) or feature.categories is not None
    return keys


def groups(files: Sequence[Path], spec: FeatureSpec) -> Iterator[tuple[Source, str, list[Path]]]:
    """Files that share a mapping and a reader. Without `source` in the spec, files are in the native format."""
    groups: dict[tuple[int, str], list[Path]] = {}
    sources = spec.source or (Source(),)
    for file in files:
        for number, source in enumerate(sources):
            if fnmatch.fnmatch(file.name, source.files):
                groups.setdefault((number, reader_of(file) or ""), []).append(file)
                break
        else:
            patterns = ", ".join(source.files for source in sources)
            raise UnreadableEvents(f"{file}: fits none of the patterns of source.files ({patterns}); add one")
    for (number, reader), group in groups.items():
        yield sources[number], reader, group


def _partition_count(files: Sequence[Path]) -> int:
    share = 0.0
    for file in files:
        kind = (reader_of(file) or "csv") + (".gz" if file.suffix == ".gz" else "")
        share += file.stat().st_size / _PARTITION_BYTES.get(kind, 20 << 20)
    return min(max(1, round(share + 0.5)), _MAX_PARTITIONS)


def _run(connection: duckdb.DuckDBPyConnection, sql: str, files: Sequence[Path], on_progress: Progress | None) -> None:
    done = threading.Event()

    def report() -> None:
        while on_progress is not None and not done.wait(0.2):
            on_progress(max(0.0, connection.query_progress()) / 100)

    watcher = threading.Thread(target=report)
    watcher.start()
    try:
        connection.execute(sql)
    except duckdb.Error as error:
        raise UnreadableEvents(f"{files[0]}: {first_line(error)}") from None
    finally:
        done.set()
        watcher.join()


def _summarise(
    connection: duckdb.DuckDBPyConnection, workdir: Path, files: Sequence[Path], missing: set[str]
) -> Summary:
    table = f"read_parquet({quoted(f'{workdir}/*/*/*.parquet')}, hive_partitioning = false, union_by_name = true)"
    good = "bad IS NULL AND kind > 0"
    row = connection.execute(
        f"""SELECT count(*), count(*) FILTER ({good}), count(*) FILTER (bad IS NULL AND kind = 0), count(bad),
            count(DISTINCT visitor_hash) FILTER (bad IS NULL),
            coalesce(min(ts_ms) FILTER ({good}), 0), coalesce(max(ts_ms) FILTER ({good}), 0),
            md5(concat(count(*), '-', bit_xor(hash(visitor_hash, ts_ms, kind, id, value)))) FROM {table}"""
    ).fetchall()[0]
    examples = connection.execute(f"SELECT DISTINCT bad FROM {table} WHERE bad IS NOT NULL LIMIT 5").fetchall()
    rejected, lines = _rejects(connection)
    return Summary(
        files=tuple(file.name for file in files),
        rows=row[0] + rejected,
        events=row[1],
        ignored=row[2],
        bad=row[3] + rejected,
        examples=(*(example[0] for example in examples), *lines),
        missing_properties=tuple(sorted(missing)),
        visitors=row[4],
        first_ms=row[5],
        last_ms=row[6],
        fingerprint=row[7],
    )


def _rejects(connection: duckdb.DuckDBPyConnection) -> tuple[int, list[str]]:
    """How many lines of CSV files did not fit their columns, and some of them."""
    known = connection.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'").fetchone()
    if known is None or not known[0]:
        return 0, []
    count = connection.execute("SELECT count(DISTINCT (scan_id, file_id, line)) FROM reject_errors").fetchall()[0][0]
    shown = connection.execute("SELECT line, error_message FROM reject_errors ORDER BY line LIMIT 3").fetchall()
    return count, [f"line {line}: {message}" for line, message in shown]


def _plain(column: Any, absent: Any) -> npt.NDArray[Any]:
    """A column as a plain array; NULLs, which DuckDB masks, become `absent`."""
    if isinstance(column, np.ma.MaskedArray):
        return np.asarray(column.filled(absent))
    return np.asarray(column)


def _assemble(spec: FeatureSpec, loaded: Mapping[str, Any], with_ids: bool) -> Partition:
    visitor = _plain(loaded["visitor_hash"], 0).astype(np.uint64)
    hashes, row = np.unique(visitor, return_inverse=True)
    attribute = _plain(loaded["attribute"], 0).astype(np.uint32)
    value = _plain(loaded["value"], np.nan).astype(np.float32)
    identifier = _plain(loaded["id"], 0).astype(np.uint32)
    unnamed = identifier == 0
    identifier[unnamed] = events.content_ids(attribute[unnamed], value[unnamed])
    kind = _plain(loaded["kind"], 0)
    every = events.records(loaded["ts_ms"], kind, identifier, attribute, value)
    request = np.empty((len(every), len(spec.requests)), np.float32)
    for place in range(len(spec.requests)):
        request[:, place] = _plain(loaded[f"r{place}"], np.nan)
    order = _order_ties(every, row)
    order = order[kind[order] > 0]
    records, owner = every[order], row[order]
    first = events.first_of_each(records, owner)
    trait_records, trait_owner = _trait_changes(spec, loaded, every["ts_ms"], row)
    visitors = np.arange(len(hashes) + 1)
    ids = _plain(loaded["visitor"], "")[np.searchsorted(row, visitors[:-1])] if with_ids else None
    return Partition(
        visitor_hash=hashes,
        visitor_ids=None if ids is None else [str(text) for text in ids],
        records=records[first],
        starts=np.searchsorted(owner[first], visitors).astype(np.int64),
        request=request[order][first],
        traits=trait_records,
        trait_starts=np.searchsorted(trait_owner, visitors).astype(np.int64),
    )


def _order_ties(records: Records, row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[E]: canonical order of records that are already sorted by (row, ts); only ties have to be sorted."""
    order = np.arange(len(records))
    tied = (records["ts_ms"][1:] == records["ts_ms"][:-1]) & (row[1:] == row[:-1])
    if tied.any():
        places = np.flatnonzero(np.concatenate(([False], tied)) | np.concatenate((tied, [False])))
        order[places] = places[events.canonical_order(records[places], row[places])]
    return order


def _trait_changes(
    spec: FeatureSpec, loaded: Mapping[str, Any], ts_ms: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
) -> tuple[Records, npt.NDArray[np.int64]]:
    """Trait records of the rows where a visitor's trait changes, and whose they are, in order of visitor."""
    parts, owners = [np.empty(0, events.RECORD)], [np.empty(0, np.int64)]
    for place, (key, is_text) in enumerate(trait_keys(spec).items()):
        values = _plain(loaded[f"t{place}"], 0 if is_text else np.nan)
        known = np.flatnonzero(values != 0 if is_text else ~np.isnan(values))
        value, owner = values[known], row[known]
        changed = np.concatenate(([True], (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])))[: len(known)]
        known, value = known[changed], value[changed]
        parts.append(
            events.records(
                ts_ms[known],
                events.TRAIT_TEXT if is_text else events.TRAIT_NUMBER,
                events.hash32(key),
                value if is_text else 0,
                np.nan if is_text else value,
            )
        )
        owners.append(row[known])
    joined, owner = np.concatenate(parts), np.concatenate(owners)
    order = events.canonical_order(joined, owner)
    return joined[order], owner[order]


def _empty(spec: FeatureSpec, with_ids: bool) -> Partition:
    nothing, start = np.empty(0, events.RECORD), np.zeros(1, np.int64)
    request = np.empty((0, len(spec.requests)), np.float32)
    return Partition(np.empty(0, np.uint64), [] if with_ids else None, nothing, start, request, nothing, start)
