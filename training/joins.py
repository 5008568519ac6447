"""Who an anonymous visitor of event files turned out to be, and what it did, given to whom it belongs. By DuckDB.

The rules are those of `service.joining` and `Persons.join`, for logins in the order of time; a test holds the two
together. What follows for a moment is that of the service, too:

- Before its first login an anonymous visitor has what it did, and nobody else has.
- From then on whoever logged in first has that. So these events are there twice: of the anonymous visitor `until` the
  login, and of its owner `since` the login.
- What it does after a login is of who logged in last before it. The anonymous visitor has no more of its own.

Normalised rows that belong to somebody else are written anew into `joined*/part=N`; those that they were made of stay
and are left out when a partition is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import duckdb
import pyarrow

from training import sql

# Anonymous visitors who are joined into one, as in `service.joining`.
MOST_JOINED: Final = 256
# How a directory of rows that belong to somebody else begins.
MOVED: Final = "joined"
# What such a row says beside its event: from when on it is its visitor's; and where it stays an anonymous visitor's,
# when and into whom that one is joined.
COLUMNS: Final = ("since_ms", "until_ms", "person_hash")
_ROWS_AT_ONCE: Final = 100_000
_ROWS: Final = "read_parquet(?, hive_partitioning = false, union_by_name = true)"
_LOGINS: Final = pyarrow.schema(
    [("ts_ms", pyarrow.int64()), ("anonymous", pyarrow.string()), ("known", pyarrow.string())]
)


class Login(NamedTuple):
    """An anonymous visitor, and who it is from a moment on, in Unix milliseconds."""

    ts_ms: int
    anonymous: str
    known: str


def spans_file(directory: Path) -> Path:
    """The file that says whose events of an anonymous visitor are from which moment on; there is none without joins.

    Columns: anonymous, anonymous_hash, from_ms, owner, owner_hash, and since_ms: of the span before the first login the
    moment of that login, otherwise 0.
    """
    return directory / "spans.parquet"


def spans(directory: Path) -> str:
    """SQL for the rows of that file."""
    return f"read_parquet({sql.literal(str(spans_file(directory)))})"


class Found(NamedTuple):
    """How many of the visitors in files were joined into others, and what tells these joins from all others."""

    joined: int = 0
    content: int = 0


def find(connection: duckdb.DuckDBPyConnection, directory: Path, files: Sequence[str]) -> Found:
    """Write who was joined into whom by the logins in normalised files."""
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE said AS SELECT DISTINCT ts_ms, anonymous, visitor AS known "
        f"FROM {_ROWS} WHERE anonymous IS NOT NULL AND bad IS NULL",
        [files],
    )
    if not connection.execute("SELECT count(*) FROM said").fetchall()[0][0]:
        return Found()
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE tangled AS
            WITH chained AS (SELECT anonymous AS id FROM said INTERSECT SELECT known FROM said),
            crowded AS (SELECT known AS id FROM said GROUP BY known HAVING count(DISTINCT anonymous) > {MOST_JOINED})
            SELECT DISTINCT known FROM said WHERE anonymous IN (FROM chained)
            OR known IN (FROM chained) OR known IN (FROM crowded)"""
    )
    connection.execute("CREATE OR REPLACE TEMP TABLE logins AS FROM said WHERE known NOT IN (FROM tangled)")
    _resolve_tangled(connection)
    connection.execute(
        f"""COPY (
            WITH each AS (SELECT anonymous, ts_ms, max(known) AS owner FROM logins GROUP BY ALL),
            changes AS (
                FROM each QUALIFY owner IS DISTINCT FROM lag(owner) OVER (PARTITION BY anonymous ORDER BY ts_ms)
            ),
            firsts AS (
                SELECT anonymous, 0 AS from_ms, known AS owner, ts_ms AS since_ms FROM logins
                QUALIFY row_number() OVER (PARTITION BY anonymous ORDER BY ts_ms, known) = 1
            ),
            spans AS (FROM firsts WHERE since_ms > 0 UNION ALL SELECT anonymous, ts_ms, owner, 0 FROM changes)
            SELECT *, hash(anonymous) AS anonymous_hash, hash(owner) AS owner_hash FROM spans
        ) TO {sql.literal(str(spans_file(directory)))} (FORMAT parquet)"""
    )
    joined = connection.execute(
        f"SELECT count(DISTINCT visitor_hash) FROM {_ROWS} AS rows SEMI JOIN {spans(directory)} AS spans "
        "ON rows.visitor_hash = spans.anonymous_hash WHERE bad IS NULL",
        [files],
    ).fetchall()[0][0]
    content = connection.execute(f"SELECT sum(hash(anonymous, from_ms, owner)) FROM {spans(directory)}").fetchall()[0][
        0
    ]
    return Found(joined, content or 0)


