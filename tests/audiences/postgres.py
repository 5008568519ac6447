"""A PostgreSQL of its own for tests: the system's, on a free port of the loopback, run by a user that is not root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import free_port

both = pytest.mark.parametrize("ledger_url", ["sqlite", "postgresql"], indirect=True)


def _programs() -> Path:
    """Where initdb and postgres are; Debian has them beside the PATH."""
    if (found := shutil.which("postgres")) is not None and shutil.which("initdb"):
        return Path(found).parent
    beside = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not beside:
        pytest.skip("postgresql is not installed")
    return beside[-1].parent


def _somebody() -> pwd.struct_passwd | None:
    """Who runs it, since it refuses to be run by root; None: who runs the tests."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("there is no user but root")


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a new, empty server, which is stopped and deleted afterwards."""
    programs, owner = _programs(), _somebody()
    directory = Path(tempfile.mkdtemp(prefix="propensity-postgres-"))
    who: dict[str, Any] = {"user": owner.pw_uid, "group": owner.pw_gid} if owner else {}
    if owner:
        os.chown(directory, owner.pw_uid, owner.pw_gid)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(directory)}
    data, port = directory / "data", free_port()
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", "propensity", "--no-sync", "-E", "UTF8"],
            env=environment, cwd=directory, check=True, capture_output=True, **who,
        )  # fmt: skip
        options = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        words = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, *words],
                env=environment, cwd=directory, stdout=log, stderr=log, **who,
            )  # fmt: skip
        try:
            url = f"postgresql://propensity@127.0.0.1:{port}/postgres"
            _wait(url)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)
    finally:
        shutil.rmtree(directory)


def _wait(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def emptied(url: str) -> str:
    """The same address, once nothing is there any more."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url
