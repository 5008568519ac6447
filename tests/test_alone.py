"""Holds `tests/alone.py` to its promise: beside a test that is alone no other one runs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.alone import Room
from tests.conftest import wait_until

ROOT = Path(__file__).parents[1]

FILE = """
import json, os, time
from pathlib import Path
import pytest

@pytest.fixture(autouse=True)
def noted(request):
    began = time.monotonic()
    yield
    with Path(os.environ["NOTES"]).open("a") as notes:
        notes.write(json.dumps([request.node.nodeid, began, time.monotonic()]) + "\\n")

@pytest.mark.alone
def test_alone_one(): time.sleep(0.05)

@pytest.mark.parametrize("number", range(5))
def test_beside(number): time.sleep(0.05)

@pytest.mark.alone
def test_alone_two(): time.sleep(0.05)
"""


def test_who_is_alone_waits_for_those_inside_and_keeps_out_who_comes_later(tmp_path: Path) -> None:
    inside, alone, late = (Room(tmp_path) for _ in range(3))
    order: list[str] = []

    def enter(room: Room, name: str) -> None:
        room.enter(alone=name == "alone")
        order.append(name)
        room.leave()

    def is_shut() -> bool:
        with (tmp_path / "door").open() as door:
            try:
                fcntl.flock(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    inside.enter(alone=False)
    threads = [threading.Thread(target=enter, args=given) for given in ((alone, "alone"), (late, "late"))]
    for thread in threads:
        thread.start()
        wait_until(is_shut)
    order.append("inside")
    inside.leave()
    for thread in threads:
        thread.join(20)
    assert order == ["inside", "alone", "late"]
    for room in (inside, alone, late):
        room.close()


def test_of_two_processes_one_waits_while_the_other_runs_a_test_that_is_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.alone"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**ours, "PYTHONPATH": str(ROOT), "NOTES": str(tmp_path / "notes")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == 14
    for name, began, ended in notes:
        if "test_alone" in name:
            assert [other for other, start, end in notes if other != name and start < ended and began < end] == []
    for file in ("test_a.py", "test_b.py"):
        assert ["alone" in name for name, _, _ in notes if name.startswith(file)] == [False] * 5 + [True] * 2
