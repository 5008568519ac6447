"""A million visitors in the propensity database and in an audience: how fast they get in, what memory they take, and
whether paging through all of them misses or repeats somebody while scores change and members come and go.

Four visitors in five stay above the cut and in the audience the whole time, with ever new scores; the others cross the
cut, enter and leave all the while, and strangers come. Who stays must be on exactly one page, nobody on two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from loadtest import machine
from loadtest.bench_memory import Command, Wire
from loadtest.bench_memory import running as running_redis
from loadtest.servers import free_port, running_on
from service.members import Member, Members
from service.persons import Persons
from service.propensities import Propensities, Scored, pack
from service.shards import Page, by_shard
from service.store import Store

NOW_MS: Final = 1_790_000_000_000
RETENTION_MS: Final = 97 * 86_400_000
CUT: Final = 0.1
PAGE: Final = 1000
STAYING: Final = 0.8
AUDIENCE: Final = "everyone"
MODEL: Final = "shop"
# What a wave of changes has.
SCORES: Final = 1000
MEMBERS: Final = 200

T = TypeVar("T")


@dataclass
class Turbulence:
    """Keeps changing scores and members until it is stopped; who stays only gets other scores above the cut."""

    propensities: Propensities
    members: Members
    staying: Sequence[str]
    others: Sequence[str]
    waves: int = field(default=0, init=False)
    is_over: bool = field(default=False, init=False)

    async def rage(self) -> None:
        """Change things, wave after wave."""
        rng = np.random.default_rng(7)
        while not self.is_over:
            self.waves += 1
            at_ms = NOW_MS + self.waves
            stay = [self.staying[place] for place in rng.integers(0, len(self.staying), SCORES)]
            move = [self.others[place] for place in rng.integers(0, len(self.others), SCORES)]
            strangers = [f"stranger-{self.waves}-{place}" for place in range(10)]
            await self.propensities.put(MODEL, "1", stay, rng.uniform(CUT, 1, SCORES), at_ms)
            await self.propensities.put(MODEL, "1", move + strangers, rng.uniform(0, 1, SCORES + 10), at_ms)
            changing = move[:MEMBERS]
            entering = dict.fromkeys([*changing[::2], *strangers], at_ms)
            await self.members.change(AUDIENCE, entering, changing[1::2], at_ms, "score")


@dataclass(frozen=True)
class Walk:
    """What paging through everything gave."""

    pages: int
    found: int
    missing: int
    twice: int


async def walk(turn: Callable[[str | None], Awaitable[Page[Member] | Page[Scored]]], staying: set[str]) -> Walk:
    """Page through everything; how many of those who stayed were missing, and how many came twice."""
    found: list[str] = []
    cursor: str | None = None
    pages = 0
    while True:
        page = await turn(cursor)
        pages += 1
        found += [one.visitor_id for one in page.items]
        cursor = page.cursor
        if cursor is None:
            seen = set(found)
            return Walk(pages, len(found), len(staying - seen), len(found) - len(seen))


def split(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those who stay, and the others; so that every shard has both."""
    period = round(1 / (1 - STAYING))
    return [name for place, name in enumerate(ids) if place % period], list(ids[::period])


async def walk_in_turbulence(
    store: Store, ids: Sequence[str], note: Callable[[str, Walk, float, int], None] = lambda *_: None
) -> list[Walk]:
    """Walk through the members, and through everyone above the cut, while both change."""
    staying, others = split(ids)
    propensities, members = Propensities(store), Members(store)
    stay = set(staying)
    walks = []

    async def turn_members(cursor: str | None) -> Page[Member]:
        return await members.page(AUDIENCE, cursor, PAGE)

    async def turn_above(cursor: str | None) -> Page[Scored]:
        return await propensities.above(MODEL, CUT, cursor, PAGE)

    for name, turn in (("members", turn_members), ("above the cut", turn_above)):
        turbulence = Turbulence(propensities, members, staying, others)
        raging = asyncio.create_task(turbulence.rage())
        began = time.perf_counter()
        walks.append(await walk(turn, stay))
        seconds = time.perf_counter() - began
        turbulence.is_over = True
        await raging
        note(name, walks[-1], seconds, turbulence.waves)
    return walks


async def fill(store: Store, ids: Sequence[str], at_once: int = 50_000) -> tuple[float, float]:
    """Put everyone above the cut and into the audience; seconds for scores, and for members."""
    rng = np.random.default_rng(3)
    propensities, members = Propensities(store), Members(store)
    scores_s = members_s = 0.0
    await members.describe(AUDIENCE, json.dumps({"above": CUT}), NOW_MS)
    for first in range(0, len(ids), at_once):
        some = ids[first : first + at_once]
        began = time.perf_counter()
        await propensities.put(MODEL, "1", some, rng.uniform(CUT, 1, len(some)), NOW_MS)
        scores_s += time.perf_counter() - began
    for first in range(0, len(ids), at_once):
        some = ids[first : first + at_once]
        began = time.perf_counter()
        await members.change(AUDIENCE, dict.fromkeys(some, NOW_MS), [], NOW_MS, "score above 0.1")
        members_s += time.perf_counter() - began
    return scores_s, members_s


