"""Event files: which there are, of what kind, and which of them are read together."""

from __future__ import annotations

import fnmatch
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import duckdb

from service.core.errors import PropensityError
from service.core.spec import FeatureSpec, Source
from training import sql
from training.connection import first_line

_READERS: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".jsonl": "json",
    ".json": "json",
}
_HEAD_BYTES: Final = 1 << 20


class UnreadableEvents(PropensityError):
    """Event files that cannot be used as they are; the message names the file, the column and what to write."""


@contextmanager
def told() -> Iterator[None]:
    """Say in one line what DuckDB found wrong with the files."""
    try:
        yield
    except duckdb.Error as error:
        raise UnreadableEvents(first_line(error)) from None


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


def groups(files: Sequence[Path], spec: FeatureSpec) -> Iterator[tuple[Source, str, list[Path]]]:
    """Files that share a mapping and a layout. Without `source` in the spec, files are in the native format."""
    groups: dict[tuple[int, str, bytes], list[Path]] = {}
    sources = spec.source or (Source(),)
    for file in files:
        for number, source in enumerate(sources):
            if fnmatch.fnmatch(file.name, source.files):
                reader = reader_of(file) or ""
                # DuckDB reads CSV files whose columns differ together or keeps their bad lines, but not both.
                header = head_of(file)[0].splitlines()[:1] if reader == "csv" else []
                groups.setdefault((number, reader, b"".join(header).strip()), []).append(file)
                break
        else:
            patterns = ", ".join(source.files for source in sources)
            raise UnreadableEvents(f"{file}: fits none of the patterns of source.files ({patterns}); add one")
    for (number, reader, _), group in groups.items():
        yield sources[number], reader, group


def head_of(file: Path) -> tuple[bytes, float]:
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


def parquet_rows(connection: duckdb.DuckDBPyConnection, file: Path) -> int:
    """How many rows a Parquet file says that it has."""
    query = "SELECT sum(num_rows) FROM parquet_file_metadata(?)"
    try:
        return int(connection.execute(query, [glob_of(file)]).fetchall()[0][0])
    except duckdb.Error as error:
        raise UnreadableEvents(f"{file}: {first_line(error)}") from None


def as_list(files: Sequence[Path]) -> str:
    """A SQL list of files."""
    return "[" + ", ".join(sql.literal(glob_of(file)) for file in files) + "]"


def glob_of(path: Path) -> str:
    """A path as a DuckDB glob that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))
