"""Leases: who may write to a destination, or work at a trigger. Kept in the ledger's tables."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from audiences.tables import leases, reader, upsert
from service.core.errors import PropensityError


class Lease(NamedTuple):
    """The right to write to a destination, which ends unless it is held for longer in time."""

    name: str
    holder: str
    lease_ms: int


class LeaseLost(PropensityError):
    """Somebody else took the destination over, since this run was silent for longer than its lease."""


class Held(PropensityError):
    """Another run is at it."""


def holder() -> str:
    """Who this process is: host, namespace of processes, process, and when it started; told apart from all others."""
    return "/".join((*_place(), str(os.getpid()), _started(os.getpid()) or uuid.uuid4().hex))


def _place() -> tuple[str, str]:
    try:
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        namespace = "-"
    return socket.gethostname().replace("/", "_"), namespace


def _started(process: int) -> str | None:
    """The moment a process started, by the kernel's count; None where it is gone or there is no such count."""
    try:
        return Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_gone(text: str) -> bool:
    """Whether the holder was a process of this machine that is no more. False where that cannot be known."""
    host, namespace, process, started = ([*text.split("/"), "", "", "", ""])[:4]
    if (host, namespace) != _place() or namespace == "-" or not process.isdigit():
        return False
    return _started(int(process)) != started


def described(holder: str) -> str:
    """A holder in words."""
    host, _, process = ([*holder.split("/"), "", ""])[:3]
    return f"process {process} of {host}"


class Leases:
    """The leases of a ledger, by name. Not for several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def take(self, name: str, holder: str, now_ms: int, lease_ms: int) -> str | None:
        """Take the lease of this name. Who holds it instead, or None; a holder that is dead holds nothing."""
        with self._engine.begin() as connection:
            now_ms = self._clock(connection, now_ms)
            free = {"name": name, "holder": "", "until_ms": 0}
            connection.execute(upsert(self._engine)(leases).values(free).on_conflict_do_nothing())
            row = connection.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).one()
            if row.holder not in ("", holder) and row.until_ms > now_ms and not is_gone(row.holder):
                return str(row.holder)
            change = leases.update().where(leases.c.name == name)
            connection.execute(change.values(holder=holder, until_ms=now_ms + lease_ms))
            return None

    def hold(self, connection: sa.Connection, lease: Lease, now_ms: int) -> None:
        """Hold the lease for longer, in the transaction that depends on it. Raises LeaseLost where it is another's."""
        name, holder, lease_ms = lease
        own = (leases.c.name == name) & (leases.c.holder == holder)
        until_ms = self._clock(connection, now_ms) + lease_ms
        if connection.execute(leases.update().where(own).values(until_ms=until_ms)).rowcount != 1:
            raise LeaseLost(f"another run took {name} over, since this one was silent for too long; run it again")

    def keep(self, lease: Lease, now_ms: int) -> None:
        """Hold the lease for longer. Raises LeaseLost where it is another's."""
        with self._engine.begin() as connection:
            self.hold(connection, lease, now_ms)

    def give_back(self, name: str, holder: str) -> None:
        """End a lease, if it is held."""
        with self._engine.begin() as connection:
            own = (leases.c.name == name) & (leases.c.holder == holder)
            connection.execute(leases.update().where(own).values(holder="", until_ms=0))

    def holders(self, now_ms: int) -> dict[str, str]:
        """Who holds which lease, by its name. A process of this machine that is no more holds none."""
        with reader(self._engine).connect() as connection:
            held = sa.select(leases.c.name, leases.c.holder).where(leases.c.until_ms > self._clock(connection, now_ms))
            return {name: holder for name, holder in connection.execute(held) if not is_gone(holder)}

    def _clock(self, connection: sa.Connection, now_ms: int) -> int:
        """The time that leases are judged by: the server's, since hosts may disagree; a file has one host."""
        if self._engine.dialect.name != "postgresql":
            return now_ms
        moment = sa.func.extract("epoch", sa.func.clock_timestamp())
        return int(float(connection.execute(sa.select(moment)).scalar_one()) * 1000)
