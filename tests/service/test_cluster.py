"""The feature cache on three servers of a Redis Cluster: who has which visitor, and what happens when one is gone."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.history import mark_replayed, replayed
from service.core import events
from service.errors import StoreError
from service.history import History, unfold
from service.persons import Persons
from service.servers import UNREAD, owners_from, slot_of
from service.store import Store
from service.streams import Quarantine, Quarantined, ScoreStream
from service.visitors import Visitors
from service.workers.compaction import Compactor
from tests.conftest import RedisServer, StartService, free_port, wait_until
from tests.service.conftest import Cluster, RedisProcess
from tests.service.histories import NOW_MS, some

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

DAY_MS = 86_400_000
VISITORS = [f"visitor-{place}" for place in range(60)]


def known(place: int) -> History:
    """What the tests keep of the visitor at a place: as many events as its place, and a trait."""
    return History(some(1 + place, seed=place), events.pack(NOW_MS, events.TRAIT_NUMBER, 8, 0, float(place)))


KNOWN = {visitor: known(place) for place, visitor in enumerate(VISITORS)}


def opened(cluster: Cluster, namespace: str = "p") -> Store:
    return Store.open(cluster.url, namespace=namespace, retention_ms=DAY_MS, timeout_ms=500)


@pytest.fixture
async def store(broken_cluster: Cluster) -> AsyncIterator[Store]:
    """A store on a cluster that the test changes."""
    found = opened(broken_cluster)
    yield found
    await found.close()


@pytest.fixture
async def shared(cluster: Cluster) -> AsyncIterator[Store]:
    """A store of its own on a cluster that stays as it is."""
    found = opened(cluster, f"cluster-{uuid.uuid4().hex[:12]}")
    yield found
    await found.close()


def visitors_of(cluster: Cluster, store: Store, node: RedisProcess) -> list[str]:
    return [visitor for visitor in VISITORS if cluster.owner_of(store.keys(visitor)[0]) is node]


def count_keys(node: RedisProcess, store: Store) -> int:
    """How many visitors' keys a server has of a store."""
    prefix = store.keys("")[0].removesuffix("e:{}")
    return len(node.run("KEYS", f"{prefix}[et]:*"))


async def asked(store: Store, visitor_ids: list[str], within_s: float = 1) -> dict[str, History | None]:
    """What the hot path reads, None where a server did not answer."""
    async with asyncio.timeout(within_s):
        values = await store.ask(visitor_ids)
    pairs = zip(visitor_ids, values[::2], values[1::2], strict=True)
    return {visitor: None if UNREAD in pair else unfold(*pair) for visitor, *pair in pairs}


# --- slots ---


@pytest.mark.parametrize("key", ["p:e:{a}", "p:t:{a}", "", "{}", "p:e:{}", "a}{b}", "{a", "é{ü}", "{{a}}", "x" * 300])
def test_a_slot_is_the_one_that_the_server_says(cluster: Cluster, key: str) -> None:
    assert slot_of(key) == cluster.nodes[0].run("CLUSTER", "KEYSLOT", key)


def test_owners_are_read_from_the_table_of_slots() -> None:
    table = [[0, 1, [b"h1", 1, b"id", []], [b"replica", 9, b"id", []]], [3, 16383, [b"", 2, b"id", []]]]
    owners = owners_from(table, ("asked", 7))
    assert (len(owners), owners[:4], owners[-1]) == (16384, [("h1", 1), ("h1", 1), None, ("asked", 2)], ("asked", 2))


# --- a healthy cluster ---


async def test_visitors_are_spread_over_all_servers_and_read_in_order(shared: Store, cluster: Cluster) -> None:
    assert await Visitors(shared).append(KNOWN, NOW_MS) == {}
    sizes = [count_keys(node, shared) for node in cluster.nodes]
    assert sum(sizes) == 2 * len(VISITORS)
    assert min(sizes) > 10
    assert await shared.read([*VISITORS, "nobody"]) == [*KNOWN.values(), History()]
    assert await asked(shared, [*VISITORS, "nobody", ""]) == {**KNOWN, "nobody": History(), "": History()}


