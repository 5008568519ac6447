"""Served scores arrive in the stream, and never hold anything up."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator

import httpx2
import pytest
import redis

from service import metrics
from service.score_log import ENTRY_SCORES, ScoreLog
from service.store import Store
from tests.conftest import DAY_MS, RedisServer, ServiceProcess, StartService, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def namespace() -> str:
    return f"log-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(store_url: str, namespace: str) -> AsyncIterator[Store]:
    opened = Store.open(store_url, namespace=namespace, retention_ms=DAY_MS)
    yield opened
    await opened.close()


def count(outcome: str) -> float:
    value: float = metrics.score_log(outcome)._value.get()
    return value


def lines(url: str, namespace: str) -> list[bytes]:
    with redis.Redis.from_url(url) as client:
        entries = client.xrange(f"{namespace}:scores")
    return [line for _, fields in entries for line in fields[b"scores"].split(b"\n")]


async def test_scores_arrive_in_order_and_many_share_an_entry(store: Store, store_url: str, namespace: str) -> None:
    log, written = ScoreLog(store, length=1000, buffer=10_000), count("written")
    for number in range(1234):
        log.add(b"%d" % number)
    await log.close()
    assert lines(store_url, namespace) == [b"%d" % number for number in range(1234)]
    with redis.Redis.from_url(store_url) as client:
        assert client.xlen(f"{namespace}:scores") == -(-1234 // ENTRY_SCORES)
        assert 0 < client.pttl(f"{namespace}:scores") <= DAY_MS
    assert count("written") - written == 1234


async def test_they_are_written_without_being_closed(store: Store, store_url: str, namespace: str) -> None:
    log = ScoreLog(store, length=1000, buffer=10_000)
    for number in range(3):
        log.add(b"%d" % number)
        for _ in range(100):
            if len(lines(store_url, namespace)) > number:
                break
            await asyncio.sleep(0.02)
        assert lines(store_url, namespace)[-1] == b"%d" % number
    await log.close()


async def test_the_stream_has_a_length(store: Store, store_url: str, namespace: str) -> None:
    log = ScoreLog(store, length=5, buffer=100_000)
    for number in range(50_000):
        log.add(b'{"number":%d,"padding":"%b"}' % (number, b"x" * 50))
    await log.close()
    kept = lines(store_url, namespace)
    assert len(kept) <= 2 * 5 * ENTRY_SCORES
    assert json.loads(kept[-1])["number"] == 49_999


async def test_what_does_not_fit_is_dropped_and_counted_and_the_rest_arrives_later(
    own_redis_server: RedisServer,
) -> None:
    store = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS, timeout_ms=100)
    log, dropped, written = ScoreLog(store, length=1000, buffer=10), count("dropped"), count("written")
    own_redis_server.kill()
    for number in range(25):
        log.add(b"%d" % number)
    await asyncio.sleep(0.3)
    assert count("dropped") - dropped == 15
    own_redis_server.start()
    for _ in range(150):
        if count("written") - written == 10:
            break
        await asyncio.sleep(0.02)
    assert lines(own_redis_server.url, "p") == [b"%d" % number for number in range(10)]
    await log.close()
    await store.close()


async def test_a_log_of_no_length_keeps_nothing(store: Store, store_url: str, namespace: str) -> None:
    log, before = ScoreLog(store, length=0, buffer=10), (count("written"), count("dropped"))
    for _ in range(100):
        log.add(b"x")
    await log.close()
    assert lines(store_url, namespace) == []
    assert (count("written"), count("dropped")) == before


async def test_every_served_score_is_in_the_stream_until_its_visitor_is_erased(
    start_service: StartService, artifacts: str, own_redis_server: RedisServer
) -> None:
    service: ServiceProcess = start_service(redis_url=own_redis_server.url, artifacts=artifacts, namespace="shop")
    service.wait_until_ready()
    plain = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "ä"})
    routed = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "b", "context": {"x": [1]}})
    batch = httpx2.post(f"{service.url}/v1/score/batch", json={"visitors": [{"visitor_id": "ä"}, {"visitor_id": "c"}]})
    served = [plain.json(), routed.json(), *batch.json()["results"]]
    wait_until(lambda: len(lines(own_redis_server.url, "shop")) == 4)
    assert [json.loads(line) for line in lines(own_redis_server.url, "shop")] == served
    assert httpx2.delete(f"{service.url}/v1/visitors/ä").status_code in (200, 204)
    left = [json.loads(line)["visitor_id"] for line in lines(own_redis_server.url, "shop")]
    assert sorted(left) == ["b", "c"]
