"""A relation: event files of one layout with one mapping, as SQL that makes normalised rows of them.

The rules that make a record of an event are those of `service.ingest`, said in SQL; a test holds the two together.
"""

from __future__ import annotations

import copy
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np

from service.core.spec import EventColumn, FeatureSpec, Request, Source
from training import sql
from training.columns import kept, trait_keys
from training.connection import Progress, first_line, run
from training.eventfiles import UnreadableEvents, as_list, parquet_rows
from training.sql import Field

_LEAST_SLICE: Final = 100_000
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
        rows = {file: parquet_rows(self.connection, file) for file in self.files}
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
        plain = [name for name in kept(self.spec) if not name.startswith("hash")]
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
            run(self.connection, query, on_progress)
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


def latest(now_ms: int | None) -> int:
    """The latest moment at which an event is no bad one, received at now_ms."""
    return (time.time_ns() // 1_000_000 if now_ms is None else now_ms) + _FUTURE_MS


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
