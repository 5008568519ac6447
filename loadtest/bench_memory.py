"""Memory of visitors at rest: as they came and after compaction, against the bound of the design.

A power law of events (a median of 4, a mean of 15, at most 2,048 a visitor), UUIDs as ids, and one visitor in two with
one to three traits that came again with up to eight of its events. A fifth of the visitors at a time is appended as
live events are, one record of each visitor after the other, and comes to rest; then a pass of compaction goes over all.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import hiredis
import numpy as np
from rich.console import Console
from rich.progress import track

from loadtest import machine
from service.core import events
from service.core.events import RECORD_BYTES
from service.history import MOST_EVENTS, History
from service.store import Store
from service.workers.compaction import Compactor

NOW_MS: Final = 1_790_000_000_000
RETENTION_MS: Final = 97 * 86_400_000
MOST_TRAITS: Final = 3
TRAITS_SENT: Final = 8
SAMPLE: Final = 1000
WAVES: Final = 5
# The bound: bytes a byte of records, and bytes a visitor.
SHARE: Final = 1.3
EACH: Final = 150

console = Console(stderr=True)


@dataclass(frozen=True)
class Population:
    """n visitors: their ids, and how many events and traits each has."""

    ids: list[str]
    events: np.ndarray[tuple[int], np.dtype[np.int64]]
    traits: np.ndarray[tuple[int], np.dtype[np.int64]]

    @property
    def record_bytes(self) -> int:
        """What the records of all visitors take, each once."""
        return int((self.events.sum() + self.traits.sum()) * RECORD_BYTES)


def population(visitors: int) -> Population:
    """Visitors whose events follow a power law."""
    rng = np.random.default_rng(0)
    counts = np.minimum(MOST_EVENTS, 1 + (5 * rng.pareto(1.3, visitors)).astype(np.int64))
    traits = np.where(rng.random(visitors) < 0.5, rng.integers(1, MOST_TRAITS + 1, visitors), 0)
    ids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(visitors)]
    return Population(ids, counts, traits)


def rounds(known: Population) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], bytes, list[bytes]]]:
    """Visitors with another event, what all of them send, and the traits that come along (by number of them)."""
    rng = np.random.default_rng(1)
    for number in range(int(known.events.max())):
        sending = np.flatnonzero(known.events > number)
        at_ms = NOW_MS - 10_000_000 + number
        ids = rng.integers(1, 2**32, len(sending))
        made = events.records(np.full(len(sending), at_ms), np.ones(len(sending)), ids, ids % 50, ids % 1000)
        names = np.arange(1, MOST_TRAITS + 1)
        sent = events.records(np.full(MOST_TRAITS, at_ms), np.full(MOST_TRAITS, events.TRAIT_TEXT), names, names, names)
        along = [sent[:count].tobytes() if number < TRAITS_SENT else b"" for count in range(MOST_TRAITS + 1)]
        yield sending, made.tobytes(), along


Command = tuple[str | bytes | int, ...]


class Wire:
    """A connection that sends many commands at once, much faster than a client library."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._reader = hiredis.Reader()

    def send(self, commands: Iterable[Command]) -> list[Any]:
        """The reply to each command."""
        packed = [hiredis.pack_command(cast(Any, command)) for command in commands]
        self._socket.sendall(b"".join(packed))
        replies: list[Any] = []
        while len(replies) < len(packed):
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 20))
            elif isinstance(reply, Exception):
                raise reply
            else:
                replies.append(reply)
        return replies

    def info(self, name: str) -> float:
        """A number of INFO."""
        text: bytes = self.send([("INFO", "everything")])[0]
        return float(next(line for line in text.decode().splitlines() if line.startswith(f"{name}:")).partition(":")[2])

    def cpu_seconds(self) -> float:
        """Processor seconds that the server has used so far."""
        return self.info("used_cpu_user") + self.info("used_cpu_sys")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def fill(wire: Wire, known: Population) -> None:
    """Append every record on its own, and give every key its TTL."""
    pairs = [(f"p:e:{{{visitor}}}", f"p:t:{{{visitor}}}") for visitor in known.ids]
    steps = track(rounds(known), "Appending", int(known.events.max()), console=console, transient=True)
    for sending, made, along in steps:
        for first in range(0, len(sending), 2000):
            commands: list[Command] = []
            for place in range(first, min(first + 2000, len(sending))):
                visitor = int(sending[place])
                commands.append(("APPEND", pairs[visitor][0], made[place * RECORD_BYTES : (place + 1) * RECORD_BYTES]))
                if traits := along[known.traits[visitor]]:
                    commands.append(("APPEND", pairs[visitor][1], traits))
            wire.send(commands)
    for first in range(0, len(pairs), 2000):
        wire.send(("PEXPIRE", key, RETENTION_MS) for pair in pairs[first : first + 2000] for key in pair)


