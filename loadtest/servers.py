"""Servers under measurement: started on pinned cores, waited for, and ended with the block that needs them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest import machine

ROOT: Final = Path(__file__).parents[1]
SERVER_CORE, GENERATOR_CORE = 0, 1
_START_S: Final = 30.0


@dataclass(frozen=True)
class Server:
    """A server that runs: its process and its port on the loopback."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor seconds that it and its workers have used so far."""
        return machine.cpu_seconds(self.pid)

    def move(self, *cores: int) -> None:
        """Let it run on other cores."""
        machine.pin(*cores, pid=self.pid)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def running(
    command: list[str], port: int, path: str | None, **environment: str
) -> contextlib.AbstractContextManager[Server]:
    """A server on the servers' core; see `running_on`."""
    return running_on((SERVER_CORE,), command, port, path, **environment)


@contextlib.contextmanager
def running_on(
    cores: tuple[int, ...], command: list[str], port: int, path: str | None, **environment: str
) -> Iterator[Server]:
    """A server on some cores, once its port listens and `path` (None: nothing) answers; ended afterwards.

    Raises RuntimeError with the end of its log if it does not come up within 30 s.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            preexec_fn=lambda: machine.pin(*cores),
        )
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(port, path):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} did not start: {log.read().decode()[-2000:]}")
                time.sleep(0.05)
            yield Server(process.pid, port)
        finally:
            process.terminate()
            process.wait(30)


def _answers(port: int, path: str | None) -> bool:
    try:
        if path is None:
            socket.create_connection(("127.0.0.1", port), 1).close()
        else:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).close()
    except OSError:
        return False
    return True
