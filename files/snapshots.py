"""Snapshots of scores: `part-NNNNN.parquet`, at a path or at any URL of fsspec, which readers see whole or not at all.

At a path a snapshot is a directory, which a new one replaces by a rename. An object store has no rename of directories:
there the parts of each snapshot have a directory of their own, and one object, written last, says which one counts.

    URL/snapshot.json       {"parts": ["20261124T181500000000Z-1f0e7c9a/part-00000.parquet", ...]}
    URL/20261124T181500000000Z-1f0e7c9a/part-00000.parquet

The parts of the snapshot before stay, for those who are reading them, until there is another one.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from service.core.errors import PropensityError

PARTS: Final = "part-*.parquet"
LIST: Final = "snapshot.json"

_is_run: Final = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}").fullmatch


class Found(NamedTuple):
    """The parts of a snapshot in order, and the file system of fsspec that they are in; none: that of this machine."""

    parts: tuple[str, ...]
    filesystem: Any = None


def find(where: str | Path) -> Found:
    """The parts of the snapshot at a path or URL, none where there is none. Raises PropensityError."""
    if (path := _path(where)) is not None:
        return Found(tuple(map(str, sorted(path.glob(PARTS)))))
    return _Store(str(where)).find()


@contextmanager
def assembling(out: str | Path) -> Iterator[Path]:
    """A directory of this machine for parts, which become the snapshot at `out` when all went well.

    Raises PropensityError at once where `out` has anything else in it or cannot be reached.
    """
    if (path := _path(out)) is not None:
        with _beside(path) as directory:
            yield directory
        return
    store = _Store(str(out))
    store.require_ours()
    with tempfile.TemporaryDirectory(prefix="propensity-scores-") as made:
        yield Path(made)
        store.publish(sorted(Path(made).glob(PARTS)))


def _path(where: str | Path) -> Path | None:
    """The path that is meant, None for a URL of another file system."""
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    if not where.startswith("file://"):
        return None
    url = urlsplit(where)
    if url.netloc not in ("", "localhost"):
        raise PropensityError(f"{where}: names the machine {url.netloc}; write file:///PATH, or the path alone")
    return Path(url2pathname(url.path))


# --- at a path ---


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when all went well."""
    if out.exists() and not _is_snapshot(out):
        raise PropensityError(f"{out}: is no directory of scores; name a new one with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent.resolve()))
    directory.chmod(0o755)
    try:
        yield directory
        if out.exists():
            out.rename(directory.with_name(f"{directory.name}-old"))
        directory.rename(out)
    finally:
        for left in out.parent.glob(f"{directory.name}*"):
            shutil.rmtree(left, ignore_errors=True)


def _is_snapshot(path: Path) -> bool:
    """Whether a directory holds parts of a snapshot and nothing else."""
    return path.is_dir() and all(file.match(PARTS) for file in path.iterdir())


# --- at a URL ---


class _Store:
    """The snapshots at one URL: that which counts, and runs that are or were written."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            missing = getattr(error, "name", None) == "fsspec"
            what = "needs fsspec; install it with pip install 'propensity[audiences]'" if missing else str(error)
            raise PropensityError(f"{url}: {what}") from None
        self._root = root.rstrip("/")

    @contextmanager
    def _told(self) -> Iterator[None]:
        # Every file system has errors of its own, and some are no OSError: s3fs lets those of botocore through.
        try:
            yield
        except PropensityError:
            raise
        except Exception as error:
            raise PropensityError(f"{self._url}: {type(error).__name__}: {error}") from error

    def find(self) -> Found:
        """The parts that count: those that the list names; without a list those of a snapshot that was copied here."""
        with self._told():
            self._files.invalidate_cache()  # another process may have written since
            parts = self._listed()
            if parts is None:
                return Found(tuple(sorted(self._files.glob(f"{self._root}/{PARTS}"))), self._files)
            return Found(tuple(f"{self._root}/{part}" for part in parts), self._files)

    def _listed(self) -> list[str] | None:
        try:
            content = self._files.cat_file(f"{self._root}/{LIST}")
        except FileNotFoundError:
            return None
        try:
            return [str(part) for part in json.loads(content)["parts"]]
        except (ValueError, KeyError, TypeError):
            raise PropensityError(f"{self._url}: {LIST} is no list of parts; write the scores anew") from None

    def require_ours(self) -> None:
        """Raise PropensityError where there is anything but snapshots that were written here."""
        with self._told():
            strange = [name for name in self._names() if name != LIST and not _is_run(name)]
        if strange:
            raise PropensityError(
                f"{self._url}: has {strange[0]}, which is no part of scores; name a new one with --out"
            )

    def _names(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        own = self._root.rpartition("/")[2]  # an object that stands for the directory is listed in it by some
        return [name for name in (path.rstrip("/").rpartition("/")[2] for path in paths) if name not in ("", own)]

    def publish(self, parts: Sequence[Path]) -> None:
        """Put a snapshot here: parts first, then the list of them at once, then drop what nobody reads any more."""
        run = f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{uuid.uuid4().hex[:8]}"
        with self._told():
            self._files.makedirs(f"{self._root}/{run}", exist_ok=True)
            for part in parts:
                self._files.put_file(str(part), f"{self._root}/{run}/{part.name}")
            before = self._listed() or []
            self._write_list([f"{run}/{part.name}" for part in parts])
            # Runs after the last snapshot may be of others who write right now.
            oldest = min((part.partition("/")[0] for part in before), default="")
            for name in self._names():
                if _is_run(name) and name < min(oldest, run):
                    self._files.rm(f"{self._root}/{name}", recursive=True)

    def _write_list(self, parts: Sequence[str]) -> None:
        file = self._files.open(f"{self._root}/{LIST}", "wb", autocommit=False)
        try:
            file.write(json.dumps({"parts": list(parts)}, indent=1).encode())
            file.close()
        except BaseException:
            file.discard()
            raise
        file.commit()
