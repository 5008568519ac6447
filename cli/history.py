"""Replay: the history in files, put into the feature cache as the same records that live events leave there."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cli.progress import Report
from service import door as doors
from service import ingest
from service.app import open_store
from service.core.spec import FeatureSpec
from service.door import Door
from service.history import History
from service.ingest import Accepted, Refused
from service.joining import Login
from service.persons import Persons
from service.settings import Settings
from service.shards import Cache
from service.store import Store
from service.visitors import Visitors

if TYPE_CHECKING:  # the serving image has no training side, and asks `some_visitor` all the same
    from training.partition import Partition
    from training.source import EventLog

VISITORS_AT_ONCE: Final = 500
EVENTS_AT_ONCE: Final = 1000
JOINS_AT_ONCE: Final = 50

Item = TypeVar("Item")


@dataclass
class Loaded:
    """What a replay did: visitors looked at and records that were not there before."""

    visitors: int = 0
    added: int = 0
    joined: int = 0  # anonymous visitors, into whom they logged in as
    said: int = 0  # events that said something of a person: an address, a number, a consent


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items, so many at a time."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def _store(settings: Settings, history_ms: int) -> AbstractAsyncContextManager[Store]:
    """The feature cache of the service with the same settings; a page of visitors may take it ten seconds."""
    return open_store(settings.model_copy(update={"redis_timeout_ms": 10_000}), history_ms)


async def replay_events(
    paths: Sequence[str], spec_path: Path, settings: Settings, max_bad_rows: int, memory_limit: str, report: Report
) -> Loaded:
    """Load event files. What an interrupted replay of the same files had finished is skipped."""
    from training import source, specfile, statements
    from training.partition import NEVER

    spec = specfile.load(spec_path)
    loaded = Loaded()
    with tempfile.TemporaryDirectory(prefix="propensity-") as workdir:
        log = source.read(
            paths,
            spec,
            Path(workdir),
            max_bad_rows=max_bad_rows,
            memory_limit=memory_limit,
            on_progress=lambda share: report("Reading events", share),
        )
        async with _store(settings, spec.limits.history) as store:
            mark = _mark(log)
            done = await replayed(store, mark)
            for index in range(log.partitions):
                if index not in done:
                    partition = log.partition(index, with_ids=True)
                    await _load(partition.at(NEVER - 1), store, loaded)
                    await mark_replayed(store, mark, index)
                report("Loading visitors", (index + 1) / log.partitions)
            persons = _mark(log, repr((settings.phone_region, settings.consent_categories, spec.source)))
            if not await replayed(store, persons):
                report("Joining and identifying", 0)
                await _join(log, store, loaded)
                await _say(statements.read(log.connection, paths, spec), spec, settings, store, loaded)
                await mark_replayed(store, persons, 0)
    return loaded


async def _join(log: EventLog, store: Store, loaded: Loaded) -> None:
    """Join anonymous visitors, whose history was loaded as that of whom they belong to."""
    from training import joins

    for logins in joins.logins(log.connection, log.directory):
        by_visitor = {name: list(some) for name, some in groupby(logins, lambda login: login.anonymous)}
        loaded.joined += len(by_visitor)
        for some in batched(by_visitor.items(), JOINS_AT_ONCE):
            now_ms = time.time_ns() // 1_000_000
            said = ([(name, Login(one.ts_ms, one.known)) for one in logins_of] for name, logins_of in some)
            await asyncio.gather(*(Persons(store).join(one, now_ms) for one in said))


async def _say(
    sent: Iterable[dict[str, Any]], spec: FeatureSpec, settings: Settings, store: Store, loaded: Loaded
) -> None:
    """Keep what events say of persons, as `POST /v1/events` does. Events that are refused were counted as bad rows."""
    door, catalogue = Door.of(settings.phone_region, settings.consent_categories), ingest.catalogue([spec])
    for some in batched(sent, EVENTS_AT_ONCE):
        now_ms = time.time_ns() // 1_000_000
        additions: dict[str, bytes] = {}
        for event in some:
            outcome = ingest.parse(catalogue, event, now_ms)
            if isinstance(outcome, Refused) or event.get("timestamp") is None or not doors.speaks(event):
                continue
            told = doors.take(door, event, outcome, now_ms, lambda what, became: None)
            if isinstance(told, Accepted) and told.said:
                additions[told.visitor_id] = additions.get(told.visitor_id, b"") + told.said
                loaded.said += 1
        if additions:
            await Visitors(store).append_said(additions, now_ms)


async def _load(partition: Partition, store: Store, loaded: Loaded) -> None:
    ids = partition.visitor_ids or []
    for first in range(0, len(ids), VISITORS_AT_ONCE):
        additions: dict[str, History] = {}
        for place in range(first, min(first + VISITORS_AT_ONCE, len(ids))):
            begin, end = partition.starts[place], partition.starts[place + 1]
            trait_begin, trait_end = partition.trait_starts[place], partition.trait_starts[place + 1]
            additions[ids[place]] = History(
                partition.records[begin:end].tobytes(), partition.traits[trait_begin:trait_end].tobytes()
            )
        await _add(store, additions, loaded)


async def _add(store: Store, additions: Mapping[str, History], loaded: Loaded) -> None:
    loaded.added += await Visitors(store).append_missing(additions, time.time_ns() // 1_000_000)
    loaded.visitors += len(additions)


async def replay_table(path: str, spec_path: Path, settings: Settings, max_bad_rows: int, report: Report) -> Loaded:
    """Load the traits of a table, one or more rows a visitor."""
    from training import specfile, table

    spec = specfile.load(spec_path)
    loaded = Loaded()
    report("Loading visitors", 0)
    read = table.Table(path, spec)
    async with _store(settings, spec.limits.history) as store:
        for chunk in read.chunks(labelled=False):
            for first in range(0, len(chunk.visitor_ids), VISITORS_AT_ONCE):
                traits: dict[str, bytes] = {}
                for row in range(first, min(first + VISITORS_AT_ONCE, len(chunk.visitor_ids))):
                    known = chunk.traits[chunk.trait_starts[row] : chunk.trait_starts[row + 1]].tobytes()
                    traits[chunk.visitor_ids[row]] = traits.get(chunk.visitor_ids[row], b"") + known
                await _add(store, {visitor: History(b"", known) for visitor, known in traits.items()}, loaded)
    read.bad(max_bad_rows, labelled=False)
    return loaded


def _mark(log: EventLog, *also: str) -> str:
    """Names this replay: the same rows, read by the same spec into the same partitions."""
    parts = (log.summary.fingerprint, log.spec.hash, str(log.partitions), importlib.metadata.version("duckdb"), *also)
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


async def replayed(cache: Cache, mark: str) -> set[int]:
    """Parts of the replay named `mark` that are in the feature cache already."""
    (parts,) = await cache.run(("SMEMBERS", f"{cache.namespace}:replay:{mark}"))
    return {int(part) for part in parts}


async def mark_replayed(cache: Cache, mark: str, part: int) -> None:
    """Remember, for as long as visitors are kept, that a part of a replay is there."""
    key = f"{cache.namespace}:replay:{mark}"
    await cache.run(("SADD", key, part), ("PEXPIRE", key, cache.retention_ms))


async def some_visitor(settings: Settings) -> str | None:
    """The visitor with the latest event of a few that the feature cache picks at random; None from an empty one."""
    from service.core import events

    async with _store(settings, 0) as store:
        ids = await Visitors(store).sample(50)
        histories = await store.read(ids)
    latest = [int(events.from_bytes(known.events)["ts_ms"].max(initial=0)) for known in histories]
    return max(zip(latest, ids, strict=True))[1] if ids else None