async def test_everything_else_works_over_all_servers(store: Store, broken_cluster: Cluster) -> None:
    await Visitors(store).append(KNOWN, NOW_MS)
    await store.ping()
    sample = await Visitors(store).sample(300)
    assert set(sample) <= set(VISITORS)
    assert len({broken_cluster.owner_of(store.keys(visitor)[0]).port for visitor in sample}) == 3
    await Quarantine(store).add([Quarantined("type", "no such type", NOW_MS, ("visitor-1",), "{}")], 10)
    await ScoreStream(store).add([b'{"score_id":"1","visitor_id":"visitor-1",}'], 10)
    await mark_replayed(store, "mark", 3)
    assert await replayed(store, "mark") == {3}
    assert await Visitors(store).append_missing(KNOWN, NOW_MS) == 0
    assert await Persons(store).erase("visitor-1")
    assert not await Persons(store).erase("visitor-1")
    assert await Quarantine(store).latest() == []
    assert await store.read(["visitor-1", "visitor-2"]) == [History(), KNOWN["visitor-2"]]


async def test_compaction_visits_every_server(shared: Store, cluster: Cluster) -> None:
    for _ in range(3):
        await Visitors(shared).append(KNOWN, NOW_MS)
    stored_anew = [page.stored_anew async for page in Compactor(shared).pages(10, 0, lambda: NOW_MS)]
    assert sum(stored_anew) == len(VISITORS)
    assert sum(count_keys(node, shared) for node in cluster.nodes) == len(VISITORS)
    assert await shared.read(VISITORS) == list(KNOWN.values())


async def test_one_server_of_the_url_is_enough(cluster: Cluster) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.nodes[1].port}"
    store = Store.open(url, namespace=f"cluster-{uuid.uuid4().hex[:12]}", retention_ms=DAY_MS)
    await Visitors(store).append(KNOWN, NOW_MS)
    assert await store.read(VISITORS) == list(KNOWN.values())
    await store.close()


async def test_a_server_that_is_of_no_cluster_is_named_as_the_mistake(own_redis_server: RedisServer) -> None:
    store = Store.open(f"redis+cluster://127.0.0.1:{own_redis_server.port}", namespace="p", retention_ms=DAY_MS)
    with pytest.raises(StoreError, match="of no cluster .*correct the URL"):
        await store.read(["a"])
    await store.close()


@pytest.mark.alone
async def test_without_any_server_it_is_a_store_error_in_time() -> None:
    store = Store.open(f"redis+cluster://127.0.0.1:{free_port()}", namespace="p", retention_ms=DAY_MS)
    started = time.monotonic()
    for asking in (
        store.read(["a"]),
        Visitors(store).append({"a": known(1)}, NOW_MS),
        store.ask(["a"]),
        Persons(store).erase("a"),
    ):
        with pytest.raises(StoreError):
            await asking
    assert time.monotonic() - started < 1
    await store.close()


# --- slots that move ---


