"""The tables of the ledger, in SQLite or PostgreSQL: what they hold, how they are reached, and brought up to date.

`docs/sync.md` describes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateColumn

from service.core.errors import PropensityError

VERSION: Final = 2
_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
all_tables = sa.MetaData()

_schema = sa.Table("propensity_schema", all_tables, sa.Column("version", sa.Integer, primary_key=True))
leases = sa.Table(
    "leases",
    all_tables,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(200), nullable=False),
    sa.Column("until_ms", sa.BigInteger, nullable=False),
)
lists = sa.Table(
    "lists",
    all_tables,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("destination", sa.String(200), nullable=False),
    sa.Column("audience", sa.String(200), nullable=False),
    sa.Column("list_id", sa.Text),  # the platform's; none until it was opened
    sa.Column("stale", sa.Boolean, nullable=False),  # a snapshot of it has yet to be written
    sa.Column("synced_ms", sa.BigInteger),  # when it was last in step
    sa.UniqueConstraint("destination", "audience"),
)
members = sa.Table(
    "members",
    all_tables,
    sa.Column("list", _Id, primary_key=True),
    sa.Column("key", sa.LargeBinary(32), primary_key=True),
    sa.Column("has", sa.LargeBinary(24)),  # the mark of what the platform took last
    sa.Column("refused", sa.LargeBinary(24)),  # the mark of what it refused last
    sa.Column("open", _Id),  # the batch whose outcome is not known
    sa.Column("identifiers", sa.Text),  # all that the platform may have
    sa.Column("answer", sa.Text),  # why it refused
    sa.Column("changed_ms", sa.BigInteger, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),  # refused or failed in a row, but not for good
    sa.Column("due_ms", sa.BigInteger),  # when what was refused is sent again as it is; none: it is not
    sqlite_with_rowid=False,
)
runs = sa.Table(
    "runs",
    all_tables,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("destination", sa.String(200), nullable=False),
    sa.Column("audience", sa.String(200)),  # none: all of them
    sa.Column("holder", sa.String(200), nullable=False),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("ended_ms", sa.BigInteger),  # none: it is under way, or was killed
    sa.Column("result", sa.Text),  # counts as JSON, or what went wrong
)
batches = sa.Table(
    "batches",
    all_tables,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("list", _Id, nullable=False),
    sa.Column("run", _Id, nullable=False),
    sa.Column("operation", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("members", sa.Integer, nullable=False),
    sa.Column("accepted", sa.Integer),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("intended_ms", sa.BigInteger, nullable=False),
    sa.Column("attempted_ms", sa.BigInteger),  # the last attempt
    sa.Column("settled_ms", sa.BigInteger),
    sa.Column("answer", sa.Text),
    sa.Index("batches_of_list", "list", "state"),
    sa.Index("batches_by_time", "intended_ms"),
)
entries = sa.Table(
    "entries",
    all_tables,
    sa.Column("batch", _Id, primary_key=True),
    sa.Column("key", sa.LargeBinary(32), primary_key=True),
    sa.Column("why", sa.String(16), nullable=False),
    sa.Column("accepted", sa.Boolean),  # none: not known
    sa.Column("answer", sa.Text),  # none: the batch's
    sa.Column("identifiers", sa.Text),  # that were to be removed, until the platform has worked that off
    sqlite_with_rowid=False,
)
history = sa.Table(
    "history",
    all_tables,
    sa.Column("list", _Id, primary_key=True),
    sa.Column("day_ms", sa.BigInteger, primary_key=True),
    sa.Column("operation", sa.String(16), primary_key=True),
    sa.Column("why", sa.String(16), primary_key=True),
    sa.Column("sent", sa.BigInteger, nullable=False),
    sa.Column("accepted", sa.BigInteger, nullable=False),
)
cursors = sa.Table(
    "cursors",
    all_tables,
    sa.Column("name", sa.String(400), primary_key=True),
    sa.Column("cursor", sa.Text),
)
deliveries = sa.Table(
    "deliveries",
    all_tables,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),  # the order within a visitor
    sa.Column("trigger", sa.String(200), nullable=False),
    sa.Column("event", sa.String(64), nullable=False),  # the id that the receiver gets
    sa.Column("visitor", sa.LargeBinary(32), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("first_ms", sa.BigInteger, nullable=False),
    sa.Column("due_ms", sa.BigInteger, nullable=False),
    sa.Column("dead", sa.Boolean, nullable=False),
    sa.Column("answer", sa.Text),
    sa.UniqueConstraint("trigger", "event"),
    sa.Index("deliveries_of_visitor", "trigger", "dead", "visitor", "id"),
)
_SINCE_VERSION_1: Final = (members.c.tries, members.c.due_ms, entries.c.identifiers)


@contextmanager
def connected(url: str) -> Iterator[sa.Engine]:
    """The database at an address. Raises PropensityError for one that cannot be, and where it fails."""
    engine = _engine(url)
    try:
        yield engine
    except sa.exc.DBAPIError as error:
        raise PropensityError(f"the ledger {shown(url)} failed: {str(error.orig).strip().splitlines()[0]}") from error
    finally:
        engine.dispose()


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _with_immediate_transactions(sa.create_engine(parsed, connect_args={"timeout": 30}))
        if parsed.get_backend_name() == "postgresql":
            return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"a ledger in PostgreSQL needs {error.name}; install it with pip install 'propensity[postgres]'"
        ) from None
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number is a ValueError
        pass
    raise PropensityError(
        "the ledger's address is neither SQLite nor PostgreSQL; write sqlite:///ledger.db or "
        "postgresql://user:password@host/database"
    )


def _with_immediate_transactions(engine: sa.Engine) -> sa.Engine:
    """SQLite's driver begins transactions late, and a reader that becomes a writer fails; ours begin as writers."""

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # an intent must outlive the power, or it is none
        connection.execute("PRAGMA cache_size=-65536")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def upsert(engine: sa.Engine) -> Any:
    """INSERT with ON CONFLICT, which each of the two databases has words of its own for."""
    return (postgresql if engine.dialect.name == "postgresql" else sqlite).insert


def reader(engine: sa.Engine) -> sa.Engine:
    """The same database, whose connections wait for no writer, and are none."""
    return engine.execution_options(reads=True)


def shown(url: str) -> str:
    """An address without its password."""
    return sa.make_url(url).render_as_string(hide_password=True)


def file_of(engine: sa.Engine) -> Path | None:
    """The file of a ledger in SQLite that is not in memory."""
    database = engine.url.database
    return Path(database) if engine.dialect.name == "sqlite" and database and database != ":memory:" else None


def is_prepared(engine: sa.Engine) -> bool:
    """Whether the tables are there."""
    with reader(engine).connect() as connection:
        return sa.inspect(connection).has_table(_schema.name)


def prepare(engine: sa.Engine) -> None:
    """Make the tables where they are missing, and bring them up to date."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two that create the same tables at once would fail
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x70726F70)))
        all_tables.create_all(connection)
        found = connection.execute(sa.select(_schema.c.version)).scalar_one_or_none()
        if found is None:
            connection.execute(_schema.insert().values(version=VERSION))
        elif found == 1:
            for column in _SINCE_VERSION_1:
                words = CreateColumn(column).compile(dialect=engine.dialect)
                connection.execute(sa.text(f"ALTER TABLE {column.table.name} ADD COLUMN {words}"))
            connection.execute(_schema.update().values(version=VERSION))
        elif found != VERSION:
            raise PropensityError(
                f"the ledger was written by another version of Propensity (its tables are {found}, not {VERSION}); "
                "use that version, or give another ledger"
            )
