"""The feature cache behind Sentinels: a master that dies, or is relieved, is followed to its replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest

from service.core import events
from service.errors import StoreError
from service.history import History, unfold
from service.persons import Persons
from service.store import Store
from service.visitors import Visitors
from tests.conftest import StartService, free_port, wait_until
from tests.service.conftest import RedisProcess, Watched

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000
KNOWN = History(events.pack(NOW_MS, 1, 7, 7, 2.5), events.pack(NOW_MS, events.TRAIT_NUMBER, 8, 0, 1.0))


def opened(url: str) -> Store:
    return Store.open(url, namespace="p", retention_ms=DAY_MS, timeout_ms=300)


@pytest.fixture
async def store(watched: Watched) -> AsyncIterator[Store]:
    found = opened(watched.url)
    yield found
    await found.close()


async def asked(store: Store, visitor_id: str) -> History:
    """What the hot path reads."""
    return unfold(*await store.ask([visitor_id]))


async def until_it_works(doing: Callable[[], object], timeout_s: float = 15) -> None:
    """Do something again and again until it is no StoreError, none of which may take long."""
    deadline = time.monotonic() + timeout_s
    while True:
        started = time.monotonic()
        try:
            await doing()  # type: ignore[misc]
            return
        except StoreError:
            assert time.monotonic() - started < 1
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_the_master_is_written_and_read(store: Store, watched: Watched) -> None:
    await Visitors(store).append({"a": KNOWN}, NOW_MS)
    assert await store.read(["a"]) == [KNOWN]
    assert await asked(store, "a") == KNOWN
    assert watched.master.run("EXISTS", *store.keys("a")) == 2
    where = await store.endpoint()
    assert (where.host, where.port, where.database) == ("127.0.0.1", watched.master.port, 0)


async def test_a_master_that_dies_is_followed_to_its_replica(store: Store, watched: Watched) -> None:
    await Visitors(store).append({"a": KNOWN}, NOW_MS)
    assert await asked(store, "a") == KNOWN
    wait_until(lambda: watched.replica.run("EXISTS", *store.keys("a")) == 2)
    watched.master.kill()
    with pytest.raises(StoreError):
        await Visitors(store).append({"a": KNOWN}, NOW_MS)
    await until_it_works(lambda: Visitors(store).append({"b": KNOWN}, NOW_MS))
    await until_it_works(lambda: asked(store, "b"))
    assert await store.read(["a", "b"]) == [KNOWN, KNOWN]
    assert await asked(store, "a") == KNOWN
    assert watched.replica.run("ROLE")[0] == b"master"


async def test_a_master_that_is_relieved_is_not_written_any_more(store: Store, watched: Watched) -> None:
    await Visitors(store).append({"a": KNOWN}, NOW_MS)
    assert await asked(store, "a") == KNOWN
    wait_until(lambda: watched.replica.run("EXISTS", *store.keys("a")) == 2)
    watched.fail_over()
    wait_until(lambda: watched.master.run("ROLE")[0] == b"slave")
    await until_it_works(lambda: Visitors(store).append({"b": KNOWN}, NOW_MS))
    await until_it_works(lambda: asked(store, "b"))
    assert await store.read(["a", "b"]) == [KNOWN, KNOWN]
    assert watched.replica.run("ROLE")[0] == b"master"


async def test_a_sentinel_that_is_gone_is_passed_over(watched: Watched) -> None:
    store = opened(watched.url.replace("127.0.0.1", f"127.0.0.1:{free_port()},127.0.0.1", 1))
    await Visitors(store).append({"a": KNOWN}, NOW_MS)
    assert await asked(store, "a") == KNOWN
    await store.close()


async def test_a_master_that_no_sentinel_knows_is_named(watched: Watched) -> None:
    store = opened(watched.url.replace("/shop/", "/shoppe/"))
    with pytest.raises(StoreError, match="no master named 'shoppe'"):
        await store.read(["a"])
    with pytest.raises(StoreError):
        await store.ask(["a"])
    await store.close()


@pytest.mark.alone
async def test_without_any_sentinel_it_is_a_store_error_in_time() -> None:
    store = opened(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/shop")
    started = time.monotonic()
    for asking in (
        store.read(["a"]),
        Visitors(store).append({"a": KNOWN}, NOW_MS),
        store.ask(["a"]),
        Persons(store).erase("a"),
    ):
        with pytest.raises(StoreError):
            await asking
    assert time.monotonic() - started < 1
    await store.close()


async def test_the_password_is_for_the_servers_and_for_sentinels_that_want_one(tmp_path: Path) -> None:
    watched = Watched(tmp_path, password="secret")
    try:
        store = opened(watched.url)
        await Visitors(store).append({"a": KNOWN}, NOW_MS)
        assert await asked(store, "a") == KNOWN
        await store.close()
        stranger = opened(watched.url.replace("secret", "wrong"))
        with pytest.raises(StoreError):
            await stranger.read(["a"])
        await stranger.close()
    finally:
        watched.kill()


async def test_a_sentinel_without_a_password_takes_one_url_with_servers_that_have_one(tmp_path: Path) -> None:
    master = RedisProcess(tmp_path, "--save", "", "--requirepass", "secret", password="secret")
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor shop 127.0.0.1 {master.port} 1\nsentinel auth-pass shop secret\n")
    sentinel = RedisProcess(tmp_path, str(config), "--sentinel")
    try:
        store = opened(f"redis+sentinel://:secret@127.0.0.1:{sentinel.port}/shop")
        await Visitors(store).append({"a": KNOWN}, NOW_MS)
        assert await store.read(["a"]) == [KNOWN]
        await store.close()
    finally:
        sentinel.kill()
        master.kill()


@pytest.mark.alone
def test_scores_return_to_normal_after_a_failover_without_a_restart(
    watched: Watched, start_service: StartService, artifacts: Path
) -> None:
    service = start_service(redis_url=watched.url, artifacts=artifacts, namespace="p", deadline_ms=100)
    service.wait_until_ready()
    with httpx2.Client(base_url=service.url, timeout=5) as client:
        event = {"event": "Product Viewed", "userId": "anna", "messageId": "1"}
        assert client.post("/v1/events", json=event).status_code == 200
        wait_until(lambda: watched.replica.run("DBSIZE") == watched.master.run("DBSIZE"))

        def score() -> tuple[int, list[str]]:
            for _ in range(3):  # a machine that is late once is not late every time
                started = time.monotonic()
                answer = client.post("/v1/score", json={"visitor_id": "anna"})
                assert answer.status_code == 200
                if time.monotonic() - started < 0.5:
                    body = answer.json()
                    return body["events"], body["degraded"]
            pytest.fail("three answers came too late")

        assert score() == (1, [])
        watched.master.kill()
        assert score() == (0, ["store"])
        wait_until(lambda: score() == (1, []))
        assert watched.replica.run("ROLE")[0] == b"master"
        wait_until(lambda: client.post("/v1/events", json={**event, "messageId": "2"}).status_code == 200)
        assert score() == (2, [])