def _resolve_tangled(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the logins that depend on earlier ones of other visitors."""
    found = connection.execute("SELECT ts_ms, anonymous, known FROM said WHERE known IN (FROM tangled) ORDER BY ALL")
    given = (Login(*row) for rows in iter(lambda: found.fetchmany(_ROWS_AT_ONCE), []) for row in rows)
    made = list(zip(*resolved(given), strict=True)) or [(), (), ()]
    table = pyarrow.table(dict(zip(Login._fields, made, strict=True)), schema=_LOGINS)
    connection.register("resolved", table)
    connection.execute("INSERT INTO logins BY NAME FROM resolved")
    connection.unregister("resolved")


def resolved(logins: Iterable[Login]) -> Iterator[Login]:
    """Those of logins in the order of time that join somebody, with whom it is joined into.

    A known one who was joined itself stands for whom it was joined into. Into whom others were joined is joined into
    nobody, and nobody has more than MOST_JOINED.
    """
    owners: dict[str, str] = {}
    joined: dict[str, set[str]] = {}
    for login in logins:
        owner = owners.get(login.known, login.known)
        others = joined.setdefault(owner, set())
        is_full = len(others) >= MOST_JOINED and login.anonymous not in others
        if owner == login.anonymous or joined.get(login.anonymous) or is_full:
            continue
        owners[login.anonymous] = owner
        others.add(login.anonymous)
        yield login._replace(known=owner)


def logins(connection: duckdb.DuckDBPyConnection, directory: Path) -> Iterator[list[Login]]:
    """Who was joined into whom, those of an anonymous visitor in the order of time and in one list as a rule."""
    if not spans_file(directory).exists():
        return
    found = connection.execute(
        f"SELECT from_ms, anonymous, owner FROM {spans(directory)} WHERE since_ms = 0 ORDER BY anonymous, from_ms"
    )
    for rows in iter(lambda: found.fetchmany(_ROWS_AT_ONCE), []):
        yield [Login(*row) for row in rows]


def move(
    connection: duckdb.DuckDBPyConnection, directory: Path, files: Sequence[str], partitions: int, target: Path
) -> None:
    """Write the rows of normalised files that belong to somebody else, partitioned by who that is."""
    connection.execute(
        f"""COPY (
            WITH moved AS (
                SELECT rows.*, owner, owner_hash, since_ms FROM {_ROWS} AS rows ASOF JOIN {spans(directory)} AS spans
                ON rows.visitor_hash = spans.anonymous_hash AND rows.ts_ms >= spans.from_ms WHERE bad IS NULL
            )
            SELECT * EXCLUDE (owner, owner_hash, since_ms, is_own) REPLACE (
                    CASE WHEN is_own THEN visitor ELSE owner END AS visitor,
                    CASE WHEN is_own THEN visitor_hash ELSE owner_hash END AS visitor_hash
                ),
                CASE WHEN is_own THEN 0 ELSE since_ms END AS since_ms,
                CASE WHEN is_own THEN since_ms END AS until_ms,
                CASE WHEN is_own THEN owner_hash END AS person_hash,
                (owner_hash % {partitions})::INTEGER AS part
            FROM moved CROSS JOIN (VALUES (true), (false)) AS sides(is_own)
            WHERE NOT is_own OR since_ms > 0
        ) TO {sql.literal(str(target))} (FORMAT parquet, PARTITION_BY (part), COMPRESSION snappy)""",
        [files],
    )


def left_out(directory: Path, has_moved: bool) -> str:
    """SQL for the rows of a partition that are still whose they were written for."""
    kept = f"visitor_hash NOT IN (SELECT anonymous_hash FROM {spans(directory)})"
    return f"(since_ms IS NOT NULL OR {kept})" if has_moved else kept
