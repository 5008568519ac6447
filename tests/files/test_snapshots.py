"""Snapshots at paths and at URLs: whoever reads at whatever moment sees a whole one, the last that was whole."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from files import snapshots
from service.core.errors import PropensityError


class Objects(MemoryFileSystem):  # type: ignore[misc]
    """A strict object store: nothing is renamed, no part is replaced, and `watch` looks at it after each step."""

    protocol = "objects"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    watch: ClassVar[Callable[[str], None]] = lambda step: None
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("objects://")))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        assert not self.exists(rpath), f"{rpath} is replaced"
        Objects.watch(f"before {rpath}")
        super().put_file(lpath, rpath, **options)
        Objects.watch(f"after {rpath}")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super().open(path, mode, **options)
        if mode == "wb" and path.endswith(snapshots.LIST):
            assert options.get("autocommit") is False, "a list that is seen while it is written"
        return file

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        super().rm(path, recursive=recursive, maxdepth=maxdepth)
        Objects.watch(f"after the end of {path}")

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store renames nothing")


@pytest.fixture
def url() -> Iterator[str]:
    """A place of its own in the strict store."""
    fsspec.register_implementation("objects", Objects, clobber=True)
    yield f"objects://bucket/{uuid.uuid4().hex}/scores"
    Objects.store.clear()
    Objects.pseudo_dirs[:] = [""]
    Objects.watch = lambda step: None


@pytest.fixture(params=["path", "file", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> str:
    """Where a snapshot goes, of each kind."""
    return {"path": str(tmp_path / "scores"), "file": f"file://{tmp_path}/sco%20res", "objects": url}[request.param]


def write(where: str, number: int, parts: int = 3) -> None:
    """A snapshot whose rows all have this number."""
    with snapshots.assembling(where) as directory:
        for part in range(parts):
            pq.write_table(pa.table({"n": [number] * 4}), directory / f"part-{part:05}.parquet")


def read(where: str) -> list[int]:
    """All rows of the snapshot that is there."""
    found = snapshots.find(where)
    if not found.parts:
        return []
    return list(pq.ParquetDataset(list(found.parts), filesystem=found.filesystem).read()["n"].to_pylist())


def test_what_was_assembled_is_found_and_replaced(place: str) -> None:
    assert read(place) == []
    write(place, 1)
    assert read(place) == [1] * 12
    write(place, 2, parts=2)
    assert read(place) == [2] * 8


def test_a_reader_sees_a_whole_snapshot_at_every_step(url: str) -> None:
    seen: list[list[int]] = []
    Objects.watch = lambda step: seen.append(read(url))
    for number in range(1, 5):
        write(url, number)
    assert len(seen) >= 4 * 6
    assert {tuple(rows) for rows in seen} <= {(), *((number,) * 12 for number in range(1, 5))}
    assert seen[0] == []
    assert read(url) == [4] * 12


def test_who_reads_the_snapshot_before_can_go_on_and_older_ones_are_gone(url: str) -> None:
    found = []
    for number in (1, 2, 3):
        write(url, number)
        found.append(snapshots.find(url))
    assert [found[0].filesystem.exists(one.parts[0]) for one in found] == [False, True, True]


@pytest.mark.parametrize("step", range(1, 4))
def test_what_fails_on_the_way_changes_nothing(url: str, step: int) -> None:
    write(url, 1)
    steps: list[str] = []

    def fail(said: str) -> None:
        steps.append(said)
        if len(steps) == 2 * step:
            raise ConnectionError("the network is gone")

    Objects.watch = fail
    with pytest.raises(PropensityError, match=r"^objects://.*/scores: ConnectionError: the network is gone$"):
        write(url, 2)
    Objects.watch = lambda step: None
    assert read(url) == [1] * 12
    write(url, 3)
    assert read(url) == [3] * 12
    write(url, 4)
    write(url, 5)
    runs = {path.split("/")[-2] for path in Objects.store if path.endswith(".parquet")}
    assert len(runs) == 2, "what was left behind went with the older ones"


def test_an_error_while_scoring_uploads_nothing(place: str) -> None:
    write(place, 1)
    before = sorted(Objects.store)
    with pytest.raises(RuntimeError), snapshots.assembling(place) as directory:
        pq.write_table(pa.table({"n": [2]}), directory / "part-00000.parquet")
        raise RuntimeError
    assert (read(place), sorted(Objects.store)) == ([1] * 12, before)


def test_two_who_write_at_once_do_each_other_no_harm(url: str) -> None:
    write(url, 1)
    began = False

    def other(step: str) -> None:
        nonlocal began
        if not began and "part-00001" in step:
            began = True
            write(url, 2)

    Objects.watch = other
    write(url, 3)
    assert began
    assert read(url) == [3] * 12


def test_anything_else_there_is_not_touched(place: str, tmp_path: Path, url: str) -> None:
    write(place, 1)
    if place.startswith("objects"):
        Objects.store[f"/{url.removeprefix('objects://')}/notes.txt"] = _file("mine")
    else:
        next(path for path in tmp_path.iterdir() if path.is_dir()).joinpath("notes.txt").write_text("mine")
    with pytest.raises(PropensityError, match="name a new one with --out"):
        write(place, 2)
    assert read(place) == [1] * 12


def _file(text: str) -> Any:
    filesystem = MemoryFileSystem(skip_instance_cache=True)
    filesystem.pipe_file("/x", text.encode())
    return filesystem.store.pop("/x")


def test_a_snapshot_that_was_copied_to_a_store_is_found(url: str, tmp_path: Path) -> None:
    write(str(tmp_path / "scores"), 7)
    filesystem = fsspec.filesystem("objects")
    for part in (tmp_path / "scores").iterdir():
        filesystem.put_file(str(part), f"{url.removeprefix('objects://')}/{part.name}")
    assert read(url) == [7] * 12


@pytest.mark.parametrize("content", ["", "[]", '{"part": []}', '{"parts": 3}'])
def test_a_list_that_is_none_is_told(url: str, content: str) -> None:
    write(url, 1)
    Objects.store[f"/{url.removeprefix('objects://')}/{snapshots.LIST}"] = _file(content)
    with pytest.raises(PropensityError, match=r"scores: snapshot\.json is no list of parts; write the scores anew"):
        read(url)


def test_the_list_names_the_parts_beside_it(url: str) -> None:
    write(url, 1)
    root = f"/{url.removeprefix('objects://')}"
    parts = json.loads(Objects.store[f"{root}/{snapshots.LIST}"].getvalue())["parts"]
    assert [part.rpartition("/")[2] for part in parts] == [f"part-{place:05}.parquet" for place in range(3)]
    assert all(f"{root}/{part}" in Objects.store for part in parts)


def test_a_file_url_that_names_a_machine_is_refused_instead_of_a_path_that_was_not_meant() -> None:
    for call in (snapshots.find, lambda url: snapshots.assembling(url).__enter__()):
        with pytest.raises(PropensityError, match=r"names the machine data; write file:///PATH, or the path alone"):
            call("file://data/scores")


def test_a_file_system_that_is_not_there_is_told_before_anything_is_done() -> None:
    with pytest.raises(PropensityError, match="^nosuch://bucket/x: Protocol not known: nosuch"):
        write("nosuch://bucket/x", 1)
