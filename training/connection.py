"""Connections to DuckDB: what they may take of the machine, and how their queries tell of progress and of failure."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import duckdb

from service.core.errors import PropensityError

# Every thread holds its rows until they are written: 20 million events on 64 threads did not fit into 1 GB.
_MOST_THREADS: Final = 8
_FLUSHED_ROWS: Final = 100_000
Progress = Callable[[float], None]


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


@contextmanager
def alone(directory: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of one thread, which spills where no other process does."""
    workdir = directory / f"process-{uuid.uuid4().hex}"
    connection = connect(workdir, memory_limit, threads=1)
    try:
        yield connection
    finally:
        connection.close()
        shutil.rmtree(workdir, ignore_errors=True)


def run(connection: duckdb.DuckDBPyConnection, query: str, on_progress: Progress | None) -> None:
    """Run a query, and tell five times a second which share of it is done."""
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


def first_line(error: object) -> str:
    """The first line of a library's message, which is all that a person needs of it."""
    advice = "; raise --memory-limit" if isinstance(error, duckdb.OutOfMemoryException) else ""
    return str(error).strip().splitlines()[0] + advice
