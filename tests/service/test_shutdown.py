"""The end of the service: told early, refused late, and without losing a request."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

import pytest

from service.app import open_store
from service.embedded import EmbeddedServer
from tests.conftest import MakeSettings, ServiceProcess, StartService, wait_until
from tests.service.callers import EVENT, Callers, ask, get, post, read

DELAY_S = 0.4
pytestmark = pytest.mark.anyio


@pytest.fixture
def start(start_service: StartService, embedded_server: EmbeddedServer, artifacts: object) -> StartService:
    """A function that starts a service over the embedded feature cache and returns when all of it serves."""

    def started(workers: int = 1, **settings: object) -> ServiceProcess:
        service = start_service(redis_url=embedded_server.url, artifacts=artifacts, workers=workers, **settings)
        begun = f"{workers} workers serve" if workers > 1 else "Uvicorn running"
        wait_until(lambda: begun in service.log.read_text() or service.process.poll() is not None, 60)
        return service

    return started


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.alone
@pytest.mark.parametrize("workers", [1, 2])
async def test_under_load_sigterm_loses_no_request_and_no_event(
    start: StartService, make_settings: MakeSettings, embedded_server: EmbeddedServer, workers: int
) -> None:
    settings = make_settings(redis_url=embedded_server.url)
    service = start(workers=workers, namespace=settings.namespace, shutdown_delay_ms=int(DELAY_S * 1000))
    callers = Callers(service.port)
    calling = asyncio.create_task(callers.call())
    await asyncio.sleep(1)
    before = callers.statuses.total()
    service.process.send_signal(signal.SIGTERM)
    told_at = time.monotonic()
    await asyncio.sleep(0.1)
    ready, live = await ask(service.port, get("/readyz")), await ask(service.port, get("/livez"))
    assert (ready.status, ready.is_last, live.status) == (503, True, 200)
    assert b"draining" in ready.body
    await calling
    assert await asyncio.to_thread(service.process.wait, 20) == 0, service.log.read_text()
    assert callers.lost == []
    assert set(callers.statuses) == {200}
    assert callers.statuses.total() > before > 100
    assert min(callers.refused_at) >= told_at + DELAY_S
    async with open_store(settings, 86_400_000) as store:
        histories = await store.read(list(callers.acknowledged))
    stored = {
        visitor: len(history.events) // 24 for visitor, history in zip(callers.acknowledged, histories, strict=True)
    }
    assert stored == dict(callers.acknowledged)


async def test_who_has_begun_a_request_can_end_it_after_connections_are_refused(start: StartService) -> None:
    service = start(shutdown_delay_ms=0)
    requests = [
        post("/v1/events", {**EVENT, "userId": "slow"}),
        post("/v1/score/batch", {"visitors": [{"visitor_id": "slow"}]}),
        post("/v1/score", {"visitor_id": "slow"}),
    ]
    begun = [await asyncio.open_connection("127.0.0.1", service.port) for _ in requests]
    for request, (_, writer) in zip(requests, begun, strict=True):
        writer.write(request[:-5])
    await asyncio.sleep(0.1)
    service.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(wait_until, lambda: refuses(service.port))
    for request, (reader, writer) in zip(requests, begun, strict=True):
        writer.write(request[-5:])
        answer = await read(reader)
        assert (answer.status, answer.is_last) == (200, True)
        assert await reader.read() == b""
        writer.close()
    assert await asyncio.to_thread(service.process.wait, 20) == 0


async def test_who_never_ends_a_request_is_waited_for_as_long_as_the_setting_says(start: StartService) -> None:
    service = start(workers=2, shutdown_delay_ms=0, shutdown_timeout_s=1)
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/events", EVENT)[:-5])
    await asyncio.sleep(0.1)
    told_at = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 20) == 0
    assert 1 <= time.monotonic() - told_at < 8  # not the ten seconds of the default
    assert "is killed" not in service.log.read_text()
    writer.close()


async def test_ctrl_c_waits_for_no_load_balancer_and_twice_for_nobody(start: StartService) -> None:
    service = start(shutdown_delay_ms=60_000, shutdown_timeout_s=60)
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/events", EVENT)[:-5])
    await asyncio.sleep(0.1)
    service.process.send_signal(signal.SIGINT)
    await asyncio.to_thread(wait_until, lambda: refuses(service.port), 5)
    assert service.process.poll() is None
    service.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(service.process.wait, 5) == 0
    writer.close()


async def test_sigterm_twice_is_as_good_as_once_and_ctrl_c_cuts_the_delay_short(start: StartService) -> None:
    service = start(shutdown_delay_ms=60_000)
    for _ in range(2):
        service.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert (await ask(service.port, get("/livez"))).status == 200
    service.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(service.process.wait, 5) == 0
