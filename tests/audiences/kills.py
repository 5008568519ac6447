"""Proof: kill `propensity audiences sync` at random points, run it again, and the receiver has what it should.

    make sync-kills

Everything is real and a process of its own: the feature cache, the command, the ledger (SQLite and PostgreSQL) and a
strict receiver that fails at random. After each kill members, consents, addresses and segments are what they were; the
next run must bring the lists in step. Nobody may be sent without consent, and nobody again whose last answer is known.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from service import consent, embedded, identity
from service.members import Members
from service.persons import Persons
from service.propensities import Propensities
from service.store import Store
from service.visitors import Visitors
from tests.audiences.forks import Forked, Forks
from tests.audiences.postgres import postgres
from tests.audiences.receiving import SECRET, Receiving

SEGMENTS: Final = ("champions", "nurture", "low_priority")
AUDIENCES: Final = ("first", "second")
MODEL: Final = "shop"
BATCH: Final = 10
TIMEOUT_S: Final = 5  # far above what an answer takes on a busy machine: who times out may send again


@dataclass
class Visitor:
    """What the world knows of a visitor; `sees` is what a receiver should."""

    name: str
    email: str
    allowed: bool = True
    segment: str = SEGMENTS[0]
    audiences: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def sees(self) -> dict[str, Any]:
        hashes = {form: [identity.hashed(form, self.email)] for form in identity.EMAILS}
        own = {"external_id": [self.name], "meta.external_id": [self.key]}
        return {"key": self.key, "identifiers": {**hashes, **own}, "fields": {"segment": self.segment}}


class World:
    """Visitors, in memory and in a real feature cache."""

    def __init__(self, url: str, visitors: int, dice: random.Random, namespace: str = "p") -> None:
        self.dice, self.made = dice, 0
        self.runner = asyncio.Runner()
        self.store = Store.open(url, namespace=namespace, retention_ms=10**9, timeout_ms=10_000)
        self.members, self.propensities = Members(self.store), Propensities(self.store)
        self.now_ms = time.time_ns() // 1_000_000 - 10**8
        self.defined = set(AUDIENCES)
        self.visitors = [self.new() for _ in range(visitors)]
        for one in self.visitors:
            self.write(one)
        self.define()

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def new(self) -> Visitor:
        self.made += 1
        name = f"visitor-{self.made}"
        own = {audience for audience in AUDIENCES if self.dice.random() < 0.7}
        return Visitor(name, f"{name}@example.com", self.dice.random() < 0.8, self.dice.choice(SEGMENTS), own)

    def write(self, one: Visitor) -> None:
        """Have the cache say of a visitor what is said here."""
        self.now_ms += 1
        hashes = [consent.identifier(self.now_ms, [form], identity.hashed(form, one.email)) for form in identity.EMAILS]
        said = consent.statement(self.now_ms, {"ads": one.allowed}, True)
        self.runner.run(self._write(one, b"".join([*hashes, said])))

    async def _write(self, one: Visitor, said: bytes) -> None:
        await Visitors(self.store).append_said({one.name: said}, time.time_ns() // 1_000_000)
        await self.propensities.move(MODEL, {one.name: one.segment}, self.now_ms)
        for audience in self.defined:
            entered = {one.name: self.now_ms} if audience in one.audiences else {}
            left = [] if entered else [one.name]
            await self.members.change(audience, entered, left, self.now_ms, "simulated")

    def define(self) -> None:
        definition = {"destinations": ["ours"], "purpose": "ads", "min_size": 1, "model": MODEL}
        for audience in self.defined:
            self.runner.run(self.members.describe(audience, json.dumps(definition), self.now_ms))

    def change(self, share: float) -> None:
        """Let some visitors change, leave, be erased and come; now and then an audience is deleted, or made again."""
        for place, one in enumerate(self.visitors):
            if self.dice.random() >= share:
                continue
            match self.dice.randrange(6):
                case 0:
                    one.allowed = not one.allowed
                case 1:
                    one.email = f"{one.name}.{self.dice.randrange(10**6)}@example.com"
                case 2:
                    one.segment = self.dice.choice(SEGMENTS)
                case 3:
                    one.audiences ^= {AUDIENCES[0]}
                case 4:
                    one.audiences ^= {AUDIENCES[1]}
                case 5:
                    self.runner.run(Persons(self.store).erase(one.name))
                    one = self.visitors[place] = self.new()
            self.write(one)
        if self.dice.random() < 0.1:
            self.redefine()

    def redefine(self) -> None:
        last = AUDIENCES[1]
        if last in self.defined:
            self.runner.run(self.members.drop(last))
            self.defined.discard(last)
        else:
            self.defined.add(last)
            for one in self.visitors:
                self.write(one)
            self.define()

    def lists(self) -> dict[str, dict[str, Any]]:
        """What the receiver should have, but for those whom it refuses."""
        return {
            audience: {
                one.key: one.sees
                for one in self.visitors
                if audience in one.audiences and audience in self.defined and one.allowed
            }
            for audience in AUDIENCES
        }


@dataclass
class Watch:
    """Counts the requests that the receiver tells of, and wakes who waits for one."""

    receiving: Receiving
    count: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.receiving.process.stdout
        try:
            for line in self.receiving.process.stdout:
                with self.changed:
                    self.count = int(line)
                    self.changed.notify_all()
        except ValueError:  # the pipe was closed
            return

    def wait(self, count: int, process: Forked) -> bool:
        """Until so many requests came; False where the process ended before."""
        with self.changed:
            while self.count < count:
                if process.poll() is not None:
                    return False
                self.changed.wait(0.02)
            return True


@dataclass
class Proof:
    """What was tried and what was seen."""

    world: World
    watch: Watch
    forks: Forks
    arguments: list[str]
    environment: dict[str, str]
    dice: random.Random
    kills: int = 0
    completed: int = 0
    members_sent: int = 0
    members_sent_again: int = 0
    killed_at: Counter[str] = field(default_factory=Counter)
    read: int = 0
    last: dict[tuple[str, str], tuple[bool, str, bool]] = field(default_factory=dict)

    def point(self) -> None:
        """Change the world, kill a run at a random point of its work, run again, and look."""
        while True:
            self.world.change(0.2)
            killed = self.run(kill_after=self.dice.randrange(6))
            self.look(killed)
            if killed:
                self.kills += 1
                break
            self.compare()
        if self.dice.random() < 0.5:  # whoever was in the batch that was cut off may be another by now
            self.world.change(0.2)
        while self.dice.random() < 0.2:  # sometimes what resumes is killed too
            self.look(self.run(kill_after=self.dice.randrange(4)))
        self.look(self.run())
        self.compare()

    def run(self, kill_after: int | None = None) -> bool:
        """Run the command, to its end or until so many requests and some milliseconds. Whether it was killed."""
        first = self.watch.count
        process = self.forks.start(self.arguments, self.environment)
        killed = False
        if kill_after is not None:
            reached = self.watch.wait(first + kill_after, process)
            # Without a request the moment is anywhere between starting up and the first of them.
            time.sleep(self.dice.uniform(0, 0.04 if kill_after else 0.3))
            killed = reached and process.poll() is None
            if killed:
                process.kill()
        said = process.wait(timeout=120)
        if killed and process.returncode == -signal.SIGKILL:
            self.killed_at[f"after {kill_after} requests"] += 1
            return True
        assert process.returncode in (0, 1), said
        self.completed += 1
        return False

    def look(self, killed: bool) -> None:
        """Check what the last run sent."""
        report = self.watch.receiving.report()
        assert report["violations"] == [], report["violations"]
        requests = report["requests"][self.read :]
        self.read = len(report["requests"])
        should = self.world.lists()
        for own, key in list(self.last):  # who was refused and is not wanted is forgotten, and may come again
            if key.startswith("f") and key not in should[own]:
                del self.last[own, key]
        for place, request in enumerate(requests):
            settled = not request["fault"] and not (killed and place == len(requests) - 1)
            audience, added = request["audience"], request["added"]
            for key, member in request["members"].items():
                assert not added or key in should[audience], f"{member} was sent and must not have been"
                content = json.dumps(member["identifiers"] | member["fields"] if added else {}, sort_keys=True)
                before = self.last.get((audience, key))
                again = before is not None and before[:2] == (added, content)
                assert not (again and before is not None and before[2]), f"{member} was sent again without need"
                self.members_sent += 1
                self.members_sent_again += again
                self.last[audience, key] = (added, content, settled)

    def compare(self) -> None:
        """The receiver has what it should, and forgets who is not wanted: they may come back as they were."""
        lists = self.watch.receiving.report()["lists"]
        for audience, should in self.world.lists().items():
            wanted = {key: member for key, member in should.items() if not key.startswith("f")}
            assert lists.get(audience, {}) == wanted, f"{audience} is not what it should be"
            for key in [key for own, key in self.last if own == audience and key not in should]:
                if self.last[audience, key][0]:
                    del self.last[audience, key]


def prove(
    forks: Forks, ledger: str | None, points: int, seed: int, visitors: int = 120, late_share: float = 0.0
) -> Proof:
    """Kill at so many points; `ledger` None is SQLite. Raises AssertionError where a promise was not kept."""
    dice = random.Random(seed)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="propensity-kills-")))
        server = embedded.start(directory / "cache")
        stack.callback(server.close)
        receiving = stack.enter_context(
            Receiving(most=BATCH, share=0.15, late_share=late_share, late_s=TIMEOUT_S + 1, seed=seed)
        )
        world = World(server.url, visitors, dice)
        stack.callback(world.close)
        options = {"url": receiving.url, "secret": "${HOOK}", "purpose": "ads", "members": BATCH}
        sending = {"first_wait_s": 0.01, "longest_wait_s": 0.05, "timeout_s": TIMEOUT_S}
        ours = {"kind": "webhook", "requests_per_minute": 100_000, **options, **sending}
        (directory / "destinations.yaml").write_text(yaml.safe_dump({"destinations": {"ours": ours}}))
        command = ["audiences", "sync", "--to", "ours", "--destinations", str(directory / "destinations.yaml")]
        address = ledger or f"sqlite:///{directory / 'ledger.db'}"
        environment = {"HOOK": SECRET, "PROPENSITY_REDIS_URL": server.url}
        watch = Watch(receiving)
        watch.start()
        proof = Proof(world, watch, forks, [*command, "--ledger", address], environment, dice)
        while proof.kills < points:
            proof.point()
        return proof


def main() -> None:
    """Print what was tried on both ledgers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    given = parser.parse_args()
    for name in ("sqlite", "postgresql"):
        if given.only not in (None, name):
            continue
        with ExitStack() as stack:
            out = stack.enter_context(tempfile.NamedTemporaryFile())
            forks = stack.enter_context(Forks(Path(out.name)))
            address = stack.enter_context(postgres()) if name == "postgresql" else None
            began = time.monotonic()
            proof = prove(forks, address, given.points, given.seed, late_share=0.01)
        print(
            f"{name}: killed at {proof.kills} points, {proof.completed} runs to the end, {proof.watch.count} requests, "
            f"{proof.members_sent:,} members sent, {proof.members_sent_again} of them again, each after an outcome "
            f"that was not known; {time.monotonic() - began:.0f} s"
        )
        print("  " + ", ".join(f"{number} {when}" for when, number in sorted(proof.killed_at.items())))


if __name__ == "__main__":
    main()