class Move:
    """A slot on its way from its server to another one."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self.cluster, self.slot = cluster, slot_of(key)
        self.source = cluster.owner_of(key)
        self.target = next(node for node in cluster.nodes if node is not self.source)
        ids = {node.port: node.run("CLUSTER", "MYID").decode() for node in (self.source, self.target)}
        self.target_id = ids[self.target.port]
        self.target.run("CLUSTER", "SETSLOT", self.slot, "IMPORTING", ids[self.source.port])
        self.source.run("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self.target_id)

    def take(self, *keys: str) -> None:
        """Move some keys."""
        self.source.run("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *keys)

    def finish(self) -> None:
        """Give the slot, which has no keys here any more, away."""
        for node in (self.target, self.source, *self.cluster.nodes):
            node.run("CLUSTER", "SETSLOT", self.slot, "NODE", self.target_id)


async def test_a_visitor_whose_slot_moves_is_read_and_written_all_the_while(
    store: Store, broken_cluster: Cluster
) -> None:
    visitor = "visitor-7"
    events_key, traits_key = store.keys(visitor)
    await Visitors(store).append({visitor: History(some(1))}, NOW_MS)
    await store.read(VISITORS)  # the servers are known
    move = Move(broken_cluster, events_key)
    held = some(1)

    async def write_and_read(number: int) -> None:
        nonlocal held
        added = some(1, NOW_MS + number, seed=number)
        await Visitors(store).append({visitor: History(added)}, NOW_MS)
        held += added
        assert await store.read([visitor]) == [History(held)]
        assert await asked(store, [visitor]) == {visitor: History(held)}

    await write_and_read(1)  # the events are still there, the traits are nowhere
    move.take(events_key)
    await write_and_read(2)  # ASK
    trait = known(5).traits
    await Visitors(store).append({visitor: History(b"", trait)}, NOW_MS)
    assert await store.read([visitor]) == [History(held, trait)]
    move.finish()
    assert await store.read([visitor]) == [History(held, trait)]  # MOVED
    added = some(1, NOW_MS + 3, seed=3)
    await Visitors(store).append({visitor: History(added)}, NOW_MS)
    assert await asked(store, [visitor]) == {visitor: History(held + added, trait)}
    assert broken_cluster.owner_of(events_key) is move.target


async def test_nothing_acknowledged_is_lost_while_slots_move_under_load(store: Store, broken_cluster: Cluster) -> None:
    await Visitors(store).append(KNOWN, NOW_MS)
    held = {visitor: [history.events] for visitor, history in KNOWN.items()}
    moving = True

    async def write(first: int) -> None:
        number = 0
        while moving or number < 20:
            number += 1
            for visitor in VISITORS[first::4]:
                added = some(1, NOW_MS + 1000 * number, seed=number)
                await Visitors(store).append({visitor: History(added)}, NOW_MS)
                held[visitor].append(added)

    async def move_slots() -> None:
        nonlocal moving
        for visitor in VISITORS[:20]:
            keys = store.keys(visitor)
            move = await asyncio.to_thread(Move, broken_cluster, keys[0])
            await asyncio.sleep(0.01)
            await asyncio.to_thread(move.take, *keys)
            await asyncio.to_thread(move.finish)
        moving = False

    await asyncio.gather(*(write(first) for first in range(4)), move_slots())
    found = dict(zip(VISITORS, await store.read(VISITORS), strict=True))
    assert {visitor: history.events for visitor, history in found.items()} == {
        visitor: b"".join(parts) for visitor, parts in held.items()
    }


# --- servers that die ---


@pytest.mark.alone
async def test_one_dead_server_takes_its_visitors_alone(store: Store, broken_cluster: Cluster) -> None:
    await Visitors(store).append(KNOWN, NOW_MS)
    dead = broken_cluster.nodes[0]
    lost = visitors_of(broken_cluster, store, dead)
    dead.kill()
    for _ in range(20):
        found = await asked(store, VISITORS, within_s=0.2)
        assert {visitor for visitor in VISITORS if found[visitor] is None} == set(lost)
        assert all(found[visitor] in (None, KNOWN[visitor]) for visitor in VISITORS)
    with pytest.raises(StoreError):
        await store.read(VISITORS)
    with pytest.raises(StoreError):
        await Visitors(store).append({lost[0]: known(1)}, NOW_MS)
    kept = next(visitor for visitor in VISITORS if visitor not in lost)
    await Visitors(store).append({kept: History(some(1, NOW_MS + 5000, seed=99))}, NOW_MS)
    dead.start()
    wait_until(broken_cluster.is_whole)
    started = time.monotonic()
    while None in (await asked(store, VISITORS)).values():
        assert time.monotonic() - started < 2
        await asyncio.sleep(0.02)


@pytest.mark.alone
async def test_one_hanging_server_holds_the_others_up_once(store: Store, broken_cluster: Cluster) -> None:
    await Visitors(store).append(KNOWN, NOW_MS)
    await asked(store, VISITORS)
    hanging = broken_cluster.nodes[1]
    lost = visitors_of(broken_cluster, store, hanging)
    hanging.pause()
    with pytest.raises(TimeoutError):
        await asked(store, VISITORS, within_s=0.05)
    for _ in range(60):
        found = await asked(store, VISITORS, within_s=0.05)
        assert {visitor for visitor in VISITORS if found[visitor] is None} == set(lost)
        await asyncio.sleep(0.02)
    hanging.resume()
    started = time.monotonic()
    while None in (await asked(store, VISITORS)).values():
        assert time.monotonic() - started < 2
        await asyncio.sleep(0.02)
    assert await store.read(VISITORS) == list(KNOWN.values())


async def test_a_replica_that_takes_over_is_followed(own_cluster: Cluster) -> None:
    store = opened(own_cluster)
    replica, master = own_cluster.add_node(), own_cluster.nodes[0]
    own_cluster.meet(own_cluster.nodes)
    replica.run("CLUSTER", "REPLICATE", master.run("CLUSTER", "MYID").decode())
    await Visitors(store).append(KNOWN, NOW_MS)
    wait_until(lambda: replica.run("DBSIZE") == master.run("DBSIZE") > 0)
    master.kill()
    started = time.monotonic()
    while (await asked(store, VISITORS)) != KNOWN:
        assert time.monotonic() - started < 15
        await asyncio.sleep(0.05)
    await Visitors(store).append({visitor: History(some(1, NOW_MS + 9000, seed=9)) for visitor in VISITORS}, NOW_MS)
    assert replica.run("ROLE")[0] == b"master"
    await store.close()


async def test_a_cluster_that_died_as_a_whole_is_a_store_error(own_cluster: Cluster) -> None:
    store = opened(own_cluster)
    await Visitors(store).append(KNOWN, NOW_MS)
    own_cluster.kill()
    with pytest.raises(StoreError):
        await store.ask(VISITORS)
    with pytest.raises(StoreError):
        await store.read(VISITORS[:1])
    await store.close()


# --- the service ---


@pytest.fixture
def client(broken_cluster: Cluster, start_service: StartService, artifacts: Path) -> Iterator[httpx2.Client]:
    """A running service over a cluster, which has seen an event of each visitor."""
    service = start_service(redis_url=broken_cluster.url, artifacts=artifacts, namespace="p", deadline_ms=100)
    service.wait_until_ready()
    with httpx2.Client(base_url=service.url, timeout=5) as client:
        batch = [{"event": "Product Viewed", "userId": visitor, "messageId": "1"} for visitor in VISITORS]
        answer = client.post("/v1/events", json={"batch": batch})
        assert (answer.status_code, answer.json()["accepted"]) == (200, len(VISITORS))
        yield client


def score(client: httpx2.Client, visitor: str) -> Mapping[str, Any]:
    """The answer to one request, which comes in time; a machine that is late once is not late every time."""
    for _ in range(3):
        started = time.monotonic()
        answer = client.post("/v1/score", json={"visitor_id": visitor})
        assert answer.status_code == 200
        if time.monotonic() - started < 0.5:
            found: Mapping[str, Any] = answer.json()
            return found
    pytest.fail("three answers came too late")


@pytest.mark.alone
def test_the_service_takes_events_and_scores_visitors_of_all_servers(
    client: httpx2.Client, broken_cluster: Cluster
) -> None:
    assert min(node.run("DBSIZE") for node in broken_cluster.nodes) > 5
    assert [(told["events"], told["degraded"]) for told in (score(client, one) for one in VISITORS)] == [(1, [])] * 60
    batch = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": one} for one in VISITORS]}).json()
    assert [told["events"] for told in batch["results"]] == [1] * 60
    assert client.delete("/v1/visitors/visitor-1").status_code == 204
    assert score(client, "visitor-1")["events"] == 0


@pytest.mark.alone
def test_visitors_of_a_dead_server_are_degraded_and_the_others_keep_their_history(
    client: httpx2.Client, broken_cluster: Cluster
) -> None:
    dead = broken_cluster.nodes[2]
    lost = {visitor for visitor in VISITORS if broken_cluster.owner_of(f"p:e:{{{visitor}}}") is dead}
    dead.kill()
    for _ in range(5):
        for visitor in VISITORS:
            told = score(client, visitor)
            assert (told["events"], told["degraded"]) == ((0, ["store"]) if visitor in lost else (1, []))
    batch = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": one} for one in VISITORS]}).json()
    assert [told["degraded"] for told in batch["results"]] == [["store"] if one in lost else [] for one in VISITORS]
    event = {"event": "Product Viewed", "messageId": "2"}
    for visitor in VISITORS[:10]:
        answer = client.post("/v1/events", json={**event, "userId": visitor})
        assert answer.status_code == (503 if visitor in lost else 200)
    dead.start()
    wait_until(broken_cluster.is_whole)
    started = time.monotonic()
    while any(score(client, visitor)["degraded"] for visitor in VISITORS):
        assert time.monotonic() - started < 2
