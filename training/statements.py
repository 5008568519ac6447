"""What events of files say of persons, as it was sent: identifiers, consents and logins are read from it elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb

from service.core.spec import FeatureSpec, Source
from training import source, sql
from training.source import Relation

_SPEAKING: Final = "('identify', 'alias')"
_ROWS_AT_ONCE: Final = 10_000


def read(connection: duckdb.DuckDBPyConnection, paths: Sequence[str], spec: FeatureSpec) -> Iterator[dict[str, Any]]:
    """Events of native NDJSON and Parquet files that may say something of a person, sound or not.

    Those are `identify` and `alias` events and any with `context.consent`. Files whose columns the spec maps, and CSV,
    say nothing.
    """
    for mapping, reader, files in source.groups(source.find_files(paths), spec):
        if mapping != Source(files=mapping.files) or reader == "csv":
            continue
        if reader == "json":
            yield from _objects(connection, _lines(files))
        else:
            rows = _rows(Relation(connection, spec, mapping, reader, files))
            yield from map(_event, _objects(connection, rows))


def _objects(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[dict[str, Any]]:
    found = connection.execute(query)
    for rows in iter(lambda: found.fetchmany(_ROWS_AT_ONCE), []):
        yield from (json.loads(text) for (text,) in rows)


def _lines(files: Sequence[Path]) -> str:
    objects = f"read_json_objects({source.as_list(files)}, format = 'newline_delimited', ignore_errors = true)"
    return (
        f"SELECT json FROM {objects} WHERE json ->> '$.type' IN {_SPEAKING} OR json_exists(json, '$.context.consent')"
    )


def _rows(relation: Relation) -> str:
    says = [f"type IN {_SPEAKING}"] if "type" in relation.types else []
    if "context" in relation.types:
        says.append(f"json_exists({_json_of(relation, 'context')}, '$.consent')")
    sections = [name for name in ("traits", "context") if name in relation.types]
    whole = "".join(f", {_json_of(relation, name)} AS {name}" for name in sections)
    plain = ("type", "event", "name", "userId", "anonymousId", "previousId", "timestamp")
    columns = ", ".join(sql.identifier(name) for name in plain if name in relation.types)
    where = " OR ".join(says) or "false"
    return f"SELECT to_json(told) FROM (SELECT {columns}{whole} FROM {relation.scan} WHERE {where}) AS told"


def _json_of(relation: Relation, section: str) -> str:
    is_text = relation.types[section] == "VARCHAR"
    return f"TRY_CAST({section} AS JSON)" if is_text else f"to_json({section})"


def _event(document: dict[str, Any]) -> dict[str, Any]:
    """An event without what a column has of other rows alone: a field that is null was not sent."""
    return {name: kept for name, value in document.items() if (kept := _sent(value)) is not None}


def _sent(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        return value
    return _event(value) or None
