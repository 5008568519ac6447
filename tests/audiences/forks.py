"""Commands as processes that begin with everything imported: a parent that has no threads forks them.

Starting Python and importing takes two seconds, of which a proof with hundreds of runs would only tell the same again.
What runs is `cli.main.main()`, in a process of its own that ends, and is killed, like any other.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

ROOT: Final = Path(__file__).parents[2]
PRELOADED: Final = ("cli.main", "audiences.live", "audiences.sync", "audiences.destinations.webhook", "psycopg")


class Forked:
    """One process."""

    def __init__(self, parent: Forks, pid: int, out: Path) -> None:
        self._parent, self.pid, self._out = parent, pid, out
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its status, None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._parent.ends.get_nowait()
            except queue.Empty:
                return None
        return self.returncode

    def kill(self) -> None:
        """kill -9, unless it has just ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> str:
        """What it wrote, once it has ended."""
        if self.returncode is None:
            self.returncode = self._parent.ends.get(timeout=timeout)
        return self._out.read_text("utf-8", "replace")


class Forks:
    """The parent. One process at a time."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.ends: queue.Queue[int] = queue.Queue()
        self._pids: queue.Queue[int] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.audiences.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                word, number = line.split()
                (self._pids if word == "began" else self.ends).put(int(number))

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
        """Run `propensity` with these arguments, and these variables beside those that there are."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([list(arguments), dict(environment), str(self._out)]) + "\n")
        self.process.stdin.flush()
        return Forked(self, self._pids.get(timeout=60), self._out)

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _run(arguments: list[str], environment: dict[str, str], out: str) -> NoReturn:
    status = 70
    try:
        os.environ.update(environment)
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["propensity", *arguments]
        from cli.main import main as propensity

        try:
            propensity()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Fork for every line."""
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(*json.loads(line))
        print("began", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
