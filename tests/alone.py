"""Tests run in two processes; while one that is marked `alone` runs in the one, the other waits."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from pathlib import Path

import pytest


class Room:
    """Where tests run: many processes may be in it at once, or one that has it for itself."""

    def __init__(self, directory: Path) -> None:
        self._door, self._room = (directory / "door").open("w"), (directory / "room").open("w")
        self.is_taken = False

    def enter(self, alone: bool) -> None:
        """Wait for the room. Who waits keeps the door shut, or others would come and go and it would never be empty."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self.is_taken = alone

    def leave(self) -> None:
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self.is_taken = False

    def close(self) -> None:
        self._door.close()
        self._room.close()


def _is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


class Turns:
    """A plugin of each of the processes that lets its tests into the room."""

    def __init__(self, room: Room) -> None:
        self._room = room

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files with slow tests come first, or one process would end with them while the other has nothing left to do.

        Within a file the tests that are alone come last, one after the other: the room is waited for once.
        """
        files: dict[Path, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        slow_first = sorted(files.values(), key=lambda file: not any(map(_is_slow, file)))
        items[:] = [item for file in slow_first for item in sorted(file, key=_is_alone)]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Outside the time limit of the test, which does not count how long the room was waited for."""
        if not self._room.is_taken:
            self._room.enter(_is_alone(item))
        try:
            return (yield)
        finally:
            if not (_is_alone(item) and _is_alone(nextitem)):
                self._room.leave()

    def pytest_unconfigure(self) -> None:
        self._room.close()


def pytest_configure(config: pytest.Config) -> None:
    """Only in a process that has another one beside it."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Turns(Room(config.cache.mkdir("alone"))))