async def timed(label: str, work: Awaitable[T]) -> T:
    """What a question gives; its time is printed."""
    began = time.perf_counter()
    answer = await work
    print(f"  {label:44}{(time.perf_counter() - began) * 1000:10.1f} ms", flush=True)
    return answer


def note(name: str, found: Walk, seconds: float, waves: int) -> None:
    """Print what a walk gave."""
    print(
        f"  {name:16}{found.found:>10,} in {found.pages:,} pages and {seconds:.1f} s, during {waves:,} waves of "
        f"{2 * SCORES + 10:,} scores and {MEMBERS + 10} changes: {found.missing} missing, {found.twice} twice",
        flush=True,
    )


def resident_mb(pid: int, what: str = "VmHWM") -> float:
    """The most memory that a process has had resident (VmRSS: has now), in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1000


def stream(url: str, form: str) -> int:
    """How many lines a stream of all members has."""
    with urllib.request.urlopen(f"{url}/v1/audiences/{AUDIENCE}/members?format={form}", timeout=600) as answer:
        return sum(block.count(b"\n") for block in iter(lambda: answer.read(1 << 20), b""))


@contextmanager
def serving(path: str) -> Iterator[tuple[int, str]]:
    """A service over the same server; its process and address."""
    port = free_port()
    code = "from service.app import serve; from service.settings import Settings; serve(Settings())"
    with tempfile.TemporaryDirectory() as nothing:
        settings = {"REDIS_URL": f"unix://{path}", "PORT": str(port), "ARTIFACTS": nothing}
        environment = {f"PROPENSITY_{name}": value for name, value in settings.items()}
        with running_on((0, 1), [sys.executable, "-c", code], port, "/readyz", **environment) as server:
            yield server.pid, server.url


async def measure(path: str, visitors: int) -> bool:
    """Print all of it; whether nobody was missing or came twice."""
    wire = Wire(path)
    ids = [f"visitor-{place:07}" for place in range(visitors)]
    store = Store.open(f"unix://{path}", namespace="p", retention_ms=RETENTION_MS, timeout_ms=60_000)
    empty = wire.info("used_memory")
    scores_s, members_s = await fill(store, ids)
    used = {
        kind: sum(wire.send(("MEMORY", "USAGE", key, "SAMPLES", 0) for key in keys))
        for kind, keys in _keys(wire).items()
    }
    total = wire.info("used_memory") - empty
    print(f"{visitors:,} visitors with ids of {len(ids[0])} bytes, one model, all of them in one audience")
    print(f"  scores put           {visitors / scores_s:12,.0f} a second")
    print(f"  members entered      {visitors / members_s:12,.0f} a second")
    print(f"  scores put again     {visitors / (await fill(store, ids))[0]:12,.0f} a second")
    print("bytes a visitor:")
    for kind, size in sorted(used.items()):
        print(f"  {kind:34}{size / visitors:8.1f}")
    print(f"  {'all of it':34}{total / visitors:8.1f}")
    propensities, members = Propensities(store), Members(store)
    print("questions:")
    await timed("top 100", propensities.top(MODEL, 100))
    await timed("top 10,000", propensities.top(MODEL, 10_000))
    await timed("count above 0.5", propensities.count(MODEL, 0.5))
    await timed("95th percentile", propensities.percentile(MODEL, 95))
    await timed("one page of 1,000 above 0.999", propensities.above(MODEL, 0.999, None, 1000))
    await timed("size of the audience", members.size(AUDIENCE))
    await timed("one page of 1,000 changes", members.changes(AUDIENCE, "", 1000))
    await timed("erase a visitor", Persons(store).erase(ids[17]))
    print("pages while everything changes:")
    walks = await walk_in_turbulence(store, [*ids[:17], *ids[18:]], note)
    await store.close()
    print("streams over HTTP:")
    with serving(path) as (pid, url):
        for form in ("ndjson", "csv"):
            before, began = resident_mb(pid, "VmRSS"), time.perf_counter()
            lines = await asyncio.to_thread(stream, url, form)
            seconds = time.perf_counter() - began
            print(f"  {form:8}{lines:>10,} lines in {seconds:.1f} s; the service grew by", end=" ")
            print(f"{resident_mb(pid) - before:.1f} MB at most, to {resident_mb(pid):.0f} MB", flush=True)
    wire.close()
    return all(one.missing == one.twice == 0 and one.found for one in walks)


KINDS: Final = {
    "p:p:r:": "scores: ranks and moments",
    "p:p:i:": "scores: the order of pages",
    "p:a:s:": "members",
    "p:a:l:": "the journal of 200,000 changes",
}


def _keys(wire: Wire) -> dict[str, list[str]]:
    """The keys of each kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS.values()}
    for raw in wire.send([("KEYS", "p:*")])[0]:
        key = raw.decode()
        if (kind := KINDS.get(key[:6])) is not None:
            found[kind].append(key)
    return found


