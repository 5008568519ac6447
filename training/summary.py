"""The summary of what was read: counted in normalised files, and judged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb

from service.core.spec import FeatureSpec
from training import joins
from training.columns import kept
from training.eventfiles import UnreadableEvents, glob_of, told
from training.relation import Relation


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
    content = ", ".join(("visitor_hash", "ts_ms", "kind", "id", "attribute", "value", *kept(spec), "bad"))
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
    shown = tuple(example for (example,) in examples)
    rows, events, ignored, bad, visitors, first_ms, last_ms, content = counted
    return Counts(rows, events, ignored, bad, visitors, first_ms, last_ms, content, shown, dict(numbers.fetchall()))


def summarise(
    spec: FeatureSpec,
    files: Sequence[Path],
    counts: Sequence[Counts],
    missing: set[str],
    rejected: tuple[int, list[str]],
) -> Summary:
    """The summary of files that were counted in parts; `rejected` is what `rejects` gives."""
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
        fingerprint=fingerprint_of(rows, content) if rows else "",
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


def _names(spec: FeatureSpec) -> str:
    return ", ".join(kind.event for kind in spec.events.values())


def judge(summary: Summary, spec: FeatureSpec, max_bad_rows: int, relations: Sequence[Relation]) -> None:
    """Raise UnreadableEvents where too many rows are bad, or none is an event."""
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


def with_joined(
    connection: duckdb.DuckDBPyConnection, directory: Path, relations: Sequence[Relation], summary: Summary
) -> Summary:
    """The summary once it is known who was joined into whom."""
    if all(relation.login is None for relation in relations):
        return summary
    with told():
        found = joins.find(connection, directory, [glob_of(file) for file in directory.glob("*/*/*.parquet")])
    if not found.content:
        return summary
    fingerprint = fingerprint_of(summary.fingerprint, found.content)
    return replace(summary, visitors=summary.visitors - found.joined, joined=found.joined, fingerprint=fingerprint)


def fingerprint_of(*parts: object) -> str:
    """What stands for these parts together."""
    return hashlib.md5("-".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()
