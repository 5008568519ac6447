"""The rules of `service.ingest` said in SQL: text, number, hash and time of a field, whatever its type in the file.

A file may say a little more than a live event: timestamps in any form that DuckDB reads (`2026/1/31 23:59`), datetimes,
and numbers as text. Whole numbers beyond 64 bits are the one thing that JSON files say differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

_NUMERIC: Final = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "DECIMAL", "FLOAT", "DOUBLE")
_NUMBER: Final = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
_NESTED: Final = ("STRUCT", "MAP", "UNION")


class Field(NamedTuple):
    """A SQL expression over the columns of a file, and the DuckDB type of its values.

    Of the type JSON it is the plain text of the value, and `sort` is SQL for which JSON type the value has.
    """

    sql: str
    kind: str
    sort: str = ""


def field(expression: str, kind: str) -> Field:
    """The field that an expression of this type gives."""
    if kind == '"NULL"':  # a Parquet column in which nothing was ever written
        return Field("NULL::VARCHAR", "VARCHAR")
    if kind == "JSON":
        return Field(f"({expression}) ->> '$'", kind, f"json_type({expression})")
    return Field(f"({expression})", kind)


def json_field(section: str, name: str) -> Field:
    """The field `name` of a JSON object."""
    pointer = literal("/" + name.replace("~", "~0").replace("/", "~1"))
    return Field(f"json_extract_string({section}, {pointer})", "JSON", f"json_type({section}, {pointer})")


def literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A SQL name of a column."""
    return '"' + name.replace('"', '""') + '"'


def hash32(text: str) -> str:
    """`events.hash32` of a text; NULL of NULL."""
    # NULL has to be kept out: greatest(NULL, 1) is 1.
    return f"CASE WHEN {text} IS NOT NULL THEN greatest((md5_number({text}) & 4294967295)::UINTEGER, 1::UINTEGER) END"


def choose(key: str, values: Mapping[str, str], otherwise: str = "NULL") -> str:
    """The value, a SQL expression, of the text that `key` equals."""
    cases = " ".join(f"WHEN {literal(name)} THEN {value}" for name, value in values.items())
    return f"CASE {key} {cases} ELSE {otherwise} END" if cases else otherwise


def text(field: Field) -> str:
    """The text of a value: whole numbers without a fraction, true and false; NULL of '', of lists and objects."""
    sql, kind, sort = field
    if kind == "JSON":
        return (
            f"CASE {sort} WHEN 'UBIGINT' THEN {_whole(f'({sql})::UBIGINT')} WHEN 'DOUBLE' THEN {_float(f'({sql})')} "
            f"WHEN 'OBJECT' THEN NULL WHEN 'ARRAY' THEN NULL ELSE nullif({sql}, '') END"
        )
    if kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL"):
        return _float(sql)
    if kind in ("UBIGINT", "HUGEINT", "UHUGEINT"):
        return _whole(sql)
    if kind.startswith(_NESTED) or kind.endswith("]"):
        return "NULL::VARCHAR"
    return f"nullif({sql}::VARCHAR, '')"


def _is_number(kind: str) -> bool:
    return kind.removeprefix("U").startswith(_NUMERIC) and not kind.endswith("]")


def _float(expression: str) -> str:
    number = f"{expression}::DOUBLE"
    return (
        f"CASE WHEN {number} = trunc({number}) AND abs({number}) < 1e15 THEN {number}::BIGINT::VARCHAR "
        f"WHEN isfinite({number}) THEN {number}::VARCHAR END"
    )


def _whole(number: str) -> str:
    return f"CASE WHEN {number} < 9223372036854775808 THEN {number}::VARCHAR ELSE '0x' || lower(hex({number})) END"


def name_of(field: Field) -> str:
    """The text of an id; a boolean is none."""
    if field.kind == "BOOLEAN":
        return "NULL::VARCHAR"
    return f"CASE WHEN {field.sort} <> 'BOOLEAN' THEN {text(field)} END" if field.kind == "JSON" else text(field)


def number(field: Field) -> str:
    """The number that a value is or spells, DOUBLE; a boolean has none."""
    if field.kind == "BOOLEAN":
        return "NULL::DOUBLE"
    if _is_number(field.kind):
        return f"{field.sql}::DOUBLE"
    # DuckDB also reads 1_000 and +-0 as numbers, `ingest` does not.
    text = f"{field.sql}::VARCHAR"
    return f"CASE WHEN regexp_full_match({text}, {literal(_NUMBER)}) THEN TRY_CAST({text} AS DOUBLE) END"


def number_or_flag(field: Field) -> str:
    """`number`, and 1 or 0 for a boolean: what a trait's number is."""
    if field.kind == "BOOLEAN":
        return f"{field.sql}::INTEGER::DOUBLE"
    if field.kind == "JSON":
        return f"CASE {field.sort} WHEN 'BOOLEAN' THEN ({field.sql} = 'true')::INTEGER::DOUBLE ELSE {number(field)} END"
    return number(field)


def request_number(field: Field) -> str:
    """`number_or_flag`, but in JSON text is no number: what `features.encode` makes of a context field."""
    found = number_or_flag(field)
    return f"CASE WHEN {field.sort} <> 'VARCHAR' THEN {found} END" if field.kind == "JSON" else found


def milliseconds(field: Field, layout: str | None = None) -> str:
    """Unix milliseconds of a datetime, ISO 8601 text (UTC unless it says) or epoch s or ms; NULL if it is neither."""
    if field.kind.startswith(("TIMESTAMP", "DATE")):
        return _milliseconds(f"{field.sql}::TIMESTAMPTZ")
    if layout is not None:
        return _milliseconds(f"try_strptime(trim({field.sql}::VARCHAR), {literal(layout)})::TIMESTAMPTZ")
    if _is_number(field.kind):
        return _epoch(number(field))
    moment = f"TRY_CAST(trim({field.sql}::VARCHAR) AS TIMESTAMPTZ)"
    return f"coalesce({_milliseconds(moment)}, {_epoch(number(field))})"


def _milliseconds(moment: str) -> str:
    return f"epoch_us({moment}) // 1000"  # epoch_ms rounds, `ingest` cuts


def _epoch(number: str) -> str:
    # A lambda, since DuckDB would compute an expression that stands twice for every row, also where it is not needed.
    scale = "CASE WHEN abs(x) < 1e11 THEN 1000 ELSE 1 END"
    return f"list_transform([{number}], lambda x: TRY_CAST(floor(x * {scale} + 0.5) AS BIGINT))[1]"