@contextmanager
def running(server: str, directory: Path) -> Iterator[str]:
    """The socket of a server that keeps nothing on disk."""
    path = str(directory / "memory.sock")
    command = [server, "--port", "0", "--unixsocket", path, "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not Path(path).exists():
            time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait()


LAYOUTS: Final[dict[str, Callable[[str, bytes, bytes], list[Command]]]] = {
    "two strings": lambda name, known, traits: [
        ("SET", f"p:e:{{{name}}}", known, "PX", RETENTION_MS),
        *([("SET", f"p:t:{{{name}}}", traits, "PX", RETENTION_MS)] if traits else []),
    ],
    "two strings, traits without a TTL": lambda name, known, traits: [
        ("SET", f"p:e:{{{name}}}", known, "PX", RETENTION_MS),
        *([("SET", f"p:t:{{{name}}}", traits)] if traits else []),
    ],
    "one string": lambda name, known, traits: [("SET", f"p:e:{{{name}}}", traits + known, "PX", RETENTION_MS)],
    "one hash": lambda name, known, traits: [
        ("HSET", f"p:e:{{{name}}}", "e", known, *(("t", traits) if traits else ())),
        ("PEXPIRE", f"p:e:{{{name}}}", RETENTION_MS),
    ],
}


def compare_layouts(server: str, known: Population) -> None:
    """Print what visitors take that are stored in one piece, by layout."""
    blob = bytes(MOST_EVENTS * RECORD_BYTES)
    for layout, commands_of in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as directory, running(server, Path(directory)) as path:
            wire = Wire(path)
            empty = wire.info("used_memory")
            for first in range(0, len(known.ids), 5000):
                wire.send(
                    command
                    for place in range(first, min(first + 5000, len(known.ids)))
                    for command in commands_of(
                        known.ids[place],
                        blob[: known.events[place] * RECORD_BYTES],
                        blob[: known.traits[place] * RECORD_BYTES],
                    )
                )
            print(f"{layout:35}{(wire.info('used_memory') - empty) / len(known.ids):8.1f} bytes a visitor", flush=True)
            wire.close()


def told(history: History) -> tuple[set[bytes], set[bytes]]:
    """What of a history counts: its events, and the latest record of each trait."""
    parts = [events.from_bytes(part) for part in history]
    latest: dict[int, bytes] = {}
    for record in np.sort(parts[1], order="ts_ms"):
        latest[int(record["id"])] = record.tobytes()
    return {record.tobytes() for record in parts[0]}, set(latest.values())


async def compact(path: str, sample: list[str]) -> None:
    """A pass over all visitors. Raises if one of the sample is not what it was."""
    store = Store.open(f"unix://{path}", namespace="p", retention_ms=RETENTION_MS, timeout_ms=300_000)
    before = [told(history) for history in await store.read(sample)]
    total, looked_at = await store.count_keys(), 0
    with console.status("Compacting") as status:
        async for page in Compactor(store).pages(500, 0, lambda: NOW_MS):
            looked_at += page.looked_at
            status.update(f"Compacting {min(1, looked_at / total):.0%}")
    if [told(history) for history in await store.read(sample)] != before:
        raise SystemExit("a visitor lost or gained records by compaction")
    await store.close()


def measure(server: str, known: Population) -> bool:
    """Print what visitors take on a server; whether that is within the bound."""
    visitors = len(known.ids)
    grown = seconds = own = servers = 0.0
    with tempfile.TemporaryDirectory() as directory, running(server, Path(directory)) as path:
        wire = Wire(path)
        empty = wire.info("used_memory")
        for wave in range(WAVES):
            part = Population(known.ids[wave::WAVES], known.events[wave::WAVES], known.traits[wave::WAVES])
            before = wire.info("used_memory")
            fill(wire, part)
            grown += wire.info("used_memory") - before
            at, own_at, servers_at = time.perf_counter(), time.process_time(), wire.cpu_seconds()
            asyncio.run(compact(path, part.ids[:: max(1, len(part.ids) // SAMPLE)]))
            seconds += time.perf_counter() - at
            own += time.process_time() - own_at
            servers += wire.cpu_seconds() - servers_at
        rest, resident = wire.info("used_memory") - empty, wire.info("used_memory_rss")
        wire.close()
    records = known.record_bytes / visitors
    bound = SHARE * records + EACH
    print(f"{visitors:,} visitors, {known.events.mean():.1f} events each (median {np.median(known.events):.0f})")
    print("bytes a visitor:")
    print(f"  records     {records:7.1f}")
    print(f"  as it came  {grown / visitors:7.1f}")
    print(f"  at rest     {rest / visitors:7.1f}   (resident {resident / visitors:.1f})")
    print(f"  allowed     {bound:7.1f}   ({SHARE} x records + {EACH})")
    print(
        f"compaction took {seconds:.0f} s in {WAVES} passes; processor: {own:.0f} s here, {servers:.0f} s of the server"
    )
    return rest <= bound * visitors


def main() -> int:
    """Measure; 1 if visitors at rest take more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=1_000_000)
    parser.add_argument("--server", default="redis-server", help="a redis-server or valkey-server")
    parser.add_argument("--layouts", action="store_true", help="compare layouts in one piece instead")
    given = parser.parse_args()
    server = shutil.which(given.server)
    if server is None:
        raise SystemExit("needs redis-server; on Debian: sudo apt-get install redis-server, or write --server PATH")
    version = subprocess.run([server, "--version"], check=True, capture_output=True, text=True).stdout
    print(machine.describe(), version.strip(), sep="\n", flush=True)
    if given.layouts:
        compare_layouts(server, population(given.visitors))
        return 0
    return 0 if measure(server, population(given.visitors)) else 1


if __name__ == "__main__":
    sys.exit(main())
