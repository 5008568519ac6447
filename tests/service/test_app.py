"""The service as a process: it starts, serves, and ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx2
import pytest
import redis
from fastapi.testclient import TestClient

from service import embedded, metrics
from service.app import create_app
from tests.conftest import MakeSettings, ServiceProcess, StartService, free_port, wait_until

EVENT = {"event": "Product Viewed", "userId": "a", "messageId": "1"}


def is_there(data: Path) -> bool:
    return bool(embedded._ask(data / "valkey.sock", b"PING"))


def count_events(service: ServiceProcess) -> int:
    count: int = httpx2.post(f"{service.url}/v1/score", json={"visitor_id": "a"}).json()["events"]
    return count


def test_what_was_acknowledged_is_there_after_the_service_was_killed(
    tmp_path: Path, artifacts: Path, start_service: StartService
) -> None:
    data = tmp_path / "data"
    service = start_service(artifacts=artifacts, data_dir=data, shutdown_delay_ms=0)
    service.wait_until_ready()
    assert httpx2.post(f"{service.url}/v1/events", json=EVENT).status_code == 200
    service.end(signal.SIGKILL)
    wait_until(lambda: not is_there(data))
    again = start_service(artifacts=artifacts, data_dir=data, shutdown_delay_ms=0)
    again.wait_until_ready()
    assert count_events(again) == 1
    assert again.end() == 0, again.log.read_text()
    assert not is_there(data)
    assert "Traceback" not in again.log.read_text()


@pytest.mark.alone
def test_the_embedded_server_is_there_again_when_it_was_killed_and_scores_are_whole(
    tmp_path: Path, artifacts: Path, start_service: StartService
) -> None:
    data = tmp_path / "data"
    service = start_service(artifacts=artifacts, data_dir=data, deadline_ms=100, shutdown_delay_ms=0)
    service.wait_until_ready()
    assert httpx2.post(f"{service.url}/v1/events", json=EVENT).status_code == 200
    with redis.Redis(unix_socket_path=str(data / "valkey.sock"), protocol=2) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
    asked = {"visitor_id": "a"}
    with httpx2.Client(base_url=service.url) as client:
        wait_until(lambda: client.post("/v1/score", json=asked).json()["degraded"] == ["store"], 2)
        wait_until(lambda: client.post("/v1/score", json=asked).json()["degraded"] == [], 3)
    assert count_events(service) == 1
    assert service.end() == 0
    assert "started again with its data" in service.log.read_text()


def test_two_services_on_one_directory_share_visitors_and_metrics(
    tmp_path: Path, artifacts: Path, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    data = tmp_path / "data"
    services = [start_service(artifacts=artifacts, data_dir=data, shutdown_delay_ms=0) for _ in range(2)]
    for service in services:
        service.wait_until_ready()
    assert httpx2.post(f"{services[0].url}/v1/events", json=EVENT).status_code == 200
    assert [count_events(service) for service in services] == [1, 1]
    httpx2.get(f"{services[0].url}/metrics")  # it tells what it has counted
    for text in (httpx2.get(f"{services[1].url}/metrics").content, metrics.exposition()):
        assert b'propensity_stage_seconds_count{stage="model"} 2.0' in text
        assert b'propensity_models{state="loaded"} 1.0' in text
    assert services[0].end() == 0
    assert count_events(services[1]) == 1
    assert services[1].end(signal.SIGINT) == 0
    assert not is_there(data)


def test_a_service_whose_redis_is_not_there_starts_and_says_what_it_lacks(make_settings: MakeSettings) -> None:
    settings = make_settings(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings)) as client:
        answer = client.post("/v1/score", json={"visitor_id": "a"})
        assert (answer.status_code, answer.json()["degraded"]) == (200, ["store"])
