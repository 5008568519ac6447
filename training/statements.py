"""What events of files say of persons, as it was sent: identifiers, consents and logins are read from it elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb

from service.core.spec import FeatureSpec, Source
from training import eventfiles, sql
from training.relation import PERSONAL, Relation
from training.sql import Field

_SPEAKING: Final = "('identify', 'alias')"
_ROWS_AT_ONCE: Final = 10_000


def read(connection: duckdb.DuckDBPyConnection, paths: Sequence[str], spec: FeatureSpec) -> Iterator[dict[str, Any]]:
    """Events of files that may say something of a person, sound or not.

    Those are `identify` and `alias` events and any with `context.consent`. Of rows that do not say which type they are,
    those are taken for `identify` events that have an address or a number where the spec says that these are.
    """
    for mapping, reader, files in eventfiles.groups(eventfiles.find_files(paths), spec):
        if reader == "json" and mapping == Source(files=mapping.files):
            yield from _objects(connection, _lines(files))
        else:
            yield from map(_event, _objects(connection, _rows(Relation(connection, spec, mapping, reader, files))))


def _objects(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[dict[str, Any]]:
    found = connection.execute(query)
    for rows in iter(lambda: found.fetchmany(_ROWS_AT_ONCE), []):
        yield from (json.loads(text) for (text,) in rows)


def _lines(files: Sequence[Path]) -> str:
    objects = f"read_json_objects({eventfiles.as_list(files)}, format = 'newline_delimited', ignore_errors = true)"
    return (
        f"SELECT json FROM {objects} WHERE json ->> '$.type' IN {_SPEAKING} OR json_exists(json, '$.context.consent')"
    )


def _rows(relation: Relation) -> str:
    """Rows of columns, as the events that they would be live."""
    fields = {name: relation.field("traits", name) for name in PERSONAL}
    traits = {name: sql.text(field) for name, field in fields.items() if field is not None}
    traits["address"] = _object(relation.field("traits", "address"))
    context = {name: _object(relation.field("context", name)) for name in ("consent", "traits")}
    event = relation.envelope()
    if not relation.has_types:
        personal = [f"{traits[name]} IS NOT NULL" for name in ("email", "phone") if name in relation.source.traits]
        event["type"] = f"CASE WHEN {' OR '.join(personal) or 'false'} THEN 'identify' ELSE 'track' END"
    event |= {"traits": _struct(traits), "context": _struct(context)}
    rows = (
        f"SELECT {', '.join(f'{text} AS {sql.identifier(name)}' for name, text in event.items())} FROM {relation.scan}"
    )
    says = f"type IN {_SPEAKING} OR context.consent IS NOT NULL"
    return f"SELECT to_json(told) FROM ({rows} {relation.where}) AS told WHERE {says}"


def _object(field: Field | None) -> str:
    """SQL for an object as JSON; NULL of what is none."""
    if field is None:
        return "NULL::JSON"
    is_text = field.kind in ("JSON", "VARCHAR")
    return f"TRY_CAST({field.sql} AS JSON)" if is_text else f"to_json({field.sql})"


def _struct(parts: Mapping[str, str]) -> str:
    return f"struct_pack({', '.join(f'{name} := {text}' for name, text in parts.items())})"


def _event(document: dict[str, Any]) -> dict[str, Any]:
    """An event without what a column has of other rows alone: a field that is null was not sent."""
    return {name: kept for name, value in document.items() if (kept := _sent(value)) is not None}


def _sent(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        return value
    return _event(value) or None