def layouts(at_ms: int = NOW_MS) -> dict[str, Callable[[str, int, float], list[Command]]]:
    """What else could keep a score or a member: the commands for a tag, its shard, and its score."""

    def ours(score: float) -> int:
        return int(pack([score], at_ms)[0])

    return {
        "scores: one sorted set by score": lambda tag, s, score: [("ZADD", f"r:{s}", repr(score), tag)],
        "scores: by score and moment (packed)": lambda tag, s, score: [("ZADD", f"r:{s}", ours(score), tag)],
        "scores: packed, and one in the order of tags": lambda tag, s, score: [
            ("ZADD", f"r:{s}", ours(score), tag),
            ("ZADD", f"i:{s}", 0, tag),
        ],
        "scores: by score, by moment, by tag": lambda tag, s, score: [
            ("ZADD", f"r:{s}", repr(score), tag),
            ("ZADD", f"m:{s}", at_ms, tag),
            ("ZADD", f"i:{s}", 0, tag),
        ],
        "scores: by score and by tag, hash of moments": lambda tag, s, score: [
            ("ZADD", f"r:{s}", repr(score), tag),
            ("ZADD", f"i:{s}", 0, tag),
            ("HSET", f"m:{s}", tag, at_ms),
        ],
        "members: the moment behind the tag": lambda tag, s, _: [("ZADD", f"a:{s}", 0, f"{tag} {at_ms}")],
        "members: by tag, and a hash of moments": lambda tag, s, _: [
            ("ZADD", f"a:{s}", 0, tag),
            ("HSET", f"m:{s}", tag, at_ms),
        ],
        "members: a hash, no order": lambda tag, s, _: [("HSET", f"m:{s}", tag, at_ms)],
        "changes: a stream, an entry each": lambda tag, s, _: [
            ("XADD", "changes", "*", "at", at_ms, "entered", 1, "why", "score", "id", tag)
        ],
        "changes: a sorted set by number": lambda tag, s, score: [
            ("ZADD", "changes", int(score * 2**40), f"{at_ms} 1 score {tag}")
        ],
    }


def compare_layouts(server: str, visitors: int, with_uuids: bool) -> None:
    """Print what a visitor takes in each layout."""
    rng = np.random.default_rng(4)
    uuids = (str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(visitors))
    ids = list(uuids) if with_uuids else [f"visitor-{place:07}" for place in range(visitors)]
    shards = {place: shard for shard, of in by_shard(ids).items() for place, _ in of}
    scores = np.random.default_rng(3).uniform(0, 1, visitors).astype(np.float32).tolist()
    for layout, commands_of in layouts().items():
        with tempfile.TemporaryDirectory() as directory, running_redis(server, Path(directory)) as path:
            wire = Wire(path)
            empty = wire.info("used_memory")
            for first in range(0, visitors, 5000):
                wire.send(
                    command
                    for place in range(first, min(first + 5000, visitors))
                    for command in commands_of(ids[place], shards[place], scores[place])
                )
            print(f"{layout:48}{(wire.info('used_memory') - empty) / visitors:8.1f} bytes a visitor", flush=True)
            wire.close()


def main() -> int:
    """Measure; 1 if paging missed or repeated somebody."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=1_000_000)
    parser.add_argument("--server", default="redis-server", help="a redis-server or valkey-server")
    parser.add_argument("--layouts", action="store_true", help="compare what other layouts take instead")
    parser.add_argument("--uuids", action="store_true", help="of layouts: ids of 36 bytes instead of 15")
    given = parser.parse_args()
    server = shutil.which(given.server)
    if server is None:
        raise SystemExit("needs redis-server; on Debian: sudo apt-get install redis-server, or write --server PATH")
    version = subprocess.run([server, "--version"], check=True, capture_output=True, text=True).stdout
    print(machine.describe(), version.strip(), sep="\n", flush=True)
    if given.layouts:
        compare_layouts(server, given.visitors, given.uuids)
        return 0
    with tempfile.TemporaryDirectory() as directory, running_redis(server, Path(directory)) as path:
        return 0 if asyncio.run(measure(path, given.visitors)) else 1


if __name__ == "__main__":
    sys.exit(main())
