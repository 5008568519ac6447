"""The destination `files`: each audience as one file, and every change of it as another, at any URL of fsspec.

    URL/AUDIENCE.parquet                          the whole list, replaced at once
    URL/changes/AUDIENCE/20261124T181500Z-BATCH.parquet    who was added or removed

A file is there whole or not at all.
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Literal

import fsspec
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from audiences.destinations.options import Kept
from audiences.destinations.options import Options as Base
from audiences.destinations.protocol import KEY, Busy, DestinationError, Limits, Outcome, Person, Purpose, Rejected
from audiences.destinations.webhook import FORMS
from service.core.errors import PropensityError

Format = Literal["parquet", "csv", "ndjson"]

FIELDS: Final[tuple[Kept, ...]] = ("propensity", "segment")
NUMBERS: Final = {"propensity": pa.float64(), "percentile": pa.int32()}
STAMP: Final = "%Y%m%dT%H%M%SZ"
ROWS_AT_ONCE: Final = 10_000
LASTING: Final = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)

Row = Mapping[str, Any]


class Options(Base):
    """Options of files."""

    url: str = Field(
        min_length=1, description="Directory, or any URL of fsspec: s3://bucket/audiences, gs://, memory://."
    )
    purpose: Purpose = Field(description="What people must have agreed to: ads, email, crm or analytics.")
    format: Format = Field("parquet", description="parquet, csv or ndjson.")
    forms: tuple[str, ...] = Field(FORMS, description="Identifiers that are written, beside the key.")
    fields: tuple[Kept, ...] = Field(FIELDS, description="Fields that are written.")
    changes: bool = Field(True, description="Whether to write changes, beside whole lists.")
    keep_days: int = Field(30, ge=1, description="Days that files of changes are kept, which may name who was removed.")


class Files:
    """Writes files."""

    def __init__(self, name: str, options: Options, now: Callable[[], datetime.datetime] | None = None) -> None:
        self.name = name
        self.purpose = options.purpose
        self.limits = Limits(100_000, 1000, 1)
        self.forms = (KEY, *options.forms)
        self.fields: tuple[str, ...] = options.fields
        self._options = options
        self._now = now or (lambda: datetime.datetime.now(datetime.UTC))
        try:
            self._files, self._root = fsspec.core.url_to_fs(options.url)
        except (ImportError, ValueError) as error:
            raise PropensityError(f"{name}.url: {options.url.partition('://')[0]}: {error}") from None

    def open(self, audience: str) -> str:
        """A list is known by the audience's name, which is its file's."""
        if "/" in audience or "\\" in audience or audience.startswith("."):
            raise Rejected(f"{audience!r} is no name of a file; give the audience another name")
        return audience

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Write who was added."""
        return self._changed("add", list_id, people, batch)

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Write who was removed: keys alone."""
        return self._changed("remove", list_id, [Person(one.key, {}) for one in people], batch)

    def write(self, list_id: str, people: Iterable[Person]) -> None:
        """Replace the whole list, and delete files of changes that are old."""
        with _told():
            self._write(f"{self._root}/{list_id}.{self._options.format}", map(self._row, people), ())
            self._prune(f"{self._root}/changes/{list_id}")

    def check(self) -> str:
        """Write a file of this moment into the directory, and remove it."""
        path = f"{self._root}/.propensity-{uuid.uuid4().hex}"
        try:
            with _told():
                with self._whole(path) as file:
                    file.write(b"A check whether files can be written here.\n")
                self._files.rm_file(path)
        except DestinationError:
            raise
        except Exception as error:
            # Libraries of fsspec have errors of their own for credentials that they do not find.
            raise Rejected(f"{type(error).__name__}: {error}") from error
        return f"a file was written to {self._files.unstrip_protocol(self._root)}, and removed"

    def _changed(self, operation: str, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        if not self._options.changes:
            return [Outcome(True, "in the next list")] * len(people)
        at = self._now()
        name = f"{at.strftime(STAMP)}-{batch}.{self._options.format}"
        first = {"operation": operation, "at": at.isoformat(timespec="milliseconds")}
        with _told():
            rows = (first | self._row(person) for person in people)
            self._write(f"{self._root}/changes/{list_id}/{name}", rows, tuple(first))
        return [Outcome(True, name)] * len(people)

    def _row(self, person: Person) -> dict[str, Any]:
        named = {form: list(person.identifiers.get(form, ())) for form in self._options.forms}
        return {KEY: person.key, **named, **{field: person.fields.get(field) for field in self.fields}}

    def _write(self, path: str, rows: Iterable[Row], first: Sequence[str]) -> None:
        columns = [*first, KEY, *self._options.forms, *self.fields]
        writer = {"parquet": self._parquet, "csv": _csv, "ndjson": _ndjson}[self._options.format]
        with self._whole(path) as file:
            writer(file, rows, columns)

    def _parquet(self, file: IO[bytes], rows: Iterable[Row], columns: Sequence[str]) -> None:
        types = {form: pa.list_(pa.string()) for form in self._options.forms}
        types |= NUMBERS
        schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for chunk in _chunks(rows):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))

    @contextmanager
    def _whole(self, path: str) -> Iterator[IO[bytes]]:
        """A file that gets its name once all of it is written, or is none."""
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(self._files, fsspec.implementations.local.LocalFileSystem):
            with _beside(Path(path)) as file:
                yield file
            return
        file = self._files.open(path, "wb", autocommit=False)
        try:
            yield file
            file.close()
        except BaseException:
            file.discard()
            raise
        file.commit()

    def _prune(self, directory: str) -> None:
        oldest = (self._now() - datetime.timedelta(days=self._options.keep_days)).strftime(STAMP)
        if self._files.isdir(directory):
            for path in self._files.ls(directory, detail=False):
                if path.rpartition("/")[2].partition("-")[0] < oldest:
                    self._files.rm_file(path)


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    """A local file under another name in the same directory, since only there a rename is atomic."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except LASTING as error:
        raise Rejected(f"{error.filename or error}: {error.strerror or type(error).__name__}") from None
    except OSError as error:
        raise Busy(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")) from None


def _csv(file: IO[bytes], rows: Iterable[Row], columns: Sequence[str]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    # Ids may hold a carriage return, which Python before 3.13 quotes only where all is quoted.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([";".join(value) if isinstance(value, list) else value for value in row.values()])
    text.flush()
    text.detach()


def _ndjson(file: IO[bytes], rows: Iterable[Row], columns: Sequence[str]) -> None:
    for chunk in _chunks(rows):
        file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in chunk))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while chunk := list(islice(source, ROWS_AT_ONCE)):
        yield chunk


def build(name: str, options: Options) -> Files:
    """The destination of a name."""
    return Files(name, options)
